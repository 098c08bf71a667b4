"""Tools for tests of code that runs on several ranks: public, for users' own tests too."""

from lightning_moe.testing.pool import RankError, RankFailure, RankPool

__all__ = ["RankError", "RankFailure", "RankPool"]

"""Models for the command, the examples and the tests."""

from lightning_moe.models.language_model import MoELanguageModel

__all__ = ["MoELanguageModel"]

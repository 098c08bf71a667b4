"""Lightning strategies."""

from lightning_moe.strategies.expert_parallel import ExpertParallelStrategy

__all__ = ["ExpertParallelStrategy"]

"""Expert parallelism for Lightning."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_moe.config import MoEConfig
from lightning_moe.nn import MoE
from lightning_moe.strategies import ExpertParallelStrategy

ExpertParallelStrategy.register_strategies(StrategyRegistry)

__all__ = ["ExpertParallelStrategy", "MoE", "MoEConfig"]

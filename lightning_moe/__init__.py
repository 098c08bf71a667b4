"""Expert parallelism for Lightning: a strategy, an MoE layer and callbacks for any Trainer."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_moe.callbacks import (
    AuxLossCallback,
    CapacitySchedule,
    ExpertBiasUpdate,
    ExpertHeatmap,
    ExpertLoadMonitor,
    MoESummary,
    RouterCollapseGuard,
    SampleText,
    TopKSchedule,
)
from lightning_moe.checkpoint import MoECheckpointIO
from lightning_moe.config import MoEConfig
from lightning_moe.nn import MoE
from lightning_moe.strategies import ExpertParallelStrategy

ExpertParallelStrategy.register_strategies(StrategyRegistry)

__all__ = [
    "AuxLossCallback",
    "CapacitySchedule",
    "ExpertBiasUpdate",
    "ExpertHeatmap",
    "ExpertLoadMonitor",
    "ExpertParallelStrategy",
    "MoE",
    "MoECheckpointIO",
    "MoEConfig",
    "MoESummary",
    "RouterCollapseGuard",
    "SampleText",
    "TopKSchedule",
]

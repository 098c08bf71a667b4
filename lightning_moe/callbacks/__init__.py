"""Callbacks for any Trainer whose model has MoE layers."""

from lightning_moe.callbacks.aux_loss import AuxLossCallback
from lightning_moe.callbacks.collapse_guard import RouterCollapseGuard
from lightning_moe.callbacks.expert_bias import ExpertBiasUpdate
from lightning_moe.callbacks.expert_heatmap import ExpertHeatmap
from lightning_moe.callbacks.expert_load import ExpertLoadMonitor
from lightning_moe.callbacks.sample_text import SampleText
from lightning_moe.callbacks.schedules import CapacitySchedule, TopKSchedule
from lightning_moe.callbacks.summary import MoESummary

__all__ = [
    "AuxLossCallback",
    "CapacitySchedule",
    "ExpertBiasUpdate",
    "ExpertHeatmap",
    "ExpertLoadMonitor",
    "MoESummary",
    "RouterCollapseGuard",
    "SampleText",
    "TopKSchedule",
]

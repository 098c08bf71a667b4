"""Metrics of routing for any loop, and figures of them."""

from lightning_moe.metrics.choice import ExpertAffinity, RouterEntropy, RoutingStability
from lightning_moe.metrics.fate import CapacityUtilization, DroppedFraction, ReroutedFraction
from lightning_moe.metrics.load import DeadExperts, ExpertLoad, LoadCV, LoadImbalance
from lightning_moe.metrics.recording import recording

__all__ = [
    "CapacityUtilization",
    "DeadExperts",
    "DroppedFraction",
    "ExpertAffinity",
    "ExpertLoad",
    "LoadCV",
    "LoadImbalance",
    "ReroutedFraction",
    "RouterEntropy",
    "RoutingStability",
    "recording",
]

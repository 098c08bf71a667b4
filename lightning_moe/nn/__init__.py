"""The MoE layer and its parts."""

from lightning_moe.nn.balance import load_balancing_loss, router_z_loss
from lightning_moe.nn.capacity import expert_capacity, keep_within_capacity
from lightning_moe.nn.experts import GroupedExperts, SharedMLP
from lightning_moe.nn.layer import MoE
from lightning_moe.nn.router import ROUTERS, Routing, TopKRouter
from lightning_moe.nn.tap import RoutingStats, RoutingTap

__all__ = [
    "ROUTERS",
    "GroupedExperts",
    "MoE",
    "Routing",
    "RoutingStats",
    "RoutingTap",
    "SharedMLP",
    "TopKRouter",
    "expert_capacity",
    "keep_within_capacity",
    "load_balancing_loss",
    "router_z_loss",
]

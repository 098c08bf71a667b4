"""The MoE layer and its parts."""

from lightning_moe.nn.accounting import ParameterCounts, active_flops_per_token, parameter_counts
from lightning_moe.nn.balance import importance_loss, load_balancing_loss, load_loss, router_z_loss
from lightning_moe.nn.capacity import expert_capacity, keep_within_capacity, move_to_next_expert
from lightning_moe.nn.decision import Decision
from lightning_moe.nn.dense import ResidualMLP, SharedMLP
from lightning_moe.nn.experts import GroupedExperts
from lightning_moe.nn.layer import MoE
from lightning_moe.nn.router import (
    ROUTERS,
    LearnedRouter,
    Router,
    Routing,
    TopKRouter,
    make_router,
    register_router,
    sinkhorn,
)
from lightning_moe.nn.tap import LossWeights, RoutingStats, RoutingTap, Watcher
from lightning_moe.nn.tokens import Tokens

__all__ = [
    "ROUTERS",
    "Decision",
    "GroupedExperts",
    "LearnedRouter",
    "LossWeights",
    "MoE",
    "ParameterCounts",
    "ResidualMLP",
    "Router",
    "Routing",
    "RoutingStats",
    "RoutingTap",
    "SharedMLP",
    "Tokens",
    "TopKRouter",
    "Watcher",
    "active_flops_per_token",
    "expert_capacity",
    "importance_loss",
    "keep_within_capacity",
    "load_balancing_loss",
    "load_loss",
    "make_router",
    "move_to_next_expert",
    "parameter_counts",
    "register_router",
    "router_z_loss",
    "sinkhorn",
]

"""Which experts a token goes to."""

from lightning_moe.nn.router.base import ROUTERS, LearnedRouter, Router, Routing, make_router, register_router
from lightning_moe.nn.router.expert_choice import ExpertChoiceRouter
from lightning_moe.nn.router.fixed import HashRouter, RandomRouter
from lightning_moe.nn.router.noisy import GShardRouter, NoisyTopKRouter
from lightning_moe.nn.router.sinkhorn import SinkhornRouter, sinkhorn
from lightning_moe.nn.router.topk import GroupLimitedRouter, SwitchRouter, TopKRouter

__all__ = [
    "ROUTERS",
    "ExpertChoiceRouter",
    "GShardRouter",
    "GroupLimitedRouter",
    "HashRouter",
    "LearnedRouter",
    "NoisyTopKRouter",
    "RandomRouter",
    "Router",
    "Routing",
    "SinkhornRouter",
    "SwitchRouter",
    "TopKRouter",
    "make_router",
    "register_router",
    "sinkhorn",
]

"""What the tests of the routers share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_moe import MoEConfig
from lightning_moe.nn import Routing, Tokens
from lightning_moe.nn.router import LearnedRouter, Router, make_router
from lightning_moe.nn.router.base import without_padding

NEVER = -math.inf

Route = dict[int, float]
"""Weights of a token's experts."""


def tokens_of(num_tokens: int, training: bool = False, **more: Any) -> Tokens:
    return Tokens(torch.Size([num_tokens]), training=training, **more)


def on_logits(router: Router, logits_TE: Tensor, tokens: Tokens | None = None) -> Routing:
    """Routes these very logits, minus infinity among them, which no product with a finite weight gives."""
    assert isinstance(router, LearnedRouter)
    tokens = tokens or tokens_of(len(logits_TE))
    return without_padding(router.choose(logits_TE, logits_TE, tokens), tokens)


def route(config: MoEConfig, logits_TE: Tensor, tokens: Tokens | None = None) -> Routing:
    return on_logits(make_router(logits_TE.shape[1], config), logits_TE, tokens)


def as_dicts(ids_TK: Tensor, weights_TK: Tensor) -> list[Route]:
    """Whatever the order of a token's experts."""
    pairs = zip(ids_TK.tolist(), weights_TK.double().tolist(), strict=True)
    return [dict(zip(ids, weights, strict=True)) for ids, weights in pairs]


def assert_same_routes(ours: list[Route], theirs: list[Route], within: float = 1e-6) -> None:
    assert [set(route) for route in ours] == [set(route) for route in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for expert, weight in other.items():
            assert abs(mine[expert] - weight) <= within * max(1.0, abs(weight)), (mine, other)


def selected(routing: Routing) -> Tensor:
    """True where a token goes to an expert, [T, E]."""
    assigned_TK = routing.assigned_TK
    if assigned_TK is None:
        assigned_TK = torch.ones_like(routing.topk_ids_TK, dtype=torch.bool)
    return torch.zeros_like(routing.logits_TE, dtype=torch.bool).scatter(1, routing.topk_ids_TK, assigned_TK)


def counts(routing: Routing) -> Tensor:
    """Tokens of every expert, [E]."""
    return selected(routing).sum(0)


def imbalance(counts_E: Tensor) -> float:
    """The fullest expert's load as a multiple of the mean."""
    return (counts_E.max() / counts_E.float().mean()).item()


def chi_square(observed: Tensor, expected: Tensor) -> tuple[float, float]:
    """The statistic, and the bound that chance exceeds once in 30,000 draws (Wilson and Hilferty)."""
    freedom = len(observed) - 1
    statistic = ((observed.double() - expected).square() / expected).sum().item()
    return statistic, freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3

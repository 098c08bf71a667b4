"""Every router against plain loops in float64, on random and on adversarial logits.

The logits of the adversarial inputs are such that fp32 and float64 have the same ties: small whole numbers, or equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe import MoEConfig
from lightning_moe.nn import LearnedRouter, Router, Routing, Tokens
from lightning_moe.nn.router import NoisyTopKRouter, TopKRouter, make_router
from lightning_moe.nn.router.base import without_padding
from lightning_moe.testing.routers import ReferenceRoutes, best_first, reference_routes, valid_tokens
from tests.nn.router.helpers import NEVER, tokens_of
from tests.selection import one_in

E = 8
SIGMOID: dict[str, Any] = {"score_function": "sigmoid"}
AFTER: dict[str, Any] = {"score_before_topk": False}
AS_THEY_ARE: dict[str, Any] = {"normalize_topk": False}
GROUPS: dict[str, Any] = {"router": "group_limited", "num_groups": 4, "topk_groups": 2}

CONFIGS = {
    "softmax": MoEConfig(E),
    "softmax-1": MoEConfig(E, top_k=1, **AS_THEY_ARE),
    "softmax-all": MoEConfig(E, top_k=E, **AS_THEY_ARE),
    "softmax-as_they_are": MoEConfig(E, top_k=3, **AS_THEY_ARE),
    "softmax-after": MoEConfig(E, top_k=3, **AFTER),
    "softmax-after-as_they_are": MoEConfig(E, top_k=3, **AFTER, **AS_THEY_ARE),
    "softmax-scaled": MoEConfig(E, route_scale=2.5),
    "softmax-bias": MoEConfig(E, expert_bias=True),
    "softmax-bias-after": MoEConfig(E, expert_bias=True, **AFTER, **AS_THEY_ARE),
    "sigmoid": MoEConfig(E, **SIGMOID),
    "sigmoid-as_they_are": MoEConfig(E, top_k=3, **SIGMOID, **AS_THEY_ARE),
    "sigmoid-after": MoEConfig(E, top_k=3, **SIGMOID, **AFTER),
    "sigmoid-after-as_they_are": MoEConfig(E, top_k=1, **SIGMOID, **AFTER, **AS_THEY_ARE),
    "sigmoid-bias": MoEConfig(E, **SIGMOID, expert_bias=True, route_scale=2.5),
    "sigmoid-bias-after": MoEConfig(E, **SIGMOID, **AFTER, expert_bias=True),
    "groups": MoEConfig(E, top_k=4, **GROUPS),
    "groups-scaled": MoEConfig(E, top_k=3, **GROUPS, **AS_THEY_ARE, route_scale=2.5),
    "groups-no_bias": MoEConfig(E, top_k=3, **GROUPS, expert_bias=False),
    "groups-softmax": MoEConfig(E, top_k=3, **GROUPS, score_function="softmax"),
    "groups-of_four": MoEConfig(E, top_k=2, router="group_limited", num_groups=2, topk_groups=1),
    "groups-of_one": MoEConfig(E, top_k=2, router="group_limited", num_groups=8, topk_groups=3),
    "groups-one": MoEConfig(E, top_k=2, router="group_limited"),
    "switch": MoEConfig(E, top_k=1, router="switch", jitter=0.0),
    "gshard": MoEConfig(E, router="gshard"),
    "noisy": MoEConfig(E, router="noisy_topk"),
    "noisy-1": MoEConfig(E, top_k=1, router="noisy_topk"),
    "noisy-all": MoEConfig(E, top_k=E, router="noisy_topk"),
    "sinkhorn": MoEConfig(E, router="sinkhorn"),
    "sinkhorn-1": MoEConfig(E, top_k=1, router="sinkhorn", **SIGMOID, **AS_THEY_ARE),
    "sinkhorn-rough": MoEConfig(E, router="sinkhorn", sinkhorn_iterations=2, route_scale=2.5),
    "expert_choice": MoEConfig(E, router="expert_choice", capacity_factor=2, eval_capacity_factor=1.25),
    "expert_choice-few": MoEConfig(E, router="expert_choice", capacity_factor=0.3),
    "expert_choice-all": MoEConfig(E, router="expert_choice", capacity_factor=E),
    "hash": MoEConfig(E, router="hash"),
    "hash-1": MoEConfig(E, top_k=1, router="hash"),
    "random": MoEConfig(E, top_k=3, router="random"),
    "random-all": MoEConfig(E, top_k=E, router="random"),
}


def one_wins_all() -> Tensor:
    logits = torch.randn(40, E)
    logits[:, 3] += 100
    return logits


def unreachable(most: int) -> Tensor:
    """Up to so many experts at minus infinity, others for every token."""
    number_T1 = torch.randint(most + 1, (40, 1))
    return torch.randn(40, E).masked_fill(torch.rand(40, E).argsort(1) < number_T1, NEVER)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "random": lambda: 3 * torch.randn(40, E),
    "ties": lambda: torch.randint(-2, 3, (40, E)).float(),
    "equal": lambda: torch.zeros(40, E),
    "one_wins_all": one_wins_all,
    "some_unreachable": lambda: unreachable(3),
    "one_reachable": lambda: unreachable(E - 1),
    "one_token": lambda: torch.randn(1, E),
    "no_tokens": lambda: torch.randn(0, E),
}
PADDED: dict[str, Callable[[], Tensor]] = {
    "some": lambda: torch.rand(4, 10) < 0.6,
    "a_sequence": lambda: torch.tensor([[True], [False], [True], [True]]).expand(4, 10),
    "all_but_one": lambda: torch.arange(40).view(4, 10) == 17,
    "all": lambda: torch.zeros(4, 10, dtype=torch.bool),
}


def both(config: MoEConfig, logits_TE: Tensor, tokens: Tokens) -> tuple[Routing, ReferenceRoutes, Tensor, Tensor]:
    """The two answers, and the logits that each is a function of."""
    router: Router = make_router(E, config)
    logits, logits64 = logits_TE.clone().requires_grad_(), logits_TE.double().requires_grad_()
    known: dict[str, Tensor] = {}
    x = torch.randn(len(logits), E)
    if isinstance(router, TopKRouter) and router.expert_bias is not None:
        # Two are equal, and none is near the sum of another and a difference of scores.
        router.expert_bias.copy_(torch.tensor([0.0, 0.25, -0.125, -0.0625, 0.25, 0.03125, 0.0, -0.5]))
        known["bias_E"] = router.expert_bias
    if isinstance(router, NoisyTopKRouter):
        torch.nn.init.normal_(router.noise_weight)
        known["noise_logits_TE"] = (x @ router.noise_weight.detach().t()).double()
    routing = router.choose(x, logits, tokens) if isinstance(router, LearnedRouter) else router(x, tokens)
    routing = without_padding(routing, tokens)
    return routing, reference_routes(config, logits64, tokens, **known), logits, logits64


def assert_same(config: MoEConfig, logits_TE: Tensor, tokens: Tokens) -> None:
    ours, theirs, logits, logits64 = both(config, logits_TE, tokens)
    assigned = [[True] * ours.topk_ids_TK.shape[1]] * len(logits) if ours.assigned_TK is None else ours.assigned_TK
    chosen = [
        [e for e, is_assigned in zip(ids, row, strict=True) if is_assigned]
        for ids, row in zip(ours.topk_ids_TK.tolist(), torch.as_tensor(assigned).tolist(), strict=True)
    ]
    assert chosen == theirs.selected

    upstream = torch.randn(ours.topk_scores_TK.shape)
    total, total64 = logits.sum() * 0, logits64.new_zeros(())
    for t, pairs in enumerate(theirs.routes):
        for k, (_, weight64) in enumerate(pairs):  # those that are assigned come first
            weight = ours.topk_scores_TK[t, k]
            assert_close(weight.detach().double(), weight64.detach(), rtol=1e-6, atol=1e-6)
            total64 = total64 + weight64 * upstream[t, k].double()
            total = total + weight * upstream[t, k]
    probs_TE = ours.scores_TE if ours.probs_TE is None else ours.probs_TE
    assert_close(probs_TE.detach().double(), theirs.probabilities_TE.detach(), rtol=1e-6, atol=1e-6)
    assert (ours.load_TE is not None) == (config.router == "noisy_topk" and tokens.training)
    if ours.load_TE is not None:
        assert theirs.load_TE is not None
        assert bool(((ours.load_TE >= 0) & (ours.load_TE <= 1)).all())
        # Among experts that are out of reach there is no telling by the formula: minus infinity less itself.
        load, load64 = ours.load_TE.detach().double(), theirs.load_TE.detach()
        is_told = load64.isfinite()
        assert_close(load[is_told], load64[is_told], rtol=1e-5, atol=1e-5)
    assert_same_preferences(config, ours, theirs, tokens)
    if not logits_TE.isfinite().all():
        return
    if total64.requires_grad:
        total.backward()
        total64.backward()
        assert_close(logits.grad.double(), logits64.grad, rtol=1e-6, atol=1e-6)


def assert_same_preferences(config: MoEConfig, ours: Routing, theirs: ReferenceRoutes, tokens: Tokens) -> None:
    if config.router == "expert_choice":
        return  # nothing overflows
    choice_TE = ours.logits_TE if ours.choice_TE is None else ours.choice_TE
    for t in valid_tokens(tokens):
        assert best_first(choice_TE[t]) == theirs.preferences[t]


@pytest.mark.parametrize(("config", "given", "training"), one_in(2, [*CONFIGS], [*INPUTS], [False, True]))
def test_as_by_plain_loops(config: str, given: str, training: bool) -> None:
    logits = INPUTS[given]()
    token_ids = torch.randint(100, (len(logits),))
    assert_same(CONFIGS[config], logits, tokens_of(len(logits), training, token_ids=token_ids))


@pytest.mark.parametrize(("config", "padded", "training"), one_in(2, [*CONFIGS], [*PADDED], [False, True]))
def test_with_padding_as_by_plain_loops(config: str, padded: str, training: bool) -> None:
    ids, valid = torch.randint(100, (4, 10)), PADDED[padded]()
    tokens = Tokens(torch.Size([4, 10]), valid, ids, training=training)
    assert_same(CONFIGS[config], 3 * torch.randn(40, E), tokens)


LEARNED = [name for name, config in CONFIGS.items() if config.router not in ("hash", "random")]


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_are_finite_where_an_expert_is_out_of_reach(name: str) -> None:
    """To whatever parameter there is: minus infinity is how a subclass closes an expert."""
    config = CONFIGS[name]
    router = make_router(E, config)
    x, logits = torch.randn(40, E), unreachable(3).requires_grad_()
    routing = router.choose(x, logits, tokens_of(40, training=True))
    total = routing.topk_scores_TK.sum() + routing.scores_TE.square().sum()
    if routing.load_TE is not None:
        assert bool(routing.load_TE.isfinite().all())
        total = total + routing.load_TE.square().sum()
    total.backward()
    for value in (logits, *router.parameters()):
        assert value.grad is None or bool(value.grad.isfinite().all())

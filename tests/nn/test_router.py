"""The top-k router against plain loops in float64, and where its choices could be left to chance."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe import MoEConfig
from lightning_moe.nn.router import ROUTERS, Routing, TopKRouter, make_router


def make(num_experts: int = 6, top_k: int = 2, width: int = 5, normalize: bool = True) -> TopKRouter:
    router = TopKRouter(width, MoEConfig(num_experts, top_k=top_k, normalize_topk=normalize))
    torch.nn.init.normal_(router.weight)  # far apart, so that fp32 and float64 choose the same
    return router


def looped(x_TD: Tensor, weight_ED: Tensor, top_k: int, normalize: bool) -> list[dict[int, float]]:
    """Expert and weight of every token's choices, best first, by the textbook."""
    routes = []
    for x_D in x_TD.double().tolist():
        logits = [sum(a * b for a, b in zip(x_D, w, strict=True)) for w in weight_ED.double().tolist()]
        exps = [math.exp(logit - max(logits)) for logit in logits]
        scores = [e / sum(exps) for e in exps]
        best = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:top_k]
        total = sum(scores[e] for e in best) if normalize else 1.0
        routes.append({e: scores[e] / total for e in best})
    return routes


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (1, 2), (20, 1), (20, 2), (20, 5), (20, 6)])
def test_as_by_plain_loops(num_tokens: int, top_k: int, normalize: bool) -> None:
    router = make(top_k=top_k, normalize=normalize)
    x = torch.randn(num_tokens, 5)
    routing = router(x)
    expected = looped(x, router.weight.detach(), top_k, normalize)
    assert routing.topk_ids_TK.tolist() == [list(route) for route in expected]
    scores = torch.tensor([list(route.values()) for route in expected], dtype=torch.float64)
    assert_close(routing.topk_scores_TK.double(), scores, rtol=1e-6, atol=1e-6)
    assert_close(routing.scores_TE, routing.logits_TE.softmax(-1), rtol=1e-6, atol=1e-6)
    assert_close(routing.logits_TE.double(), x.double() @ router.weight.double().t(), rtol=1e-6, atol=1e-6)
    assert routing.kept_TK is None


@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_is_that_of_the_formula(normalize: bool) -> None:
    router = make(normalize=normalize)
    x = torch.randn(7, 5, requires_grad=True)
    upstream = torch.randn(7, 2)
    routing = router(x)
    routing.topk_scores_TK.backward(upstream)

    x64, weight64 = (value.detach().double().requires_grad_() for value in (x, router.weight))
    scores = torch.softmax(x64 @ weight64.t(), -1).gather(1, routing.topk_ids_TK)
    if normalize:
        scores = scores / scores.sum(-1, keepdim=True)
    scores.backward(upstream.double())
    assert x.grad is not None
    assert router.weight.grad is not None
    assert_close(x.grad.double(), x64.grad, rtol=1e-6, atol=1e-6)
    assert_close(router.weight.grad.double(), weight64.grad, rtol=1e-6, atol=1e-6)


def test_ties_choose_the_lower_id() -> None:
    router = make(num_experts=64, top_k=4)
    torch.nn.init.zeros_(router.weight)
    assert router(torch.randn(9, 5)).topk_ids_TK.tolist() == [[0, 1, 2, 3]] * 9
    # Experts 7, 20 and 40 are equal and the best, whatever the token.
    with torch.no_grad():
        router.weight[[40, 7, 20]] = 1.0
    assert router(torch.rand(9, 5) + 0.1).topk_ids_TK.tolist() == [[7, 20, 40, 0]] * 9


def test_all_experts_selected() -> None:
    router = make(num_experts=4, top_k=4, normalize=False)
    x = torch.randn(11, 5)
    routing = router(x)
    assert routing.topk_ids_TK.sort(-1).values.tolist() == [[0, 1, 2, 3]] * 11
    assert_close(routing.topk_scores_TK.sum(-1), torch.ones(11), rtol=1e-6, atol=1e-6)
    normalized = make(num_experts=4, top_k=4)
    normalized.load_state_dict(router.state_dict())
    # Dividing by the sum, which is 1, changes nothing.
    assert_close(normalized(x).topk_scores_TK, routing.topk_scores_TK, rtol=1e-6, atol=1e-6)


def test_normalized_scores_sum_to_one() -> None:
    x = torch.randn(11, 5)
    assert_close(make()(x).topk_scores_TK.sum(-1), torch.ones(11), rtol=1e-6, atol=1e-6)
    assert bool((make(normalize=False)(x).topk_scores_TK.sum(-1) < 0.999).all())
    assert make(top_k=1)(x).topk_scores_TK.tolist() == [[1.0]] * 11


def test_best_first() -> None:
    scores = make(top_k=4)(torch.randn(50, 5)).topk_scores_TK
    assert bool((scores.diff(dim=-1) <= 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_routes_as_its_fp32_value(dtype: torch.dtype) -> None:
    half = make().to(dtype)
    full = make()
    full.load_state_dict({"weight": half.weight.float()})
    x = torch.randn(200, 5).to(dtype)
    for ours, expected in zip(half(x)[:4], full(x.float())[:4], strict=True):
        assert torch.equal(ours, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = full(x)
    for ours, expected in zip(under_autocast[:4], full(x.float())[:4], strict=True):
        assert torch.equal(ours, expected)
    assert {value.dtype for value in half(x)[:3]} == {torch.float32}


@pytest.mark.parametrize("normalize", [True, False])
def test_extreme_logits_stay_finite(normalize: bool) -> None:
    router = make(num_experts=3, top_k=2, width=3, normalize=normalize)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    low, high = -1e30, 1e30
    x = torch.tensor([[low, 0.0, low], [high, low, low], [low, low, low], [high, high, high]], requires_grad=True)
    routing = router(x)
    # What is as good as minus infinity gets the score 0; among equals the lower id comes first.
    assert routing.topk_ids_TK.tolist() == [[1, 0], [0, 1], [0, 1], [0, 1]]
    third = torch.tensor(1 / 3).item()
    equal = [0.5, 0.5] if normalize else [third, third]
    assert_close(routing.topk_scores_TK, torch.tensor([[1.0, 0.0], [1.0, 0.0], equal, equal]))
    routing.topk_scores_TK.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_no_tokens() -> None:
    x = torch.randn(0, 5, requires_grad=True)
    routing = make()(x)
    assert [tuple(value.shape) for value in routing[:4]] == [(0, 6), (0, 6), (0, 2), (0, 2)]
    routing.topk_scores_TK.sum().backward()
    assert x.grad is not None


def test_weights_start_small_and_different() -> None:
    torch.manual_seed(1)
    weight = TopKRouter(256, MoEConfig(64)).weight
    assert_close(weight.std(), torch.tensor(0.02), rtol=0.05, atol=0)
    assert len({tuple(row) for row in weight.tolist()}) == 64


def test_routers_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_router(5, MoEConfig(4))) is TopKRouter
    message = "router='fancy': unknown. Known: topk."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_router(5, MoEConfig(4, router="fancy"))
    monkeypatch.setitem(ROUTERS, "mine", lambda *_: torch.nn.Identity())
    assert type(make_router(5, MoEConfig(4, router="mine"))) is torch.nn.Identity
    with pytest.raises(ValueError, match=r"Known: mine, topk\.$"):
        make_router(5, MoEConfig(4, router="fancy"))


def test_a_routing_is_a_tuple_of_tensors() -> None:
    assert isinstance(make()(torch.randn(2, 5)), tuple)
    assert Routing._fields == ("logits_TE", "scores_TE", "topk_scores_TK", "topk_ids_TK", "kept_TK")

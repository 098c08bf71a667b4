"""Routers that take the best by score: plain loops in float64, and where choices could be left to chance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe import MoEConfig
from lightning_moe.nn import Routing, Tokens
from lightning_moe.nn.router import SwitchRouter, TopKRouter, make_router
from tests.nn.router.helpers import NEVER, on_logits, route, tokens_of


def make(num_experts: int = 6, top_k: int = 2, width: int = 5, normalize: bool = True) -> TopKRouter:
    router = TopKRouter(width, MoEConfig(num_experts, top_k=top_k, normalize_topk=normalize))
    torch.nn.init.normal_(router.weight)  # far apart, so that fp32 and float64 choose the same
    return router


def routed(router: TopKRouter, x_TD: Tensor) -> Routing:
    return router(x_TD, Tokens(x_TD.shape[:-1]))


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
    routing = routed(router, x)
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
    routing = routed(router, x)
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
    assert routed(router, torch.randn(9, 5)).topk_ids_TK.tolist() == [[0, 1, 2, 3]] * 9
    # Experts 7, 20 and 40 are equal and the best, whatever the token.
    with torch.no_grad():
        router.weight[[40, 7, 20]] = 1.0
    assert routed(router, torch.rand(9, 5) + 0.1).topk_ids_TK.tolist() == [[7, 20, 40, 0]] * 9


def test_all_experts_selected() -> None:
    router = make(num_experts=4, top_k=4, normalize=False)
    x = torch.randn(11, 5)
    routing = routed(router, x)
    assert routing.topk_ids_TK.sort(-1).values.tolist() == [[0, 1, 2, 3]] * 11
    assert_close(routing.topk_scores_TK.sum(-1), torch.ones(11), rtol=1e-6, atol=1e-6)
    normalized = make(num_experts=4, top_k=4)
    normalized.load_state_dict(router.state_dict())
    # Dividing by the sum, which is 1, changes nothing.
    assert_close(routed(normalized, x).topk_scores_TK, routing.topk_scores_TK, rtol=1e-6, atol=1e-6)


def test_normalized_scores_sum_to_one() -> None:
    x = torch.randn(11, 5)
    assert_close(routed(make(), x).topk_scores_TK.sum(-1), torch.ones(11), rtol=1e-6, atol=1e-6)
    assert bool((routed(make(normalize=False), x).topk_scores_TK.sum(-1) < 0.999).all())
    assert routed(make(top_k=1), x).topk_scores_TK.tolist() == [[1.0]] * 11


def test_best_first() -> None:
    scores = routed(make(top_k=4), torch.randn(50, 5)).topk_scores_TK
    assert bool((scores.diff(dim=-1) <= 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_routes_as_its_fp32_value(dtype: torch.dtype) -> None:
    half = make().to(dtype)
    full = make()
    full.load_state_dict({"weight": half.weight.float()})
    x = torch.randn(200, 5).to(dtype)
    for ours, expected in zip(routed(half, x)[:4], routed(full, x.float())[:4], strict=True):
        assert torch.equal(ours, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = routed(full, x)
    for ours, expected in zip(under_autocast[:4], routed(full, x.float())[:4], strict=True):
        assert torch.equal(ours, expected)
    assert {value.dtype for value in routed(half, x)[:3]} == {torch.float32}


@pytest.mark.parametrize("normalize", [True, False])
def test_extreme_logits_stay_finite(normalize: bool) -> None:
    router = make(num_experts=3, top_k=2, width=3, normalize=normalize)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    low, high = -1e30, 1e30
    x = torch.tensor([[low, 0.0, low], [high, low, low], [low, low, low], [high, high, high]], requires_grad=True)
    routing = routed(router, x)
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
    routing = routed(make(), x)
    assert [tuple(value.shape) for value in routing[:4]] == [(0, 6), (0, 6), (0, 2), (0, 2)]
    routing.topk_scores_TK.sum().backward()
    assert x.grad is not None


def test_weights_start_small_and_different() -> None:
    torch.manual_seed(1)
    weight = TopKRouter(256, MoEConfig(64)).weight
    assert_close(weight.std(), torch.tensor(0.02), rtol=0.05, atol=0)
    assert len({tuple(row) for row in weight.tolist()}) == 64


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("before", [True, False])
def test_scores_that_underflow_are_told_apart_by_their_logits(score_function: str, before: bool) -> None:
    logits = torch.tensor([[0.0, -300.0, -200.0, -250.0], [300.0, 200.0, 400.0, 100.0]])
    config = MoEConfig(4, top_k=3, score_function=score_function, score_before_topk=before)
    routing = route(config, logits)
    assert routing.topk_ids_TK.tolist() == [[0, 2, 3], [2, 0, 1]]
    assert bool(routing.topk_scores_TK.isfinite().all())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("router", ["topk", "group_limited"])
def test_sigmoid_scores_that_are_all_0_stay_finite(router: str, normalize: bool) -> None:
    config = MoEConfig(4, router=router, score_function="sigmoid", normalize_topk=normalize)
    logits = torch.full((3, 4), -1e30, requires_grad=True)
    routing = route(config, logits)
    assert routing.topk_ids_TK.tolist() == [[0, 1]] * 3
    assert routing.topk_scores_TK.tolist() == [[0.0, 0.0]] * 3
    assert routing.probs_TE is not None
    (routing.topk_scores_TK.sum() + routing.probs_TE.square().sum()).backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_bias_is_for_the_selection_alone() -> None:
    config = MoEConfig(4, top_k=2, expert_bias=True, normalize_topk=False)
    router = make_router(4, config)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], requires_grad=True)
    unbiased = on_logits(router, logits)
    router.expert_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))
    biased = on_logits(router, logits)
    assert (unbiased.topk_ids_TK.tolist(), biased.topk_ids_TK.tolist()) == ([[0, 1]], [[3, 0]])
    assert torch.equal(biased.scores_TE, logits.softmax(-1))
    assert torch.equal(biased.topk_scores_TK, biased.scores_TE[:, [3, 0]])
    assert_close(biased.choice_TE, logits.softmax(-1).detach() + router.expert_bias)
    assert not biased.choice_TE.requires_grad


def test_bias_is_added_to_the_logits_where_those_are_selected_by() -> None:
    router = make_router(3, MoEConfig(3, top_k=1, expert_bias=True, score_before_topk=False, normalize_topk=False))
    router.expert_bias.copy_(torch.tensor([0.0, 0.75, 0.0]))
    # 0.75 decides between scores whatever they are, and between logits only if they are as close.
    logits = torch.tensor([[3.0, 2.0, 1.0], [2.5, 2.0, 1.0]])
    assert on_logits(router, logits).topk_ids_TK.tolist() == [[0], [1]]


def test_only_experts_of_the_best_groups() -> None:
    config = MoEConfig(8, top_k=3, router="group_limited", num_groups=4, topk_groups=2)
    routing = route(config, 3 * torch.randn(200, 8))
    groups = [set(ids) for ids in (routing.topk_ids_TK // 2).tolist()]
    assert max(len(group) for group in groups) == 2
    best = routing.scores_TE.argmax(-1)
    # The best expert need not be in: its group may have little else.
    assert bool((best.unsqueeze(1) != routing.topk_ids_TK).all(-1).any())


def test_groups_without_a_bias_are_rated_by_scores_as_with_a_bias_of_0() -> None:
    logits = torch.tensor([[10.0, -5.0, 1.0, 1.0]])  # sums of scores 1.007 and 1.46, of logits 5 and 2
    for expert_bias in (True, False):
        config = MoEConfig(4, top_k=2, router="group_limited", num_groups=2, expert_bias=expert_bias)
        assert route(config, logits).topk_ids_TK.tolist() == [[2, 3]]


@pytest.mark.parametrize("expert_bias", [True, False])
def test_no_expert_of_another_group_even_where_a_group_has_too_few_in_reach(expert_bias: bool) -> None:
    config = MoEConfig(4, top_k=2, router="group_limited", num_groups=2, expert_bias=expert_bias)
    routing = route(config, torch.tensor([[NEVER, NEVER, 1.0, NEVER]]))
    assert routing.topk_ids_TK.tolist() == [[2, 3]]
    assert routing.topk_scores_TK.tolist() == [[1.0, 0.0]]


def test_switch_weighs_by_the_score() -> None:
    logits = torch.randn(20, 4)
    routing = route(MoEConfig(4, top_k=1, router="switch"), logits)
    scores = logits.softmax(-1)
    assert torch.equal(routing.topk_ids_TK, scores.argmax(-1, keepdim=True))
    assert torch.equal(routing.topk_scores_TK, scores.amax(-1, keepdim=True))


JITTERED = [("switch", 1, None, 0.01), ("switch", 1, 0.3, 0.3), ("topk", 2, 0.1, 0.1), ("gshard", 2, 0.1, 0.1)]


@pytest.mark.parametrize(("name", "top_k", "given", "jitter"), JITTERED)
def test_jitter_is_multiplicative_and_of_mean_1(name: str, top_k: int, given: float | None, jitter: float) -> None:
    width = 6
    router = make_router(width, MoEConfig(width, top_k=top_k, router=name, jitter=given))
    with torch.no_grad():
        router.weight.copy_(torch.eye(width))  # logits are what the router sees
    x = torch.randn(2000, width)
    factor = router(x, tokens_of(2000, training=True)).logits_TE.detach() / x
    assert 1 - jitter - 1e-5 <= factor.min() < 1 - 0.99 * jitter
    assert 1 + 0.99 * jitter < factor.max() <= 1 + jitter + 1e-5
    spread = jitter / math.sqrt(3)  # of a uniform distribution
    assert abs(factor.mean() - 1) < 4 * spread / math.sqrt(factor.numel())
    assert_close(factor.std().item(), spread, rtol=0.03, atol=0)
    # Every activation has its own factor, and every pass others.
    assert abs(torch.corrcoef(factor.t())[0, 1]) < 0.1
    again = router(x, tokens_of(2000, training=True)).logits_TE / x
    assert abs(torch.corrcoef(torch.stack([again.flatten(), factor.flatten()]))[0, 1]) < 0.1
    assert torch.equal(router(x, tokens_of(2000)).logits_TE, x)


def test_no_jitter_where_it_is_0() -> None:
    router = make_router(6, MoEConfig(4, top_k=1, router="switch", jitter=0.0))
    assert isinstance(router, SwitchRouter)
    x = torch.randn(20, 6)
    assert torch.equal(router(x, tokens_of(20, training=True)).logits_TE, router(x, tokens_of(20)).logits_TE)

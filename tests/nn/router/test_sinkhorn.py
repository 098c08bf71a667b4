"""The transport plan and the router that goes by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe import MoEConfig
from lightning_moe.nn import Tokens, sinkhorn
from lightning_moe.nn.router import make_router
from tests.nn.router.helpers import NEVER, counts, imbalance, on_logits, route, tokens_of

CONFIG = MoEConfig(8, router="sinkhorn")


def skewed(num_tokens: int = 400) -> Tensor:
    """Logits by which a few experts are everybody's best."""
    return torch.randn(num_tokens, 8) + torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0])


@pytest.mark.parametrize("tolerance", [0.1, 1e-3, 1e-5])
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 400])
def test_shares_are_even_up_to_the_tolerance(num_tokens: int, tolerance: float) -> None:
    plan = sinkhorn(skewed(num_tokens).double(), tolerance=tolerance, max_iterations=10_000).exp()
    assert_close(plan.sum(1), torch.ones(num_tokens).double(), rtol=1e-9, atol=1e-9)
    even = num_tokens / 8
    assert bool(((plan.sum(0) / even - 1).abs() <= tolerance * (1 + 1e-6)).all())


def test_is_a_scaling_of_rows_and_columns() -> None:
    """What is left of the logits: every quadruple's cross-ratio."""
    logits = skewed(30).double()
    change = sinkhorn(logits) - logits
    assert_close(change - change[:1] - change[:, :1] + change[:1, :1], torch.zeros(30, 8).double(), rtol=0, atol=1e-12)


def test_stops_at_the_tolerance_and_at_the_limit() -> None:
    logits = skewed().double()
    uneven = []
    for most in (1, 2, 3, 5, 10):
        plan = sinkhorn(logits, tolerance=1e-12, max_iterations=most)
        # The last thing that is scaled are the rows.
        assert_close(plan.exp().sum(1), torch.ones(400).double(), rtol=1e-12, atol=0)
        uneven.append((plan.exp().sum(0) / 50 - 1).abs().max().item())
    assert uneven == sorted(uneven, reverse=True)
    assert uneven[0] > 10 * uneven[-1] > 0
    # With a loose tolerance more rounds change nothing.
    rough = sinkhorn(logits, tolerance=0.2, max_iterations=100)
    assert 1e-3 < (rough.exp().sum(0) / 50 - 1).abs().max() <= 0.2
    assert torch.equal(rough, sinkhorn(logits, tolerance=0.2, max_iterations=1000))


def test_even_logits_need_no_round() -> None:
    logits = torch.arange(8.0).roll(0).repeat(8, 1)
    cyclic = torch.stack([row.roll(shift) for shift, row in enumerate(logits)])
    assert_close(sinkhorn(cyclic, max_iterations=1), cyclic.log_softmax(-1))


def test_leaves_what_is_out_of_reach_out() -> None:
    closed = torch.rand(400, 8) < 0.3
    logits = skewed().masked_fill(closed, NEVER)
    plan = sinkhorn(logits, max_iterations=2000).exp()
    assert bool((plan[closed] == 0).all())
    assert not plan.isnan().any()
    reachable = ~closed.all(1)
    assert_close(plan.sum(1), reachable.float(), rtol=1e-4, atol=1e-4)
    assert_close(plan.sum(0), (reachable.sum() / 8).expand(8), rtol=2e-3, atol=0)


def test_an_expert_or_a_token_that_nobody_reaches() -> None:
    logits = torch.randn(20, 4)
    logits[:, 2] = NEVER
    logits[7] = NEVER
    plan = sinkhorn(logits).exp()
    assert not plan.isnan().any()
    assert bool((plan[:, 2] == 0).all())
    assert bool((plan[7] == 0).all())
    # The others share what there is.
    assert_close(plan[:, [0, 1, 3]].sum(0), torch.full((3,), 19 / 3), rtol=1e-3, atol=0)


def test_padding_sends_nothing() -> None:
    logits, valid = skewed(), torch.rand(400) < 0.5
    plan = sinkhorn(logits, valid)
    assert_close(plan[valid], sinkhorn(logits[valid]), rtol=1e-4, atol=1e-4)
    wild = logits.masked_fill(~valid.unsqueeze(1), 1e4)
    assert torch.equal(sinkhorn(wild, valid)[valid], plan[valid])


@pytest.mark.parametrize("valid", [None, torch.zeros(3, dtype=torch.bool)])
def test_nothing_to_send(valid: Tensor | None) -> None:
    plan = sinkhorn(torch.randn(0 if valid is None else 3, 4), valid)
    assert not plan.isnan().any()
    assert plan.shape == (0 if valid is None else 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    low, high = -1e30, 1e30
    logits = torch.tensor(
        [[low, 0.0, low], [high, low, low], [low, low, low], [high, high, high], [0.0, high, low], [1.0, 2.0, 3.0]],
        dtype=dtype,
        requires_grad=True,
    )
    assert bool(sinkhorn(logits.detach()).isfinite().all())
    routing = route(MoEConfig(3, router="sinkhorn"), logits, tokens_of(6, training=True))
    assert bool(routing.topk_scores_TK.isfinite().all())
    assert all(len(set(ids)) == 2 for ids in routing.topk_ids_TK.tolist())
    routing.topk_scores_TK.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_is_more_even_than_by_topk(top_k: int) -> None:
    logits = skewed()
    balanced = counts(route(MoEConfig(8, top_k=top_k, router="sinkhorn"), logits, tokens_of(400, training=True)))
    greedy = counts(route(MoEConfig(8, top_k=top_k), logits))
    assert imbalance(greedy) > 1.8
    assert imbalance(balanced) < 1.3
    assert balanced.sum() == 400 * top_k


def test_is_topk_at_evaluation() -> None:
    logits = skewed()
    for ours, theirs in zip(route(CONFIG, logits), route(MoEConfig(8), logits), strict=True):
        assert (ours is theirs is None) or torch.equal(ours, theirs)


def test_weights_in_training_are_those_of_topk_for_the_same_experts() -> None:
    logits = skewed()
    for config in (
        CONFIG,
        MoEConfig(8, router="sinkhorn", normalize_topk=False, route_scale=2.5),
        MoEConfig(8, router="sinkhorn", score_function="sigmoid"),
    ):
        routing = route(config, logits, tokens_of(400, training=True))
        scores = logits.sigmoid() if config.score_function == "sigmoid" else logits.softmax(-1)
        weights = scores.gather(1, routing.topk_ids_TK)
        if config.normalize_topk:
            weights = weights / weights.sum(1, keepdim=True)
        assert_close(routing.topk_scores_TK, weights * config.route_scale, rtol=1e-6, atol=1e-6)
        assert routing.choice_TE is not None
        assert torch.equal(routing.choice_TE.topk(2).indices, routing.topk_ids_TK)


def test_no_gradient_goes_through_the_plan() -> None:
    logits = skewed().requires_grad_()
    routing = route(CONFIG, logits, tokens_of(400, training=True))
    assert routing.choice_TE is not None
    assert not routing.choice_TE.requires_grad
    routing.topk_scores_TK.square().sum().backward()
    twin = logits.detach().clone().requires_grad_()
    weights = twin.softmax(-1).gather(1, routing.topk_ids_TK)
    (weights / weights.sum(1, keepdim=True)).square().sum().backward()
    assert_close(logits.grad, twin.grad, rtol=1e-6, atol=1e-6)


def test_reads_tolerance_and_iterations() -> None:
    logits = skewed()
    for tolerance, most in ((1e-3, 100), (0.5, 100), (1e-3, 2)):
        config = MoEConfig(8, router="sinkhorn", sinkhorn_tolerance=tolerance, sinkhorn_iterations=most)
        routing = route(config, logits, tokens_of(400, training=True))
        assert torch.equal(routing.choice_TE, sinkhorn(logits, None, tolerance, most))


@pytest.mark.parametrize("others", [0, 3])
def test_one_token_alone_goes_by_its_logits(others: int) -> None:
    """The even plan gives every expert 1 / E of it, so that rounding alone would tell them apart."""
    logits, valid = torch.randn(1 + others, 8), torch.arange(1 + others) == 0
    assert_close(sinkhorn(logits, valid).exp()[0], torch.full((8,), 1 / 8), rtol=1e-5, atol=0)
    tokens = Tokens(torch.Size([1 + others]), valid if others else None, training=True)
    routing = on_logits(make_router(8, CONFIG), logits, tokens)
    assert routing.topk_ids_TK[0].tolist() == logits[0].sort(descending=True).indices[:2].tolist()

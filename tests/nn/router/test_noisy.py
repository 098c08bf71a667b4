"""Routers that explore by chance: how often they choose what, and what learns from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe import MoEConfig
from lightning_moe.nn import load_loss
from lightning_moe.nn.router import NoisyTopKRouter, make_router
from tests.nn.router.helpers import NEVER, chi_square, on_logits, route, tokens_of

GSHARD = MoEConfig(5, router="gshard")
LOGITS = torch.tensor([1.0, 0.5, 2.0, -1.0, 0.0])
DRAWS = 20_000


def noisy(num_experts: int, top_k: int, width: int | None = None) -> NoisyTopKRouter:
    router = make_router(width or num_experts, MoEConfig(num_experts, top_k=top_k, router="noisy_topk"))
    assert isinstance(router, NoisyTopKRouter)
    return router


def with_spread(router: NoisyTopKRouter, spread_E: Tensor) -> NoisyTopKRouter:
    """Noise of these standard deviations for a token whose activations are all 1."""
    width = router.noise_weight.shape[1]
    with torch.no_grad():
        # The inverse of the softplus.
        router.noise_weight.copy_(spread_E.expm1().log().unsqueeze(1).expand(-1, width) / width)
    return router


def test_gshard_draws_the_second_by_weight() -> None:
    routing = route(GSHARD, LOGITS.expand(DRAWS, 5), tokens_of(DRAWS, training=True))
    assert bool((routing.topk_ids_TK[:, 0] == 2).all())
    observed = torch.bincount(routing.topk_ids_TK[:, 1], minlength=5)
    assert observed[2] == 0
    others = torch.tensor([0, 1, 3, 4])
    statistic, bound = chi_square(observed[others], DRAWS * LOGITS[others].softmax(0))
    assert statistic < bound


def test_gshard_draws_anew_for_every_pass_and_token() -> None:
    logits = torch.zeros(400, 5)
    first, second = (route(GSHARD, logits, tokens_of(400, training=True)).topk_ids_TK[:, 1] for _ in range(2))
    assert 0.15 < (first == second).float().mean() < 0.35  # one in four by chance
    assert 0.15 < (first[1:] == first[:-1]).float().mean() < 0.35


def test_gshard_weighs_the_two_by_their_share() -> None:
    logits = 2 * torch.randn(300, 5)
    routing = route(GSHARD, logits, tokens_of(300, training=True))
    pair = logits.double().softmax(-1).gather(1, routing.topk_ids_TK)
    assert_close(routing.topk_scores_TK.double(), pair / pair.sum(1, keepdim=True), rtol=1e-6, atol=1e-6)


def test_gshard_takes_the_second_best_at_evaluation() -> None:
    logits = torch.randn(300, 5)
    passes = [route(GSHARD, logits, tokens_of(300)).topk_ids_TK for _ in range(2)]
    assert torch.equal(*passes)
    assert torch.equal(passes[0], logits.topk(2).indices)


@pytest.mark.parametrize("low", [-200.0, -1e30, NEVER])
def test_gshard_takes_two_experts_wherever_one_wins_all(low: float) -> None:
    for first in range(3):
        logits = torch.full((50, 3), low)
        logits[:, first] = 0.0
        routing = route(MoEConfig(3, router="gshard"), logits, tokens_of(50, training=True))
        assert bool((routing.topk_ids_TK[:, 0] == first).all())
        assert bool((routing.topk_ids_TK[:, 1] != first).all())
        assert_close(routing.topk_scores_TK, torch.tensor([[1.0, 0.0]]).expand(50, 2))


def test_noise_has_the_learned_spread() -> None:
    spread = torch.tensor([0.2, 0.6931, 1.5, 3.0])
    router = with_spread(noisy(4, 4), spread)
    x, logits = torch.ones(DRAWS, 4), torch.tensor([1.0, -2.0, 0.0, 3.0])
    routing = router.choose(x, logits.expand(DRAWS, 4), tokens_of(DRAWS, training=True))
    assert routing.choice_TE is not None  # H of the paper
    noise = (routing.choice_TE - logits) / spread
    assert_close(noise.mean(0), torch.zeros(4), rtol=0, atol=4.5 / math.sqrt(DRAWS))
    assert_close(noise.std(0), torch.ones(4), rtol=0, atol=4.5 / math.sqrt(2 * DRAWS))
    # Normal: of so many draws these shares are within one, two and three standard deviations.
    for deviations, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        within = (noise.abs() < deviations).float().mean()
        assert abs(within - share) < 4.5 * math.sqrt(share * (1 - share) / noise.numel())
    assert_close(torch.corrcoef(noise.t()), torch.eye(4), rtol=0, atol=4.5 / math.sqrt(DRAWS))


def test_noise_starts_with_the_softplus_of_0() -> None:
    router = noisy(4, 2)
    assert router.noise_weight.tolist() == [[0.0] * 4] * 4
    logits = torch.zeros(DRAWS, 4)
    routing = router.choose(torch.randn(DRAWS, 4), logits, tokens_of(DRAWS, training=True))
    assert routing.choice_TE is not None
    assert_close(routing.choice_TE.std().item(), math.log(2), rtol=0.02, atol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_selects_and_weighs_by_the_noisy_logits(top_k: int) -> None:
    router, logits = noisy(5, top_k), torch.randn(200, 5)
    routing = on_logits(router, logits, tokens_of(200, training=True))
    assert routing.choice_TE is not None
    best = routing.choice_TE.topk(top_k)
    assert torch.equal(routing.topk_ids_TK, best.indices)
    assert_close(routing.topk_scores_TK, best.values.softmax(-1))
    assert not torch.equal(routing.topk_ids_TK, logits.topk(top_k).indices)


def test_no_noise_at_evaluation() -> None:
    logits = torch.randn(100, 5)
    routing = on_logits(noisy(5, 2), logits)
    assert torch.equal(routing.topk_ids_TK, logits.topk(2).indices)
    assert_close(routing.topk_scores_TK, logits.topk(2).values.softmax(-1))
    assert routing.load_TE is None


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_is_the_chance_under_new_noise_on_one_expert(top_k: int) -> None:
    spread = torch.tensor([0.3, 0.7, 1.0, 2.0, 0.5])
    router = with_spread(noisy(5, top_k), spread)
    routing = router.choose(torch.ones(1, 5), LOGITS[None], tokens_of(1, training=True))
    assert routing.load_TE is not None
    assert routing.choice_TE is not None
    for expert in range(5):
        redrawn = routing.choice_TE.expand(DRAWS, 5).clone()
        redrawn[:, expert] = LOGITS[expert] + spread[expert] * torch.randn(DRAWS)
        share = (redrawn.topk(top_k).indices == expert).any(1).float().mean().item()
        chance = routing.load_TE[0, expert].item()
        assert abs(share - chance) < 4.5 * math.sqrt(max(chance * (1 - chance), 1 / DRAWS) / DRAWS)


def test_load_of_many_tokens_is_the_expected_number() -> None:
    """The sum over a batch, whose noise is drawn once, is close to the mean number of tokens over many passes."""
    router, logits = noisy(5, 2), LOGITS.expand(DRAWS, 5)
    routing = on_logits(router, logits, tokens_of(DRAWS, training=True))
    assert routing.load_TE is not None
    observed = torch.bincount(routing.topk_ids_TK.flatten(), minlength=5) / DRAWS
    assert_close(routing.load_TE.mean(0), observed, rtol=0, atol=0.02)


def test_load_of_all_experts_is_certain() -> None:
    routing = on_logits(noisy(4, 4), torch.randn(10, 4), tokens_of(10, training=True))
    assert routing.load_TE is not None
    assert torch.equal(routing.load_TE, torch.ones(10, 4))


def test_gradient_reaches_both_weights() -> None:
    router = noisy(5, 2, width=7)
    x = torch.randn(30, 7)
    routing = router(x, tokens_of(30, training=True))
    assert routing.load_TE is not None
    for loss in (routing.topk_scores_TK.square().sum(), load_loss(routing.load_TE)):
        router.zero_grad()
        loss.backward(retain_graph=True)
        for weight in (router.weight, router.noise_weight):
            assert weight.grad is not None
            assert bool(weight.grad.isfinite().all())
            assert bool((weight.grad.abs().sum(1) > 0).all())


@pytest.mark.parametrize("noise_logit", [-40.0, -80.0, -200.0, 200.0])
def test_noise_that_vanishes_or_explodes_leaves_no_nan(noise_logit: float) -> None:
    router = noisy(4, 2)
    with torch.no_grad():
        router.noise_weight.fill_(noise_logit / 4)
    logits = torch.tensor([[1.0, 0.0, 0.5, 2.0], [1.0, 1.0, 1.0, 1.0]], requires_grad=True)  # ties as well
    routing = router.choose(torch.ones(2, 4), logits, tokens_of(2, training=True))
    assert routing.load_TE is not None
    assert bool(((routing.load_TE >= 0) & (routing.load_TE <= 1)).all())
    (routing.load_TE.square().sum() + routing.topk_scores_TK.square().sum()).backward()
    for value in (logits, router.noise_weight):
        assert value.grad is not None
        assert bool(value.grad.isfinite().all())

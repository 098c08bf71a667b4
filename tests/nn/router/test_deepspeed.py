"""Losses, capacity and kept assignments against DeepSpeed's gating functions.

Where theirs are something else:

- ``_capacity`` multiplies in fp32, ours in float64 (which can tell 66,666,667 rows from their neighbours): a factor
  that is no sum of few powers of two may round to another row where the product is a whole number.
- ``top1gating`` asserts that there are ``min_capacity`` tokens at least; ours leaves the rows empty.
  With ``use_rts=False`` it keeps what ``torch.topk`` finds first among ones, which is no order of tokens that is
  promised; ours keeps the first by position, as many of each expert. With ``use_rts=True`` the kept are drawn, as by
  ``drop_priority="random"``.
- ``top1gating``'s ``used_token`` leaves padding out of f, but divides f and p by all tokens and has padding in p; ours
  is over the tokens that are no padding.
- ``top2gating``'s loss takes f over first choices only; ours over both. Its weights are divided by the sum of those
  that were *kept* (as are ``topkgating``'s), so that a token with one dropped gets the other at full weight; ours stay
  as the router gave them.
- ``top2gating`` and ``topkgating`` multiply the capacity factor by the number of choices, as ours does.
  ``top2gating`` gives room to all first choices before the second ones; ours by ``drop_priority``.
- ``topkgating``'s ``drop_policy="probs"`` compares probabilities that are not divided by their sum: ours with
  ``normalize_topk=False``. ``"position"`` is ``drop_priority="position"``.
- Their loss is over the tokens of one rank, padding included, and 1 when uniform; so is ours, without the padding.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.nn import Routing, expert_capacity, keep_within_capacity, load_balancing_loss
from lightning_moe.nn.placing import place
from tests.nn.router.helpers import chi_square, counts, route, selected, tokens_of

E, T = 6, 120
SHAPES = [(120, 1.0, 4), (120, 1.25, 4), (121, 1.25, 1), (30, 0.5, 1), (30, 0.5, 8), (7, 2.0, 3)]
"""Tokens, capacity factor, lower bound."""


def skewed(num_tokens: int) -> Tensor:
    return 2 * torch.randn(num_tokens, E) + 1.5 * torch.randn(E)


def placed(config: MoEConfig, logits_TE: Tensor) -> tuple[Routing, Routing]:
    """The router's choice, and what a layer in training makes of it."""
    layer = MoE(E, config)
    tokens = tokens_of(len(logits_TE), training=True)
    chosen = route(config, logits_TE, tokens)
    return chosen, place(chosen, tokens, layer.router, layer.dispatcher)[0]


def kept_by(routing: Routing) -> Tensor:
    assert routing.kept_TK is not None
    return selected(routing._replace(assigned_TK=routing.kept_TK))


def weights_by(routing: Routing) -> Tensor:
    return torch.zeros_like(routing.scores_TE).scatter(1, routing.topk_ids_TK, routing.topk_scores_TK)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("num_tokens", [1, 5, 64, 1000, 4097])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_capacity(num_tokens: int, top_k: int, factor: float) -> None:
    from deepspeed.moe.sharded_moe import _capacity

    for num_experts in (1, 3, 8, 64):
        for lowest in (1, 4):
            gates = torch.empty(num_tokens, num_experts)
            theirs = _capacity(gates, torch.tensor(factor * top_k), torch.tensor(lowest))
            assert expert_capacity(num_tokens, num_experts, top_k, factor, lowest) == theirs


def test_capacity_is_computed_in_another_precision() -> None:
    from deepspeed.moe.sharded_moe import _capacity

    gates = torch.empty(1, 3).expand(200_000_000, 3)
    assert expert_capacity(200_000_000, 3, 1, 1.0, 4) == math.ceil(200_000_000 / 3) == 66_666_667
    assert _capacity(gates, torch.tensor(1.0), torch.tensor(4)) == 66_666_668
    # 1.1 is no number of either precision, and 1.1 * 50 = 55 in one of them.
    assert expert_capacity(50, 1, 1, 1.1, 1) - _capacity(torch.empty(50, 1), torch.tensor(1.1), torch.tensor(1)) in (
        0,
        1,
    )


@pytest.mark.parametrize(("num_tokens", "factor", "lowest"), SHAPES)
def test_top1(num_tokens: int, factor: float, lowest: int) -> None:
    from deepspeed.moe.sharded_moe import top1gating

    logits = skewed(num_tokens)
    loss, weights, mask, exp_counts = top1gating(logits, factor, lowest, use_rts=False)
    config = MoEConfig(
        E, top_k=1, router="switch", capacity_factor=factor, min_capacity=lowest, drop_priority="position", jitter=0.0
    )
    chosen, routing = placed(config, logits)
    assert_close(load_balancing_loss(chosen.scores_TE, chosen.topk_ids_TK), loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts(chosen), exp_counts)
    assert mask.shape[2] == expert_capacity(num_tokens, E, 1, factor, lowest)
    theirs = mask.any(2)
    # As many of every expert; which ones, torch.topk among ones does not say.
    assert torch.equal(kept_by(routing).sum(0), theirs.sum(0))
    # Of those that both keep the weights are the same.
    both = kept_by(routing) & theirs
    assert bool(both.any())
    assert_close(weights_by(routing)[both], weights.sum(2)[both], rtol=1e-6, atol=1e-6)


def test_top1_with_room_for_all_keeps_all() -> None:
    from deepspeed.moe.sharded_moe import top1gating

    logits = skewed(T)
    _, weights, mask, _ = top1gating(logits, float(E), 1, use_rts=False)
    config = MoEConfig(E, top_k=1, router="switch", capacity_factor=E, drop_priority="position", jitter=0.0)
    _, routing = placed(config, logits)
    assert torch.equal(kept_by(routing), mask.any(2))
    assert_close(weights_by(routing), weights.sum(2), rtol=1e-6, atol=1e-6)


def test_top1_counts_padding_in_the_loss() -> None:
    from deepspeed.moe.sharded_moe import top1gating

    logits, valid = skewed(T), torch.rand(T) < 0.6
    loss, *_ = top1gating(logits, 1.0, 4, used_token=valid.long(), use_rts=False)
    chosen = route(MoEConfig(E, top_k=1, router="switch"), logits, tokens_of(T, valid=valid))
    f = counts(chosen) / T  # of all tokens, and p of all as well
    assert_close(E * (f * chosen.scores_TE.mean(0)).sum(), loss, rtol=1e-6, atol=1e-6)
    ours = load_balancing_loss(chosen.scores_TE, chosen.topk_ids_TK, chosen.assigned_TK, valid)
    alone, *_ = top1gating(logits[valid], 1.0, 4, use_rts=False)
    assert_close(ours, alone, rtol=1e-6, atol=1e-6)
    assert abs(ours - loss) > 0.1


@pytest.mark.parametrize(("num_tokens", "factor", "lowest"), SHAPES)
def test_top2(num_tokens: int, factor: float, lowest: int) -> None:
    """Against ``gshard`` at evaluation, where neither draws."""
    from deepspeed.moe.sharded_moe import top2gating

    logits = skewed(num_tokens)
    loss, weights, mask, exp_counts = top2gating(logits.clone(), factor, lowest, top2_2nd_expert_sampling=False)
    chosen = route(MoEConfig(E, router="gshard"), logits)
    assert torch.equal(counts(chosen), exp_counts)
    assert_close(load_balancing_loss(chosen.scores_TE, chosen.topk_ids_TK[:, :1]), loss, rtol=1e-6, atol=1e-6)
    capacity = expert_capacity(num_tokens, E, 2, factor, lowest)
    assert mask.shape[2] == capacity
    # All first choices in the order of the tokens, then all second ones.
    order = torch.stack([torch.arange(num_tokens), num_tokens + torch.arange(num_tokens)], dim=1)
    kept = keep_within_capacity(chosen.topk_ids_TK, -order, E, capacity)
    theirs = mask.any(2)
    assert torch.equal(kept_by(chosen._replace(kept_TK=kept)), theirs)
    whole = kept.all(1)
    assert_close(weights_by(chosen)[whole], weights.sum(2)[whole], rtol=1e-6, atol=1e-6)
    # Where one of the two was dropped the other gets everything.
    half = kept.any(1) & ~whole
    assert_close(weights.sum((1, 2))[half], torch.ones(int(half.sum())), rtol=1e-6, atol=1e-6)


def test_top2_draws_the_second_from_the_same_distribution() -> None:
    """Both against the scores of the others, divided by their sum."""
    from deepspeed.moe.sharded_moe import top2gating

    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -1.0]]).expand(2000, E)
    expected = 2000 * logits[0, 1:].softmax(0)
    *_, exp_counts = top2gating(logits.clone(), 1.0, 4, drop_tokens=False)
    ours = counts(route(MoEConfig(E, router="gshard"), logits, tokens_of(2000, training=True)))
    for observed in (exp_counts, ours):
        assert observed[0] == 2000
        statistic, bound = chi_square(observed[1:], expected)
        assert statistic < bound


@pytest.mark.parametrize(("num_tokens", "factor", "lowest"), SHAPES)
@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_topk(top_k: int, policy: str, num_tokens: int, factor: float, lowest: int) -> None:
    from deepspeed.moe.sharded_moe import topkgating

    logits = skewed(num_tokens)
    loss, weights, mask, exp_counts = topkgating(logits, top_k, factor, lowest, drop_policy=policy)
    priority: Any = {"probs": "score", "position": "position"}[policy]
    config = MoEConfig(
        E,
        top_k=top_k,
        normalize_topk=False,
        capacity_factor=factor,
        min_capacity=lowest,
        drop_priority=priority,
    )
    chosen, routing = placed(config, logits)
    assert_close(load_balancing_loss(chosen.scores_TE, chosen.topk_ids_TK), loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts(chosen), exp_counts)
    assert mask.shape[2] == expert_capacity(num_tokens, E, top_k, factor, lowest)
    kept = kept_by(routing)
    assert torch.equal(kept, mask.any(2))
    # Theirs are divided by the sum of those that were kept.
    ours = weights_by(routing) * kept
    assert_close(ours / ours.sum(1, keepdim=True).clamp(min=1e-20), weights.sum(2), rtol=1e-6, atol=1e-6)


def test_topk_compares_probabilities_that_are_not_divided_by_their_sum() -> None:
    from deepspeed.moe.sharded_moe import topkgating

    logits = skewed(T)
    *_, mask, _ = topkgating(logits, 2, 0.5, 1)
    settings: dict[str, Any] = {"capacity_factor": 0.5, "min_capacity": 1}
    divided = placed(MoEConfig(E, top_k=2, **settings), logits)[1]
    as_they_are = placed(MoEConfig(E, top_k=2, normalize_topk=False, **settings), logits)[1]
    assert torch.equal(kept_by(as_they_are), mask.any(2))
    assert not torch.equal(kept_by(divided), mask.any(2))
    assert torch.equal(kept_by(divided).sum(0), mask.any(2).sum(0))

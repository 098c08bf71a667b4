"""Experts that choose their tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_moe import MoEConfig
from lightning_moe.nn.router import make_router
from tests.nn.router.helpers import NEVER, counts, route, selected, tokens_of


def config_of(factor: float, num_experts: int = 8, eval_factor: float | None = None) -> MoEConfig:
    return MoEConfig(num_experts, router="expert_choice", capacity_factor=factor, eval_capacity_factor=eval_factor)


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.25, 2.0, 8.0])
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 100])
def test_every_expert_takes_as_many(num_tokens: int, factor: float) -> None:
    routing = route(config_of(factor), 5 * torch.randn(num_tokens, 8), tokens_of(num_tokens, training=True))
    capacity = min(num_tokens, max(1, math.ceil(factor * num_tokens / 8)))
    assert counts(routing).tolist() == [capacity] * 8


def test_no_expert_takes_more_tokens_than_there_are() -> None:
    assert counts(route(config_of(100.0), torch.randn(5, 8), tokens_of(5, training=True))).tolist() == [5] * 8
    assert counts(route(config_of(2.0), torch.randn(0, 8), tokens_of(0, training=True))).tolist() == [0] * 8


def test_takes_those_that_score_highest() -> None:
    logits = 3 * torch.randn(60, 8)
    routing = route(config_of(2.0), logits, tokens_of(60, training=True))
    chosen, scores = selected(routing), logits.double().softmax(-1)
    for expert in range(8):
        taken = chosen[:, expert]
        assert scores[taken, expert].min() > scores[~taken, expert].max()


def test_equal_tokens_are_taken_from_the_first_on() -> None:
    chosen = selected(route(config_of(2.0), torch.zeros(20, 8), tokens_of(20, training=True)))
    assert chosen.tolist() == [[t < 5] * 8 for t in range(20)]


@pytest.mark.parametrize("shift", [100.0, 200.0, 1000.0])
def test_scores_that_underflow_are_told_apart(shift: float) -> None:
    """One expert is everybody's best: the others still take those that want them most."""
    logits = torch.randn(60, 4)
    logits[:, 2] += shift
    chosen = selected(route(config_of(1.0, 4), logits, tokens_of(60, training=True)))
    scores = logits.double().log_softmax(-1)
    for expert in (0, 1, 3):
        taken = chosen[:, expert]
        assert scores[taken, expert].min() > scores[~taken, expert].max()
    # Its own scores are all 1, even in float64.
    assert chosen[:, 2].tolist() == [t < 15 for t in range(60)]


def test_places_of_a_token() -> None:
    """Those that took it come first, the best of them at the front; then the others, which are no assignments."""
    logits = 2 * torch.randn(40, 8)
    routing = route(config_of(1.25), logits, tokens_of(40, training=True))
    assert routing.assigned_TK is not None
    assert routing.topk_ids_TK.sort(-1).values.tolist() == [list(range(8))] * 40
    number_T = routing.assigned_TK.sum(1)
    assert torch.equal(routing.assigned_TK, torch.arange(8) < number_T.unsqueeze(1))
    assert 0 in number_T
    assert number_T.max() > 1
    for scores, number in zip(routing.topk_scores_TK.tolist(), number_T.tolist(), strict=True):
        assert scores[:number] == sorted(scores[:number], reverse=True)


def test_weights_are_scores_over_the_experts() -> None:
    logits = 2 * torch.randn(40, 8)
    routing = route(config_of(2.0), logits, tokens_of(40, training=True))
    assert_close(routing.topk_scores_TK, logits.softmax(-1).gather(1, routing.topk_ids_TK), rtol=1e-6, atol=1e-6)


def test_evaluation_has_a_factor_of_its_own() -> None:
    logits = torch.randn(40, 8)
    for eval_factor, expected in ((None, 10), (1.0, 5), (4.0, 20)):
        config = config_of(2.0, eval_factor=eval_factor)
        assert counts(route(config, logits, tokens_of(40))).tolist() == [expected] * 8
        assert counts(route(config, logits, tokens_of(40, training=True))).tolist() == [10] * 8


def test_padding_is_not_chosen_and_takes_no_room() -> None:
    logits, valid = torch.randn(40, 8), torch.rand(40) < 0.5
    logits[~valid, 3] = 50.0
    routing = route(config_of(2.0), logits, tokens_of(40, training=True, valid=valid))
    alone = route(config_of(2.0), logits[valid], tokens_of(int(valid.sum()), training=True))
    assert not selected(routing)[~valid].any()
    assert torch.equal(selected(routing)[valid], selected(alone))
    nothing = tokens_of(40, training=True, valid=torch.zeros(40, dtype=torch.bool))
    assert not selected(route(config_of(2.0), logits, nothing)).any()


def test_an_expert_out_of_reach_takes_its_tokens_with_weight_0() -> None:
    logits = torch.randn(16, 4)
    logits[:, 1] = NEVER
    routing = route(config_of(1.0, 4), logits, tokens_of(16, training=True))
    assert counts(routing).tolist() == [4] * 4
    assert bool((routing.topk_scores_TK[routing.topk_ids_TK == 1] == 0).all())


def test_says_what_it_is() -> None:
    router = make_router(8, config_of(2.0))
    assert (router.balances_itself, router.looks_ahead, router.fits_capacity) == (True, True, True)

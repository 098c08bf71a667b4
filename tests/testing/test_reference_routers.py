"""The plain-loop routers against small examples worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
import torch

from lightning_moe import MoEConfig
from lightning_moe.nn.tokens import Tokens
from lightning_moe.testing.routers import ReferenceRoutes, log_plan, reference_routes
from tests.testing.test_reference import LN2, LN3, LN7, check

# --- routers, on logits whose scores are simple fractions -------------------------------------------------------------


def routes(logits: list[list[float]], valid: list[bool] | None = None, training: bool = False, **config: Any) -> Any:
    """Of a batch that is one sequence; compared with :func:`same`."""
    logits_TE = torch.tensor(logits, dtype=torch.float64)
    shape = torch.Size([1, len(logits)])
    mask = None if valid is None else torch.tensor([valid])
    batch = Tokens(shape, mask, torch.arange(len(logits))[None], training=training)
    bias, noise = config.pop("bias", None), config.pop("noise", None)
    return reference_routes(
        MoEConfig(len(logits[0]), **config),
        logits_TE,
        batch,
        bias_E=None if bias is None else torch.tensor(bias),
        noise_logits_TE=None if noise is None else torch.tensor(noise, dtype=torch.float64),
    )


def same(routed: ReferenceRoutes, expected: list[list[tuple[int, float]]]) -> None:
    assert [[expert for expert, _ in route] for route in routed.routes] == [
        [expert for expert, _ in route] for route in expected
    ]
    for route, by_hand in zip(routed.routes, expected, strict=True):
        assert [weight.item() for _, weight in route] == pytest.approx([weight for _, weight in by_hand], rel=1e-6)


def test_scores_before_and_after_the_selection() -> None:
    logits = [[LN3, 0.0, LN2]]  # softmax (3, 1, 2) / 6; sigmoid (3/4, 1/2, 2/3)
    same(routes(logits), [[(0, 3 / 5), (2, 2 / 5)]])
    same(routes(logits, normalize_topk=False, route_scale=6.0), [[(0, 3.0), (2, 2.0)]])
    same(routes(logits, normalize_topk=False, score_before_topk=False), [[(0, 3 / 5), (2, 2 / 5)]])
    sigmoid = routes(logits, normalize_topk=False, score_function="sigmoid")
    same(sigmoid, [[(0, 3 / 4), (2, 2 / 3)]])
    check(sigmoid.probabilities_TE, [[9 / 23, 6 / 23, 8 / 23]])
    same(routes(logits, score_function="sigmoid"), [[(0, 9 / 17), (2, 8 / 17)]])


def test_bias_moves_the_selection_and_no_weight() -> None:
    logits = [[LN3, 0.0, LN2]]
    biased = routes(logits, expert_bias=True, bias=[0.0, 0.2, 0.0], normalize_topk=False)  # 3/6, 1/6 + 1/5, 2/6
    same(biased, [[(0, 3 / 6), (1, 1 / 6)]])
    assert biased.preferences == [[0, 1, 2]]
    by_logit = {"expert_bias": True, "score_before_topk": False}
    same(routes(logits, **by_logit, bias=[0.0, 0.2, 0.0]), [[(0, 3 / 5), (2, 2 / 5)]])  # 0.2 < ln 2
    same(routes(logits, **by_logit, bias=[0.0, 2.0, 0.0]), [[(1, 1 / 4), (0, 3 / 4)]])


def test_group_limited() -> None:
    config = {"router": "group_limited", "num_groups": 2, "topk_groups": 1}
    # Scores 7/8, 1/4 | 3/4, 1/2: the second group is worth 10/8, the first, with the best expert, 9/8.
    logits = [[LN7, -LN3, LN3, 0.0]]
    second = routes(logits, **config)
    same(second, [[(2, 3 / 5), (3, 2 / 5)]])
    assert second.preferences == [[0, 2, 3, 1]]  # what is out of reach at first is not so for next_expert
    same(routes(logits, **config, bias=[0.0, 0.25, 0.0, 0.0]), [[(0, 7 / 9), (1, 2 / 9)]])  # 11/8 against 10/8
    same(routes([[0.0, LN3, LN3, 0.0]], **config), [[(1, 3 / 5), (0, 2 / 5)]])  # equal: the lower group
    alone = {**config, "num_groups": 4, "topk_groups": 2}  # groups of one expert
    same(routes(logits, **alone), [[(0, 7 / 13), (2, 6 / 13)]])
    # By three in a group: 1/2 + 1/2 + 1/2 loses to 3/4 + 3/8, because only two count.
    odds = math.log(3 / 5)  # a score of 3/8
    triples = [[0.0, 0.0, 0.0, LN3, odds, -LN7]]
    same(routes(triples, **config), [[(3, 2 / 3), (4, 1 / 3)]])


def test_switch() -> None:
    same(routes([[LN3, 0.0], [0.0, 0.0]], router="switch", top_k=1), [[(0, 3 / 4)], [(0, 1 / 2)]])


def test_gshard_at_evaluation_takes_the_two_best() -> None:
    same(routes([[LN3, 0.0, LN2]], router="gshard"), [[(0, 3 / 5), (2, 2 / 5)]])


def test_gshard_draws_the_second_by_its_probability() -> None:
    torch.manual_seed(0)
    drawn = routes([[0.0, LN3, LN2]] * 2000, training=True, router="gshard").routes  # 1 to 2 among the others
    assert {route[0][0] for route in drawn} == {1}
    for route in drawn:
        expected = [3 / 4, 1 / 4] if route[1][0] == 0 else [3 / 5, 2 / 5]
        assert [weight.item() for _, weight in route] == pytest.approx(expected)
    assert sum(route[1][0] == 2 for route in drawn) / 2000 == pytest.approx(2 / 3, abs=0.04)


def test_noisy_topk() -> None:
    one = math.log(math.e - 1)  # softplus(one) = 1
    logits, noise = [[LN3, 0.0, LN2]], [[one, one, one]]
    still = routes(logits, router="noisy_topk", noise=noise)
    same(still, [[(0, 3 / 5), (2, 2 / 5)]])
    phi = NormalDist().cdf
    assert still.load_TE is not None  # against the second highest of the others: 0, ln 2, 0
    check(still.load_TE, [[phi(LN3), phi(-LN2), phi(LN2)]])
    all_of_them = routes(logits, router="noisy_topk", top_k=3, noise=noise)
    assert all_of_them.load_TE is not None
    check(all_of_them.load_TE, [[1.0, 1.0, 1.0]])

    torch.manual_seed(0)
    many = routes([[0.5, 0.0]] * 2000, training=True, router="noisy_topk", top_k=1, noise=[[one, one]] * 2000)
    # logit + noise of one against the other: a difference with the standard deviation sqrt(2)
    assert sum(route[0][0] == 0 for route in many.routes) / 2000 == pytest.approx(phi(0.5 / math.sqrt(2)), abs=0.04)
    assert many.load_TE is not None
    for (chosen, _), load in zip((route[0] for route in many.routes), many.load_TE[:5], strict=False):
        assert load[chosen] != load[1 - chosen]
    assert many.load_TE[:, 0].mean().item() == pytest.approx(phi(0.5 / math.sqrt(2)), abs=0.04)


def test_sinkhorn_is_even_in_training_alone() -> None:
    logits = [[2.0, 0.0], [1.0, 0.0]]
    config = {"router": "sinkhorn", "top_k": 1, "normalize_topk": False}
    first, second = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    same(routes(logits, **config), [[(0, first)], [(0, second)]])
    torch.manual_seed(0)
    even = routes(logits, training=True, **config)
    same(even, [[(0, first)], [(1, 1 - second)]])  # the second token minds less
    padded = routes([*logits, [0.0, 9.0]], [True, True, False], training=True, **config)
    same(padded, [[(0, first)], [(1, 1 - second)], []])


def test_plan_of_two_by_two() -> None:
    """Scaling keeps p00 p11 / (p01 p10) = exp(2 + 0 - 0 - 1), with even sums (p / (1 - p))^2 = e."""
    config = MoEConfig(2, router="sinkhorn", sinkhorn_tolerance=1e-12, sinkhorn_iterations=1000)
    p = 1 / (1 + math.exp(-0.5))
    plan = log_plan(config, [[2.0, 0.0], [1.0, 0.0]])
    assert [math.exp(x) for row in plan for x in row] == pytest.approx([p, 1 - p, 1 - p, p])
    once = log_plan(replace(config, sinkhorn_iterations=1), [[2.0, 0.0], [1.0, 0.0]])
    assert [sum(map(math.exp, row)) for row in once] == pytest.approx([1, 1])  # rows come last
    assert sum(math.exp(row[0]) for row in once) != pytest.approx(1, abs=1e-3)
    rows_alone = log_plan(replace(config, sinkhorn_tolerance=9.0), [[2.0, 0.0], [1.0, 0.0]])  # good enough at once
    assert [math.exp(row[1]) for row in rows_alone] == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.e)])


def test_plan_without_a_way_to_an_expert() -> None:
    plan = log_plan(MoEConfig(2, router="sinkhorn"), [[0.0, -math.inf], [0.0, -math.inf]])
    assert [row[1] for row in plan] == [-math.inf] * 2
    assert all(math.isfinite(row[0]) for row in plan)


def test_expert_choice() -> None:
    logits = [[LN3, 0.0], [LN7, 0.0], [0.0, LN3], [0.0, 0.0]]  # scores at expert 0: 3/4, 7/8, 1/4, 1/2
    config = {"router": "expert_choice", "capacity_factor": 1.5}
    # Three tokens each: expert 0 takes 1, 0, 3; expert 1 takes 2, 3, 0.
    expected = [[(0, 3 / 4), (1, 1 / 4)], [(0, 7 / 8)], [(1, 3 / 4)], [(0, 1 / 2), (1, 1 / 2)]]
    same(routes(logits, **config), expected)
    # One token each: 1 and 2.
    few = [[], [(0, 7 / 8)], [(1, 3 / 4)], []]
    same(routes(logits, **config, eval_capacity_factor=0.5), few)
    same(routes(logits, **config, eval_capacity_factor=0.5, training=True), expected)
    # Of two tokens ceil(1 * 2 / 2) = 1 each.
    padded = [False, False, True, True]
    same(routes(logits, padded, **config, eval_capacity_factor=1.0), [[], [], [(1, 3 / 4)], [(0, 1 / 2)]])
    all_valid = [[], [], [(1, 3 / 4), (0, 1 / 4)], [(0, 1 / 2), (1, 1 / 2)]]  # there are no more than these two
    same(routes(logits, padded, **config, eval_capacity_factor=9.0), all_valid)
    same(routes([[0.0, 0.0]] * 3, **config, eval_capacity_factor=0.1), [[(0, 0.5), (1, 0.5)], [], []])  # earlier token


@pytest.mark.parametrize("router", ["hash", "random"])
def test_experts_by_lot(router: str) -> None:
    torch.manual_seed(0)
    drawn = routes([[0.0] * 4] * 400, training=True, router=router, top_k=3)
    assert all(len(set(row)) == 3 for row in drawn.selected)
    assert all(weight.item() == pytest.approx(1 / 3) for route in drawn.routes for _, weight in route)
    first = [row[0] for row in drawn.selected]
    assert all(60 < first.count(expert) < 140 for expert in range(4))
    again = routes([[0.0] * 4] * 400, training=True, router=router, top_k=3)
    assert (again.selected == drawn.selected) == (router == "hash")  # ids stay, lots do not
    check(drawn.probabilities_TE[0], [0.25] * 4)


def test_missing_inputs_are_refused() -> None:
    logits = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="noise_logits_TE=None"):
        reference_routes(MoEConfig(2, router="noisy_topk"), logits)
    with pytest.raises(ValueError, match="token_ids=None"):
        reference_routes(MoEConfig(2, router="hash"), logits)
    with pytest.raises(ValueError, match="router='mine'"):
        reference_routes(MoEConfig(2, router="mine"), logits)

"""The reference layer itself, against numbers that are worked out here by hand."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import replace
from statistics import NormalDist
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.nn.tap import LossWeights, RoutingStats
from lightning_moe.nn.tokens import Tokens
from lightning_moe.parallel import ExpertGroups
from lightning_moe.testing.reference import ReferenceMoE, keep_best, move_homeless, reference_of
from lightning_moe.testing.routers import ReferenceRoutes, log_plan, reference_routes

LN3, LN7 = math.log(3), math.log(7)


def make(num_shares: int = 1, **config: Any) -> ReferenceMoE:
    """Two experts of width 1 on two features; the router's logits are the token itself.

    Expert 0 is ``relu(a + b) * (1, 2)``, expert 1 is ``relu(2 a + b) * (3, 0)`` for a token (a, b).
    """
    config = {"activation": "relu", "intermediate_size": 1, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # top_k=1 normalized
        layer = MoE(2, MoEConfig(2, **config))
    with torch.no_grad():
        cast(Tensor, layer.router.weight).copy_(torch.eye(2))
        if config["activation"] != "swiglu":
            layer.experts.w1.copy_(torch.tensor([[[1.0, 1.0]], [[2.0, 1.0]]]))
        layer.experts.w2.copy_(torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]]))
    return ReferenceMoE(layer, num_shares)


def tokens(*rows: tuple[float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def check(actual: Tensor, expected: list[Any]) -> None:
    assert actual.dtype == torch.float64
    assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


# softmax(ln 3, 0) = (3/4, 1/4); softmax(0, -ln 3) too; softmax(0, ln 3) = (1/4, 3/4); softmax(ln 7, 0) = (7/8, 1/8)
THREE = tokens((LN3, 0.0), (0.0, -LN3), (0.0, LN3))


def test_top_2() -> None:
    # 3/4 (ln 3, 2 ln 3) + 1/4 (6 ln 3, 0);  relu cuts both;  1/4 (ln 3, 2 ln 3) + 3/4 (3 ln 3, 0)
    expected = [[2.25 * LN3, 1.5 * LN3], [0.0, 0.0], [2.5 * LN3, 0.5 * LN3]]
    check(make()(THREE[None])[0], expected)
    check(make(normalize_topk=False)(THREE[None])[0], expected)  # both experts are selected anyway


@pytest.mark.parametrize("normalize", [True, False])
def test_top_1(normalize: bool) -> None:
    score = 1.0 if normalize else 0.75
    y = make(top_k=1, normalize_topk=normalize)(THREE[None])[0]
    check(y, [[score * LN3, score * 2 * LN3], [0.0, 0.0], [score * 3 * LN3, 0.0]])


def test_losses_and_counts() -> None:
    reference = make(top_k=1)
    reference(THREE[None])
    assert reference.tokens_per_expert_E.tolist() == [2, 1]
    assert reference.num_dropped == 0
    # f = (2/3, 1/3), p = (7/12, 5/12): 2 (14/36 + 5/36) = 19/18
    check(reference.losses["load_balancing"], 19 / 18)  # type: ignore[arg-type]
    # The sums of exponentials are 4, 1 + 1/3 and 4.
    check(reference.losses["router_z"], (2 * math.log(4) ** 2 + math.log(4 / 3) ** 2) / 3)  # type: ignore[arg-type]


def test_ties_choose_the_lower_id() -> None:
    reference = make(top_k=1)
    check(reference(tokens((1.0, 1.0))[None])[0], [[2.0, 4.0]])
    assert reference.tokens_per_expert_E.tolist() == [1, 0]


def test_capacity_drops_the_lowest_score() -> None:
    reference = make(top_k=1, normalize_topk=False, capacity_factor=0.5, min_capacity=1)
    # Capacity ceil(0.5 * 3 * 1 / 2) = 1; expert 0 is asked with 3/4 and 7/8.
    x = tokens((LN3, 0.0), (LN7, 0.0), (0.0, LN3))[None]
    kept = [[0.875 * LN7, 1.75 * LN7], [2.25 * LN3, 0.0]]
    check(reference(x)[0], [[0.0, 0.0], *kept])
    assert reference.num_dropped == 1
    assert reference.tokens_per_expert_E.tolist() == [2, 1]  # before any is dropped
    check(reference.eval()(x)[0], [[0.75 * LN3, 1.5 * LN3], *kept])  # eval_capacity_factor is another
    assert reference.num_dropped == 0


def test_capacity_ties_keep_token_order() -> None:
    reference = make(top_k=1, capacity_factor=0.5, min_capacity=1)
    check(reference(tokens((LN7, 0.0), (LN3, 0.0))[None])[0], [[LN7, 2 * LN7], [0.0, 0.0]])


def test_shares_are_ranks() -> None:
    """Two shares of one token each: a capacity and losses of their own."""
    reference = make(2, top_k=1, normalize_topk=False, capacity_factor=0.5, min_capacity=1)
    x = tokens((LN3, 0.0), (LN7, 0.0)).view(2, 1, 2)
    check(reference(x).view(2, 2), [[0.75 * LN3, 1.5 * LN3], [0.875 * LN7, 1.75 * LN7]])
    assert reference.num_dropped == 0
    assert reference.tokens_per_expert_E.tolist() == [2, 0]
    # f = (1, 0) in both: 2 * 3/4 and 2 * 7/8
    check(reference.losses["load_balancing"], (1.5 + 1.75) / 2)  # type: ignore[arg-type]
    check(reference.losses["router_z"], (math.log(4) ** 2 + math.log(8) ** 2) / 2)  # type: ignore[arg-type]


def test_swiglu() -> None:
    reference = make(activation="swiglu", top_k=1)
    with torch.no_grad():  # the gate is the first feature, up is the second, for both experts
        cast(Tensor, reference.experts.w1).copy_(torch.eye(2).expand(2, 2, 2))
    # sigmoid(ln 3) = 3/4: silu(ln 3) * 1/2 = 3/8 ln 3 at expert 0
    check(reference(tokens((LN3, 0.5))[None])[0], [[0.375 * LN3, 0.75 * LN3]])


def test_gelu() -> None:
    # Expert 0 gets 1 + 0: gelu(1) is the normal distribution's 0.8413447460685429.
    check(make(activation="gelu", top_k=1)(tokens((1.0, 0.0))[None])[0], [[0.8413447460685429, 1.6826894921370859]])


def test_shared_mlp() -> None:
    reference = make(top_k=1, num_shared_experts=2)
    assert reference.shared_mlp is not None
    with torch.no_grad():
        reference.shared_mlp.up.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        reference.shared_mlp.down.weight.copy_(torch.tensor([[10.0, 0.0], [0.0, 100.0]]))
    # Expert 0: (1.5, 3); the shared one: (10, 50)
    check(reference(tokens((1.0, 0.5))[None])[0], [[11.5, 53.0]])


def test_gradient_of_a_weight_by_hand() -> None:
    reference = make(top_k=1, normalize_topk=False)
    reference(tokens((LN3, 0.0))[None]).sum().backward()
    # y0 + y1 = 3 p ln 3 with p = 3/4: by w2 of expert 0 it is p ln 3, by the logits (1, -1) * 3 ln 3 * p (1 - p).
    w2 = cast(Tensor, reference.experts.w2)
    assert w2.grad is not None
    check(w2.grad, [[[0.75 * LN3], [0.75 * LN3]], [[0.0], [0.0]]])
    slope = 3 * LN3 * 0.75 * 0.25
    grad = cast(Tensor, reference.router.weight).grad
    assert grad is not None
    check(grad, [[slope * LN3, 0.0], [-slope * LN3, 0.0]])


def test_a_model_gets_references_for_its_layers() -> None:
    torch.manual_seed(0)
    config = MoEConfig(4, intermediate_size=4)
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"moe": MoE(8, config)}), nn.Linear(8, 8))
    model.append(MoE(8, config))
    twin = reference_of(model, num_shares=3)
    assert isinstance(model[3], MoE)
    replaced = {name: m for name, m in twin.named_modules() if isinstance(m, ReferenceMoE)}
    assert replaced.keys() == {"1.moe", "3"}
    assert {m.num_shares for m in replaced.values()} == {3}
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert twin.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value.double()), name
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert next(model.parameters()).any()


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


LN2 = math.log(2)


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


# --- overflow ---------------------------------------------------------------------------------------------------------


def test_homeless_assignments_move_in_rounds() -> None:
    """Expert 0 keeps token 0; 1 and 2 both ask expert 1, which takes 1; token 2 finds the last room."""
    ids, priority = [[0], [0], [0]], [[0.9], [0.8], [0.7]]
    kept = keep_best(ids, priority, 1)
    assert kept == [[True], [False], [False]]
    move_homeless(ids, kept, priority, 1, [[0, 1, 2]] * 3)
    assert ids == [[0], [1], [2]]
    assert kept == [[True]] * 3


def test_a_token_asks_for_all_its_homeless_assignments_at_once() -> None:
    ids = [[0, 1], [1, 0], [0, 2]]
    priority = [[0.9, 0.8], [0.7, 0.6], [0.5, 0.4]]
    kept = keep_best(ids, priority, 1)
    # Expert 0 keeps (0, 0), 1 keeps (0, 1), 2 keeps (2, 1); room at 3 and 4.
    assert kept == [[True, True], [False, False], [False, True]]
    # Token 1 wants 4, then 3; token 2 wants 3. 3 takes token 1's second (0.6 before 0.5), and token 2 has nowhere to go.
    move_homeless(ids, kept, priority, 1, [[0, 1, 2, 3, 4], [1, 4, 0, 3, 2], [0, 3, 2, 4, 1]])
    assert ids == [[0, 1], [4, 3], [0, 2]]
    assert kept == [[True, True], [True, True], [False, True]]


def test_next_expert_weighs_anew() -> None:
    reference = make(top_k=1, normalize_topk=False, capacity_factor=0.5, min_capacity=1, overflow="next_expert")
    # One row each. Expert 0 keeps 7/8; 3/4 goes to expert 1 with 1/4 there.
    y = reference(tokens((LN3, 0.0), (LN7, 0.0))[None])[0]
    check(y, [[0.25 * 6 * LN3, 0.0], [0.875 * LN7, 1.75 * LN7]])
    assert (reference.num_rerouted, reference.num_dropped) == (1, 0)
    assert reference.tokens_per_expert_E.tolist() == [2, 0]  # as chosen
    # With a third token there is one assignment too many: the least wanted, (0.6, 0) at expert 0.
    y = reference(tokens((0.6, 0.0), (LN3, 0.0), (LN7, 0.0))[None])[0]
    check(y, [[0.0, 0.0], [0.25 * 6 * LN3, 0.0], [0.875 * LN7, 1.75 * LN7]])
    assert (reference.num_rerouted, reference.num_dropped) == (1, 1)


def test_priority_by_position() -> None:
    config = {"top_k": 1, "normalize_topk": False, "capacity_factor": 0.5, "min_capacity": 1}
    x = tokens((LN3, 0.0), (LN7, 0.0))[None]
    check(make(**config, drop_priority="position")(x)[0], [[0.75 * LN3, 1.5 * LN3], [0.0, 0.0]])
    check(make(**config)(x)[0], [[0.0, 0.0], [0.875 * LN7, 1.75 * LN7]])


def test_random_priority_is_fair_and_differs_between_passes() -> None:
    torch.manual_seed(0)
    reference = make(top_k=1, capacity_factor=0.5, min_capacity=1, drop_priority="random")
    x = tokens((LN3, 0.0), (LN7, 0.0))[None]
    first = sum(bool(reference(x)[0, 0].any()) for _ in range(200))
    assert 70 < first < 130


# --- losses -----------------------------------------------------------------------------------------------------------


def loss(reference: ReferenceMoE, x: Tensor, name: str = "load_balancing", valid: Tensor | None = None) -> float:
    reference(x, valid)
    return reference.losses[name].item()


def test_scopes() -> None:
    # Two sequences of one token, for expert 0 and for expert 1; p = (3/4, 1/4) and (1/4, 3/4)
    both, first = tokens((LN3, 0.0), (0.0, LN3)).view(2, 1, 2), tokens((LN3, 0.0), (LN3, 0.0)).view(2, 1, 2)
    reference = make(top_k=1)
    assert loss(reference, both) == pytest.approx(1.0)
    reference.scope = "sequence"
    assert loss(reference, both) == pytest.approx(1.5)
    assert loss(make(2, top_k=1), both) == pytest.approx(1.5)  # shares are apart as well
    reference = make(2, top_k=1)
    reference.scope = "global_batch"
    assert loss(reference, both) == pytest.approx(1.0)
    assert loss(reference, first) == pytest.approx(1.25)  # f = (3/4, 1/4): 2 (9/16 + 1/16)
    reference.begin_step()
    assert loss(reference, first) == pytest.approx(1.5)
    reference.scope = "epoch"
    with pytest.raises(ValueError, match="scope='epoch'"):
        reference(first)


def test_sequences_of_padding_are_left_out_and_those_without_an_expert_are_not() -> None:
    x, valid = tokens((LN3, 0.0), (0.0, LN3)).view(2, 1, 2), torch.tensor([[True], [False]])
    reference = make(top_k=1)
    reference.scope = "sequence"
    assert loss(reference, x, valid=valid) == pytest.approx(1.5)
    # Both experts choose the last token; the first, whose sequence is valid, has f = 0.
    reference = make(router="expert_choice", capacity_factor=0.5)
    reference.scope = "sequence"
    with torch.no_grad():
        cast(Tensor, reference.router.weight).copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    x = tokens((0.0, 0.0), (0.0, LN3), (0.0, -LN3)).view(3, 1, 2)  # expert 0 takes the second, expert 1 the third
    assert loss(reference, x) == pytest.approx((0 + 1.5 + 1.5) / 3)


def test_importance_and_load() -> None:
    reference = make(top_k=1, normalize_topk=False)
    x = tokens((LN3, 0.0), (0.0, LN3), (LN7, 0.0))[None]
    # Sums (13/8, 6/8): mean 19/16, deviation 7/16
    assert loss(reference, x, "importance") == pytest.approx(49 / 361)
    assert loss(reference, x, "load") == 0
    noisy = make(top_k=1, router="noisy_topk").eval()
    # noise_weight is 0: a standard deviation of ln 2. Loads Phi(ln 3 / ln 2) and the rest.
    load = NormalDist().cdf(LN3 / LN2)
    assert loss(noisy, tokens((LN3, 0.0))[None], "load") == pytest.approx((2 * load - 1) ** 2)


def test_padding_counts_nowhere() -> None:
    config = {"top_k": 1, "normalize_topk": False, "capacity_factor": 0.5, "min_capacity": 1}
    short, long = make(**config), make(**config)
    short(tokens((LN3, 0.0), (0.0, LN3))[None])
    valid = torch.tensor([[False, True, True]])
    y = long(tokens((9.0, 0.0), (LN3, 0.0), (0.0, LN3))[None], valid)[0]
    check(y, [[0.0, 0.0], [0.75 * LN3, 1.5 * LN3], [2.25 * LN3, 0.0]])
    assert long.num_dropped == 0
    assert long.tokens_per_expert_E.tolist() == [1, 1]
    assert {name: value.item() for name, value in long.losses.items()} == {
        name: pytest.approx(value.item()) for name, value in short.losses.items()
    }
    long(tokens((9.0, 0.0))[None], torch.tensor([[False]]))
    assert not any(long.losses.values())


# --- beside the experts -----------------------------------------------------------------------------------------------


def test_shared_expert_gate() -> None:
    reference = make(top_k=1, num_shared_experts=1, shared_expert_gate=True)
    with torch.no_grad():
        reference.shared_mlp.up.weight.copy_(torch.tensor([[1.0, 1.0]]))
        reference.shared_mlp.down.weight.copy_(torch.tensor([[10.0], [100.0]]))
        reference.shared_mlp.gate.weight.copy_(torch.tensor([[1.0, 0.0]]))
    # sigmoid(ln 3) = 3/4 of ln 3 (10, 100), and expert 0; padding goes nowhere
    x, shared = tokens((LN3, 0.0))[None], [7.5 * LN3, 75 * LN3]
    check(reference(x)[0], [[LN3 + shared[0], 2 * LN3 + shared[1]]])
    check(reference(x, torch.tensor([[False]]))[0], [[0.0, 0.0]])


def test_residual() -> None:
    reference = make(top_k=1, residual=True)
    with torch.no_grad():
        reference.residual.mlp.up.weight.copy_(torch.tensor([[1.0, 1.0]]))
        reference.residual.mlp.down.weight.copy_(torch.tensor([[10.0], [100.0]]))
        reference.residual.coefficient.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        reference.residual.coefficient.bias.copy_(torch.tensor([0.0, LN3]))
    # softmax(ln 3, ln 3): half of both; softmax(0, ln 3) = (1/4, 3/4)
    x = tokens((LN3, 0.0), (0.0, 1.0))[None]
    check(reference(x)[0], [[5.5 * LN3, 51 * LN3], [0.25 * 3 + 7.5, 75.0]])


# --- the real layer ---------------------------------------------------------------------------------------------------

ROUTER_CONFIGS: dict[str, dict[str, Any]] = {
    "topk": {"top_k": 2},
    "switch": {"top_k": 1, "jitter": 0.3},
    "gshard": {"top_k": 2},
    "noisy_topk": {"top_k": 2, "jitter": 0.3},
    "sinkhorn": {"top_k": 2},
    "expert_choice": {},
    "group_limited": {"top_k": 2, "num_groups": 3, "topk_groups": 2, "route_scale": 2.5},
    "hash": {"top_k": 2},
    "random": {"top_k": 2},
}
LOSSES = LossWeights(load_balancing=0.3, router_z=0.02, importance=0.2, load=0.1)
D = 5


def real(router: str, **changes: Any) -> MoE:
    torch.manual_seed(1)
    config = {"intermediate_size": 6, "capacity_factor": 1.0, "eval_capacity_factor": 0.9, "min_capacity": 1, **changes}
    moe = MoE(D, MoEConfig(6, router=router, **ROUTER_CONFIGS[router], **config))
    for parameter in moe.router.parameters():
        nn.init.normal_(parameter)  # far apart, so that fp32 and float64 choose the same
    if router == "group_limited":
        cast(Tensor, moe.router.expert_bias).normal_()
    return moe


def against_the_reference(moe: MoE, valid: Tensor | None, scope: str = "micro_batch", ranks: int = 1) -> Counter[str]:
    """Outputs, gradients, losses and counters of two micro-batches of 2 sequences per rank; returns sums of those."""
    counts: Counter[str] = Counter()
    reference = ReferenceMoE(moe, ranks).train(moe.training)
    stats: list[RoutingStats] = []
    moe.tap.observers.append(stats.append)
    moe.tap.loss_weights = LOSSES
    moe.tap.importance = moe.tap.load = True
    moe.tap.scope, reference.scope = cast(Any, scope), scope
    for seed in (2, 3):
        x = torch.randn(2 * ranks, 7, D, requires_grad=True)
        upstream, ids = torch.randn(2 * ranks, 7, D), torch.randint(50, (2 * ranks, 7))
        outputs = []
        for rank in range(ranks):
            part = slice(2 * rank, 2 * rank + 2)
            moe.groups = ExpertGroups(data_size=ranks, data_rank=rank)
            torch.manual_seed(seed)
            y = moe(x[part], None if valid is None else valid[part], ids[part])
            y.backward(upstream[part])
            outputs.append(y.detach())
        state = torch.get_rng_state()

        x64 = x.detach().double().requires_grad_()
        torch.manual_seed(seed)
        y64 = reference(x64, valid, ids)
        assert torch.equal(torch.get_rng_state(), state)
        counts.update(num_dropped=reference.num_dropped, num_rerouted=reference.num_rerouted)
        objective = (y64 * upstream).sum()
        if moe.training:
            objective = objective + sum(w * ranks * reference.losses[name] for name, w in LOSSES._asdict().items())
            seen, stats[:] = stats[-ranks:], []
            for name, value in reference.losses.items():
                by_rank = [getattr(s, f"{name}_loss").double() for s in seen]
                assert_close(sum(by_rank) / ranks, value.detach(), rtol=1e-5, atol=1e-6, msg=name)
            assert sum(s.tokens_per_expert_E for s in seen).tolist() == reference.tokens_per_expert_E.tolist()
            assert sum(int(s.num_dropped) for s in seen) == reference.num_dropped
            assert sum(int(s.num_rerouted) for s in seen) == reference.num_rerouted
        objective.backward()
        assert_close(torch.cat(outputs).double(), y64.detach(), rtol=1e-5, atol=1e-6)
        assert x.grad is not None
        assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)
    expected = dict(reference.named_parameters())
    assert {name for name, _ in moe.named_parameters()} == expected.keys()
    for name, parameter in moe.named_parameters():
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        theirs = torch.zeros_like(expected[name]) if expected[name].grad is None else expected[name].grad
        assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6, msg=f"gradient of {name}")
    return counts


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    ("router", "overflow"),
    [(r, o) for r in ROUTER_CONFIGS for o in ("drop", "next_expert") if (r, o) != ("expert_choice", "next_expert")],
)
def test_the_real_layer_agrees(router: str, overflow: str, training: bool, masked: bool) -> None:
    moe = real(router, overflow=overflow).train(training)
    valid = torch.rand(2, 7) < 0.7 if masked else None
    counts = against_the_reference(moe, valid)
    if router != "expert_choice":  # the capacity is put to the test
        assert counts["num_rerouted" if overflow == "next_expert" else "num_dropped"]


@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
@pytest.mark.parametrize("router", ROUTER_CONFIGS)
def test_the_real_layer_agrees_on_scopes(router: str, scope: str) -> None:
    moe = real(router)
    against_the_reference(moe, torch.rand(2, 7) < 0.7, scope)


@pytest.mark.parametrize("router", ["topk", "switch", "gshard", "noisy_topk", "random"])
def test_shares_draw_as_ranks_do(router: str) -> None:
    moe = real(router, drop_priority="random", overflow="next_expert")
    against_the_reference(moe, torch.rand(6, 7) < 0.8, ranks=3)

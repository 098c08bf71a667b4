"""The reference layer itself, against numbers that are worked out here by hand."""

from __future__ import annotations

import math
import warnings
from statistics import NormalDist
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.testing.reference import ReferenceMoE, keep_best, move_homeless, reference_of

LN2, LN3, LN7 = math.log(2), math.log(3), math.log(7)


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

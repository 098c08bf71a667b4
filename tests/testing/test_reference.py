"""The reference layer itself, against numbers that are worked out here by hand."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.testing.reference import ReferenceMoE, reference_of

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

"""What stands beside the routed experts, against explicit formulas in float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.config import Activation
from lightning_moe.nn import LossWeights, ResidualMLP, SharedMLP

D, F, T = 6, 10, 9
activations = pytest.mark.parametrize("activation", get_args(Activation))


def mlp_by_hand(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    h = x @ up.T
    if activation == "swiglu":
        gate, value = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
        h = gate / (1 + (-gate).exp()) * value
    elif activation == "gelu":
        h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    else:
        h = h.clamp(min=0)
    return h @ down.T


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same_gradients(ours: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Of values and of gradients with respect to all leaves."""
    upstream = drawn(*ours.shape)
    assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    pairs = [torch.autograd.grad(y, leaves, upstream, retain_graph=True) for y in (ours, expected)]
    for a, b in zip(*pairs, strict=True):
        assert float(b.abs().max()) > 1e-6
        assert_close(a, b, rtol=1e-11, atol=1e-12)


@activations
@pytest.mark.parametrize("gated", [True, False])
def test_shared_mlp(activation: Activation, gated: bool) -> None:
    mlp = SharedMLP(D, F, activation, gated).double()
    x = drawn(T, D).requires_grad_()
    expected = mlp_by_hand(x, mlp.up.weight, mlp.down.weight, activation)
    assert (mlp.gate is not None) == gated
    if mlp.gate is not None:
        assert mlp.gate.bias is None
        assert mlp.gate.weight.shape == (1, D)
        expected = expected / (1 + (-(x @ mlp.gate.weight[0])).exp()).unsqueeze(1)
    assert_same_gradients(mlp(x), expected, [x, *mlp.parameters()])


@activations
def test_residual_mlp(activation: Activation) -> None:
    residual = ResidualMLP(D, F, activation).double()
    x, y = drawn(T, D).requires_grad_(), drawn(T, D).requires_grad_()
    exps = (x @ residual.coefficient.weight.T + residual.coefficient.bias).exp()
    share = exps / exps.sum(1, keepdim=True)
    mlp = mlp_by_hand(x, residual.mlp.up.weight, residual.mlp.down.weight, activation)
    expected = share[:, :1] * y + share[:, 1:] * mlp
    assert_same_gradients(residual(x, y), expected, [x, y, *residual.parameters()])


def test_residual_is_deepspeeds() -> None:
    """The last lines of ``deepspeed.moe.layer.MoE.forward`` with ``use_residual``, on its own modules."""
    residual = ResidualMLP(D, F, "relu").double()
    mlp = nn.Sequential(nn.Linear(D, F, bias=False), nn.ReLU(), nn.Linear(F, D, bias=False)).double()
    coefficient = nn.Linear(D, 2).double()
    coefficient.load_state_dict(residual.coefficient.state_dict())
    mlp.load_state_dict({"0.weight": residual.mlp.up.weight, "2.weight": residual.mlp.down.weight})
    x, output = drawn(T, D), drawn(T, D)

    output_mlp = mlp(x)
    coef = functional.softmax(coefficient(x), dim=-1)
    theirs = output * coef[..., 0:1] + output_mlp * coef[..., 1:]
    assert_close(residual(x, output), theirs, rtol=1e-12, atol=1e-12)


def layer(**changes: object) -> MoE:
    torch.manual_seed(2)
    moe = MoE(D, MoEConfig(num_experts=4, intermediate_size=F, router_dtype="float64", **changes))  # type: ignore[arg-type]
    nn.init.normal_(moe.router.weight)
    moe.tap.loss_weights = LossWeights()
    return moe.double()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("number", [1, 3])
def test_shared_experts_are_added_to_the_routed(gated: bool, number: int) -> None:
    moe = layer(num_shared_experts=number, shared_expert_gate=gated)
    x = drawn(T, D).requires_grad_()
    shared = moe.shared_mlp
    assert shared is not None
    assert shared.down.weight.shape == (D, number * F)
    gate = x.new_ones(T, 1) if shared.gate is None else torch.sigmoid(x @ shared.gate.weight.T)
    expected = gate * mlp_by_hand(x, shared.up.weight, shared.down.weight, "swiglu")
    moe.shared_mlp = None
    expected = expected + moe(x)
    moe.shared_mlp = shared
    assert_same_gradients(moe(x), expected, [x, *moe.parameters()])


def test_residual_mixes_with_the_routed() -> None:
    moe = layer(residual=True)
    x = drawn(T, D).requires_grad_()
    residual = moe.residual
    assert residual is not None
    assert residual.mlp.down.weight.shape == (D, F)
    coef = torch.softmax(x @ residual.coefficient.weight.T + residual.coefficient.bias, dim=-1)
    moe.residual = None
    routed = moe(x)
    moe.residual = residual
    mlp = mlp_by_hand(x, residual.mlp.up.weight, residual.mlp.down.weight, "swiglu")
    assert_same_gradients(moe(x), routed * coef[:, :1] + mlp * coef[:, 1:], [x, *moe.parameters()])


def test_what_a_dropped_token_gets() -> None:
    """Dropped by every expert it has the shared expert's output, or the MLP's share of the mixture."""
    x = drawn(T, D)
    tight = {"top_k": 1, "normalize_topk": False, "capacity_factor": 1e-6, "min_capacity": 1}
    bare = layer(**tight)
    dropped = ~bare(x).any(-1)
    assert 0 < int(dropped.sum()) < T
    shared, mixed = layer(**tight, num_shared_experts=1), layer(**tight, residual=True)
    for moe in (shared, mixed):
        moe.router.load_state_dict(bare.router.state_dict())
    assert shared.shared_mlp is not None
    assert mixed.residual is not None
    assert_close(shared(x)[dropped], shared.shared_mlp(x)[dropped], rtol=1e-12, atol=1e-12)
    assert_close(mixed(x)[dropped], mixed.residual(x, torch.zeros_like(x))[dropped], rtol=1e-12, atol=1e-12)


def test_names_in_the_checkpoint() -> None:
    gated = layer(num_shared_experts=1, shared_expert_gate=True).state_dict()
    assert [name for name in gated if "shared" in name] == [f"shared_mlp.{n}.weight" for n in ("up", "down", "gate")]
    mixed = layer(residual=True).state_dict()
    assert [name for name in mixed if "residual" in name] == [
        "residual.mlp.up.weight",
        "residual.mlp.down.weight",
        "residual.coefficient.weight",
        "residual.coefficient.bias",
    ]


def test_initial_weights_of_the_experts_do_not_depend_on_what_stands_beside() -> None:
    plain = layer()
    for changes in ({"num_shared_experts": 2, "shared_expert_gate": True}, {"residual": True}):
        moe = layer(**changes)
        assert torch.equal(moe.experts.w1, plain.experts.w1)
        assert torch.equal(moe.experts.w2, plain.experts.w2)


@pytest.mark.parametrize("changes", [{"residual": True}, {"num_shared_experts": 1, "shared_expert_gate": True}])
def test_bf16(changes: dict[str, object]) -> None:
    half = layer(**changes).bfloat16()
    x = drawn(T, D).bfloat16().requires_grad_()
    y = half(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in half.parameters())
    whole = layer(**changes)
    whole.load_state_dict({name: value.double() for name, value in half.state_dict().items()})
    assert_close(y.double(), whole(x.double()), rtol=2**-5, atol=2**-6)

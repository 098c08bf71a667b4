"""The grouped experts against a plain loop in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.config import Activation
from lightning_moe.dispatch.permute import Permutation, plan_permutation
from lightning_moe.nn import GroupedExperts, SharedMLP
from lightning_moe.nn import experts as experts_module
from lightning_moe.nn.experts import linear_by_expert, run_by_rows
from lightning_moe.parallel import SINGLE_RANK, ExpertGroups

pytestmark = pytest.mark.filterwarnings("ignore:MoE layers are trained with no AuxLossCallback")

ACTIVATIONS = get_args(Activation)
COUNTS = [3, 0, 5, 1]


def make(
    width: int = 8, inner: int = 12, activation: Activation = "swiglu", groups: ExpertGroups = SINGLE_RANK
) -> GroupedExperts:
    torch.manual_seed(7)
    return GroupedExperts(width, inner, len(COUNTS), activation, groups)


def erf_gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))


def looped(x_RD: Tensor, w1_LGD: Tensor, w2_LDF: Tensor, counts: list[int], activation: str) -> Tensor:
    rows, first = [], 0
    for expert, count in enumerate(counts):
        for x_D in x_RD[first : first + count]:
            h = w1_LGD[expert] @ x_D
            if activation == "swiglu":
                gate, up = h[: len(h) // 2], h[len(h) // 2 :]
                h = gate * torch.sigmoid(gate) * up
            else:
                h = erf_gelu(h) if activation == "gelu" else h.clamp(min=0)
            rows.append(w2_LDF[expert] @ h)
        first += count
    return torch.stack(rows)


def plan_of(counts: list[int]) -> Permutation:
    """Every token has one expert, and they come in the order of the experts."""
    return plan_permutation(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).unsqueeze(1), len(counts))


def forward(experts: GroupedExperts, x: Tensor, counts: list[int]) -> Tensor:
    return experts(x, torch.ones(len(x), 1), plan_of(counts))


def by_rows(experts: GroupedExperts, x: Tensor, counts: list[int]) -> Tensor:
    """As on an accelerator."""
    return run_by_rows(x, torch.ones(len(x), 1), plan_of(counts), experts.w1, experts.w2, experts.activation)


runs = pytest.mark.parametrize("run", [forward, by_rows])
Run = Callable[[GroupedExperts, Tensor, list[int]], Tensor]


def forward_and_gradients(run: Run, experts: GroupedExperts, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    experts.zero_grad()
    y = run(experts, x, COUNTS)
    y.backward(upstream)
    grads = [x.grad, experts.w1.grad, experts.w2.grad]
    return [y.detach(), *(grad.clone() for grad in grads if grad is not None)]


# fp32 rows of 6 or 10 numbers are not aligned to 16 bytes: no grouped_mm.
@pytest.mark.parametrize(("width", "inner"), [(8, 12), (6, 12), (8, 10), (5, 7)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@runs
def test_as_by_plain_loops(run: Run, width: int, inner: int, activation: Activation) -> None:
    experts = make(width, inner, activation)
    x, upstream = torch.randn(sum(COUNTS), width), torch.randn(sum(COUNTS), width)
    ours = forward_and_gradients(run, experts, x, upstream)
    x64, w1, w2 = (v.detach().double().requires_grad_() for v in (x, experts.w1, experts.w2))
    y64 = looped(x64, w1, w2, COUNTS, activation)
    y64.backward(upstream.double())
    expected = [y64.detach(), x64.grad, w1.grad, w2.grad]
    assert len(ours) == 4
    for value, by_loop in zip(ours, expected, strict=True):
        assert_close(value.double(), by_loop, rtol=1e-6, atol=1e-6)
    for grad in ours[2:]:  # expert 1 got nothing
        assert not grad[1].any()
        assert all(grad[expert].any() for expert in (0, 2, 3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@runs
def test_float64_as_by_plain_loops(run: Run, activation: Activation) -> None:
    experts = make(activation=activation).double()
    x = torch.randn(sum(COUNTS), 8, dtype=torch.float64)
    y = run(experts, x, COUNTS)
    assert_close(y, looped(x, experts.w1, experts.w2, COUNTS, activation), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: run(experts, x, COUNTS), (x.clone().requires_grad_(),))


def count_grouped_mm(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    calls: list[torch.dtype] = []
    original = functional.grouped_mm

    def counted(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(x.dtype)
        return original(x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "grouped_mm", counted)
    return calls


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)], ids=str)
def test_grouped_mm_and_slices_agree(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_grouped_mm(monkeypatch)
    experts = make(8, 16).to(dtype)
    x, upstream = torch.randn(sum(COUNTS), 8).to(dtype), torch.randn(sum(COUNTS), 8).to(dtype)
    grouped = forward_and_gradients(by_rows, experts, x, upstream)
    assert calls == [dtype, dtype]
    monkeypatch.setattr(experts_module, "_grouped_mm_takes", lambda *_: False)
    sliced = forward_and_gradients(by_rows, experts, x, upstream)
    assert calls == [dtype, dtype]
    for a, b in zip(grouped, sliced, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "width", "inner", "calls"),
    [
        (torch.float32, 8, 12, 2),
        (torch.float32, 6, 12, 0),
        (torch.float32, 8, 10, 0),  # 20 wide up, as swiglu is, but 10 wide down
        (torch.bfloat16, 8, 8, 2),
        (torch.bfloat16, 8, 12, 0),
        (torch.float64, 8, 12, 0),
    ],
)
def test_grouped_mm_is_used_where_it_can_be(
    dtype: torch.dtype, width: int, inner: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_grouped_mm(monkeypatch)
    experts = make(width, inner).to(dtype)
    by_rows(experts, torch.randn(sum(COUNTS), width).to(dtype), COUNTS)
    assert len(made) == calls


def test_without_grouped_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make()
    x = torch.randn(sum(COUNTS), 8)
    expected = by_rows(experts, x, COUNTS)
    monkeypatch.delattr(functional, "grouped_mm")
    assert_close(by_rows(experts, x, COUNTS), expected, rtol=1e-6, atol=1e-6)


@runs
def test_bf16_is_near_float64(run: Run) -> None:
    experts = make(16, 24).bfloat16()
    x = torch.randn(sum(COUNTS), 16).bfloat16()
    y = run(experts, x, COUNTS)
    assert y.dtype == torch.bfloat16
    expected = looped(x.double(), experts.w1.double(), experts.w2.double(), COUNTS, "swiglu")
    assert_close(y.double(), expected, rtol=2**-6, atol=2**-8)


@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [0, 0, 4, 0]])
@runs
def test_experts_without_rows_stay_connected(run: Run, width: int, counts: list[int]) -> None:
    experts = make(width)
    x = torch.randn(sum(counts), width, requires_grad=True)
    y = run(experts, x, counts)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    for weight in (experts.w1, experts.w2):
        assert weight.grad is not None
        assert [bool(grad.any()) for grad in weight.grad] == [count > 0 for count in counts]
        assert bool(weight.grad.isfinite().all())


@pytest.mark.parametrize("width", [8, 6])
@runs
def test_expanded_gradients(run: Run, width: int) -> None:
    """``y.sum().backward()`` gives backward a gradient with strides of zero."""
    experts = make(width)
    x = torch.randn(sum(COUNTS), width)
    grads = []
    for ones in (lambda y: y.sum().backward(), lambda y: y.backward(torch.ones(y.shape))):
        experts.zero_grad()
        ones(run(experts, x, COUNTS))
        assert experts.w1.grad is not None
        assert experts.w2.grad is not None
        grads.append((experts.w1.grad.clone(), experts.w2.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    x = torch.randn(sum(COUNTS), width)
    plan = plan_permutation(torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS)).unsqueeze(1), len(COUNTS))
    linear_by_expert(plan, x.dtype, experts.w1)(x, experts.w1).sum().backward()


@pytest.mark.parametrize("way", ["run_in_tiles", "run_by_rows"])
def test_autocast_computes_in_bf16(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    run = getattr(experts_module, way)

    def watched(
        x: Tensor, weights: Tensor, plan: Permutation, w1: Tensor, w2: Tensor, activation: Activation
    ) -> Tensor:
        calls.extend(tensor.dtype for tensor in (x, w1, w2, weights))
        return cast(Tensor, run(x, weights, plan, w1, w2, activation))

    monkeypatch.setattr(experts_module, way, watched)
    monkeypatch.setattr(experts_module, "tiles_are_faster", lambda *_: way == "run_in_tiles")
    moe = MoE(8, MoEConfig(num_experts=4, intermediate_size=16, num_shared_experts=1))
    x = torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x)
    assert calls == [torch.bfloat16] * 3 + [torch.float32]
    assert y.dtype == torch.float32
    assert_close(y, moe(x), rtol=2**-5, atol=2**-7)
    assert not torch.equal(y, moe(x))
    y.sum().backward()
    assert {p.grad.dtype for p in moe.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in moe.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert moe(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shared_mlp_as_by_plain_loops(activation: Activation) -> None:
    mlp = SharedMLP(6, 10, activation)
    x = torch.randn(9, 6)
    expected = looped(x.double(), mlp.up.weight.double()[None], mlp.down.weight.double()[None], [9], activation)
    assert_close(mlp(x).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "inner", "tokens", "dtype", "expected"),
    [
        (64, 64, 64, torch.float32, False),  # small experts: a loop costs more than it saves
        (256, 512, 8, torch.bfloat16, False),  # few rows, as in generation
        (256, 512, 512, torch.float32, True),
        (256, 512, 512, torch.bfloat16, True),
        (64, 64, 64, torch.float64, True),  # nothing else takes it
        (6, 7, 64, torch.float32, True),  # rows that grouped_mm does not take
    ],
)
def test_the_faster_way_is_taken(width: int, inner: int, tokens: int, dtype: torch.dtype, expected: bool) -> None:
    experts = GroupedExperts(width, inner, 8, "swiglu", SINGLE_RANK).to(dtype)
    plan = plan_permutation(torch.arange(tokens * 2).view(tokens, 2) % 8, 8)
    x = torch.empty(tokens, width, dtype=dtype)
    assert experts_module.tiles_are_faster(x, plan, experts.w1, experts.w2) is expected
    with torch.device("meta"):
        assert not experts_module.tiles_are_faster(torch.empty(tokens, width), plan, experts.w1, experts.w2)

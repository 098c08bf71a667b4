"""The experts in tiles against plain loops in float64, in memory that is full of NaN before it is written."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lightning_moe.config import Activation
from lightning_moe.dispatch.permute import Permutation, plan_permutation
from lightning_moe.nn import tile_operations, tiling
from lightning_moe.nn.experts import run_by_rows
from lightning_moe.nn.tiles import run_in_tiles

L, D, F, TILE, RUN_ROWS = 4, 8, 12, 8, 16
WHAT = ("y", "x", "weights", "w1", "w2")
activations = pytest.mark.parametrize("activation", get_args(Activation))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)

# Tokens, what they choose among, experts of each, share that is kept, rows that each expert gets with padding.
CASES: dict[str, tuple[int, list[int], int, float | None, int | None]] = {
    "all": (21, [0, 1, 2, 3], 2, None, None),
    "every expert": (11, [0, 1, 2, 3], 4, None, None),
    "dropped": (21, [0, 1, 2, 3], 2, 0.6, None),
    "gaps": (21, [0, 1, 2, 3], 2, 0.6, 19),
    "one expert without gaps": (17, [2], 1, None, 17),
    "empty experts": (21, [1, 3], 2, None, None),
    "empty experts with gaps": (21, [1, 3], 2, None, 22),
    "one expert": (43, [2], 1, None, None),
    "whole tiles": (16, [0, 3], 2, None, None),
    "one tile with padding, some dropped": (9, [1], 1, 0.6, None),
    "all dropped": (5, [0, 1], 2, 0.0, None),
    "all dropped with gaps": (5, [0, 1], 2, 0.0, 3),
    "no tokens": (0, [0, 1], 2, None, None),
    "no tokens with gaps": (0, [0, 1], 2, None, 3),
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def small_tiles_in_unwritten_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiling, "TILE", TILE)
    monkeypatch.setattr(tiling, "_RUN_BYTES", RUN_ROWS * D * 4)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def num_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """However uneven their shares."""
    monkeypatch.setattr(tiling, "_MOST_OF_MEAN", 100)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def route(case: str) -> tuple[Tensor, Tensor | None, Permutation]:
    num_tokens, among, top_k, share, rows = CASES[case]
    order = torch.rand(num_tokens, len(among)).argsort(-1)[:, :top_k]
    ids_AK = torch.tensor(among)[order]
    kept_AK = None if share is None else torch.rand(ids_AK.shape) < share
    return ids_AK, kept_AK, plan_permutation(ids_AK, L, kept_AK, rows_per_expert=rows)


def drawn(ids_AK: Tensor, activation: Activation, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Tokens, weights of which some are 0, both stacks of matrices, and the gradient of the result."""
    width = 2 * F if activation == "swiglu" else F
    weights_AK = torch.rand(ids_AK.shape)
    weights_AK[::3, 0] = 0
    x_AD, upstream_AD = torch.randn(len(ids_AK), D).to(dtype), torch.randn(len(ids_AK), D).to(dtype)
    w1, w2 = torch.randn(L, width, D) / D, torch.randn(L, D, F) / F
    wide = torch.promote_types(dtype, torch.float32)
    return [x_AD, weights_AK.to(wide), w1.to(dtype), w2.to(dtype)], upstream_AD


def backward(run: Any, inputs: list[Tensor], upstream: Tensor, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    leaves = {name: value.clone() for name, value in zip(WHAT[1:], inputs, strict=True)}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    y = run(*leaves.values())
    y.backward(upstream)
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    assert [name for name, grad in grads.items() if grad is None] == list(frozen)
    return {"y": y.detach(), **{name: grad for name, grad in grads.items() if grad is not None}}


def in_tiles(inputs: list[Tensor], upstream: Tensor, plan: Permutation, activation: Activation) -> dict[str, Tensor]:
    return backward(lambda x, weights, w1, w2: run_in_tiles(x, weights, plan, w1, w2, activation), inputs, upstream)


def watch_activation(monkeypatch: pytest.MonkeyPatch, activation: Activation, see: Callable[[Tensor], Any]) -> None:
    """Calls ``see(h)`` before every activation of a tile by whichever operations are used here."""
    kind = type(tile_operations.operations_for(torch.empty(0), torch.empty(0), activation, num_threads=1))
    original = kind.activate

    def watched(self: Any, h_PnF: Tensor, *, act_nF: Tensor) -> None:
        see(h_PnF)
        original(self, h_PnF, act_nF=act_nF)

    monkeypatch.setattr(kind, "activate", watched)


def looped(
    ids: Tensor, kept: Tensor | None, activation: str, x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor
) -> Tensor:
    y = 0 * x + 0 * (weights.sum() + w1.sum() + w2.sum())
    rows = []
    for a in range(len(ids)):
        y_D = y[a]
        for k, expert in enumerate(ids[a].tolist()):
            if kept is not None and not kept[a, k]:
                continue
            h = w1[expert] @ x[a]
            if activation == "swiglu":
                h = h[:F] * torch.sigmoid(h[:F]) * h[F:]
            elif activation == "gelu":
                h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
            else:
                h = h * (h > 0)
            y_D = y_D + weights[a, k] * (w2[expert] @ h)
        rows.append(y_D)
    return torch.stack(rows) if rows else y


@cases
@activations
@dtypes
@pytest.mark.usefixtures("num_threads")
def test_as_by_plain_loops(case: str, activation: Activation, dtype: torch.dtype) -> None:
    ids, kept, plan = route(case)
    inputs, upstream = drawn(ids, activation, dtype)
    ours = in_tiles(inputs, upstream, plan, activation)
    expected = backward(partial(looped, ids, kept, activation), [value.double() for value in inputs], upstream.double())
    assert [value.dtype for value in ours.values()] == [dtype, *(value.dtype for value in inputs)]
    for name, value in expected.items():
        got = ours[name].double()
        if dtype == torch.bfloat16:  # some roundings of 2^-9 on the way, and some cancellation
            assert float((got - value).norm()) <= 2**-6 * float(value.norm()), name
        else:
            tolerance = 1e-6 if dtype == torch.float32 else 1e-13
            assert_close(got, value, rtol=tolerance, atol=tolerance, msg=partial("{}: {}".format, name))
    is_kept = torch.ones(ids.shape) > 0 if kept is None else kept
    used = {int(e) for e in ids[is_kept]}
    for name in ("w1", "w2"):
        assert [bool(grad.any()) for grad in ours[name]] == [e in used for e in range(L)]
    assert not ours["weights"][~is_kept].any()
    # A weight of 0 has a gradient as any other.
    assert bool(ours["weights"][is_kept & (inputs[1] == 0)].all())


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("num_threads")
def test_as_by_plain_loops_without_a_compiler(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_operations, "compiled_library", lambda: None)
    test_as_by_plain_loops(case, "swiglu", dtype)


@cases
@activations
def test_as_by_rows(case: str, activation: Activation) -> None:
    ids, _, plan = route(case)
    inputs, upstream = drawn(ids, activation, torch.float32)
    ours = in_tiles(inputs, upstream, plan, activation)

    def by_rows(x: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return run_by_rows(x, weights, plan, w1, w2, activation)

    torch.use_deterministic_algorithms(False)  # grouped_mm need not write what belongs to nobody
    for name, value in backward(by_rows, inputs, upstream).items():
        assert_close(ours[name], value, rtol=1e-6, atol=1e-6, msg=partial("{}: {}".format, name))


@dtypes
@pytest.mark.parametrize("num_runs", [1, 2, 3, 4])
@pytest.mark.parametrize("case", ["all", "dropped", "gaps", "one expert"])
@pytest.mark.usefixtures("num_threads")
def test_the_sum_by_token_in_runs(
    case: str, num_runs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, _, plan = route(case)
    inputs, upstream = drawn(ids, "swiglu", dtype)
    bytes_per_row = D * dtype.itemsize
    num_rows = int(plan.tokens_per_expert_E.sum())
    monkeypatch.setattr(tiling, "_RUN_BYTES", num_rows * bytes_per_row)
    expected = in_tiles(inputs, upstream, plan, "swiglu")
    monkeypatch.setattr(tiling, "_RUN_BYTES", -(-num_rows // num_runs) * bytes_per_row)
    runs = tiling.runs_of(tiling.cut(plan, dtype), bytes_per_row, 1)
    assert len(runs) == num_runs
    assert max(sum(tile.size for tile in run.tiles) for run in runs) <= -(-num_rows // num_runs) + TILE
    ours = in_tiles(inputs, upstream, plan, "swiglu")
    for name, value in expected.items():
        tolerance = {torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
        assert float((ours[name] - value).norm()) <= tolerance * float(value.norm()), name


@pytest.mark.parametrize("case", ["dropped", "gaps"])
def test_weights_without_a_row_may_be_anything(case: str) -> None:
    """What a rank receives of a token's other experts."""
    ids, kept, plan = route(case)
    assert kept is not None
    inputs, upstream = drawn(ids, "swiglu", torch.float32)
    expected = in_tiles(inputs, upstream, plan, "swiglu")
    inputs[1][~kept] = math.nan
    ours = in_tiles(inputs, upstream, plan, "swiglu")
    assert all(torch.equal(ours[name], expected[name]) for name in WHAT)


@activations
@pytest.mark.parametrize("rows_per_expert", [None, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "upstream", "weights"])
@pytest.mark.usefixtures("num_threads")
def test_one_bad_token_spoils_nothing_else(
    where: str, bad: float, dtype: torch.dtype, rows_per_expert: int | None, activation: Activation
) -> None:
    """Expert 0 fills a tile whose last token is bad; the smaller tiles after it find what that left in the buffers."""
    counts = [8, 3, 0, 5]
    ids = torch.arange(L).repeat_interleave(torch.tensor(counts)).unsqueeze(1)
    plan = plan_permutation(ids, L, rows_per_expert=rows_per_expert)
    inputs, upstream = drawn(ids, activation, dtype)
    good = in_tiles(inputs, upstream, plan, activation)
    {"x": inputs[0], "upstream": upstream, "weights": inputs[1]}[where][7] = bad
    spoilt = in_tiles(inputs, upstream, plan, activation)
    untouched = {"x": "", "upstream": "y", "weights": "weights"}[where]
    for name in ("y", "x", "weights"):
        differs_A = (spoilt[name] != good[name]).any(1)
        assert differs_A.nonzero().flatten().tolist() == ([] if name == untouched else [7]), name
        assert good[name].isfinite().all()
    for name in ("w1", "w2"):
        assert torch.equal(spoilt[name][1:], good[name][1:]), name
    assert not spoilt["w1"][0].isfinite().all()  # it did come by


@pytest.mark.parametrize("frozen", [("x",), ("weights",), ("w1",), ("w2",), ("w1", "w2"), ("x", "weights")], ids=str)
def test_frozen(frozen: tuple[str, ...]) -> None:
    ids, _, plan = route("all")
    inputs, upstream = drawn(ids, "swiglu", torch.float32)
    expected = in_tiles(inputs, upstream, plan, "swiglu")
    ours = backward(
        lambda x, weights, w1, w2: run_in_tiles(x, weights, plan, w1, w2, "swiglu"), inputs, upstream, frozen
    )
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_call_twice_is_bit_identical(
    dtype: torch.dtype, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "TILE", 64)
    monkeypatch.setattr(tiling, "_MOST_OF_MEAN", 1.25)
    ids = torch.rand(500, L).argsort(-1)[:, :3]
    plan = plan_permutation(ids, L, torch.rand(500, 3) < 0.9)
    x, upstream, w1, w2 = (torch.randn(*shape).to(dtype) for shape in ((500, 64), (500, 64), (L, 192, 64), (L, 64, 96)))
    first, second = (in_tiles([x, torch.rand(500, 3).fill_(0.3), w1, w2], upstream, plan, "swiglu") for _ in "12")
    assert all(torch.equal(first[name], second[name]) for name in WHAT)


def test_experts_are_divided_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    watch_activation(monkeypatch, "swiglu", lambda _: seen.add(threading.get_ident()))
    ids = torch.arange(L).repeat(8).unsqueeze(1)
    inputs, upstream = drawn(ids, "swiglu", torch.float32)
    plan = plan_permutation(ids, L)
    alone = in_tiles(inputs, upstream, plan, "swiglu")
    assert seen == {threading.get_ident()}
    seen.clear()
    torch.set_num_threads(2)
    try:
        together = in_tiles(inputs, upstream, plan, "swiglu")
        with torch.inference_mode():
            inferred = run_in_tiles(inputs[0], inputs[1], plan, inputs[2], inputs[3], "swiglu")
    finally:
        torch.set_num_threads(1)
    assert len(seen) == 2
    assert all(torch.equal(together[name], alone[name]) for name in WHAT)
    assert torch.equal(inferred, alone["y"])


@dtypes
@pytest.mark.parametrize("rows_per_expert", [None, 20])
def test_backward_keeps_no_rows_but_the_first_product(dtype: torch.dtype, rows_per_expert: int | None) -> None:
    ids = torch.rand(20, L).argsort(-1)[:, :3]
    plan = plan_permutation(ids, L, rows_per_expert=rows_per_expert)
    inputs, _ = drawn(ids, "swiglu", dtype)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        leaves = [value.requires_grad_() for value in inputs]
        y = run_in_tiles(leaves[0], leaves[1], plan, leaves[2], leaves[3], "swiglu")
    assert y.grad_fn is not None
    num_rows = len(plan.assignment_R)
    assert num_rows == (60 if rows_per_expert is None else 80)
    h = kept[len(leaves) :]
    assert [id(tensor) for tensor in kept[: len(leaves)]] == [id(leaves[i]) for i in (0, 1, 3, 2)]
    assert all(part.shape[0] == 2 and part.shape[2] == F for part in h)
    num_kept = sum(part.shape[1] for part in h)
    assert 60 <= num_kept <= 60 + 7 * len(h)  # no row for gaps, fewer than 8 more for each product in bf16
    if dtype != torch.bfloat16:
        assert num_kept == 60


@pytest.mark.parametrize("autocast", [False, True])
def test_many_small_gradients_of_bf16_are_not_lost(autocast: bool) -> None:
    """512 equal products: summed in bf16, the 257th would change nothing. fp16, which autocast has here, ends at 2^16."""
    num_tokens, upstream = 512 * TILE, 2.0**20
    plan = plan_permutation(torch.zeros(num_tokens, 1, dtype=torch.int64), 1)
    x, w1, w2 = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((num_tokens, D), (1, F, D), (1, D, F)))
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        grads = in_tiles([x, torch.ones(num_tokens, 1), w1 / D, w2 / D], torch.full_like(x, upstream), plan, "relu")
    for name in ("w1", "w2"):
        assert_close(grads[name], torch.full_like(grads[name], num_tokens * upstream), rtol=2**-8, atol=0)


def test_tokens_of_any_stride() -> None:
    ids, _, plan = route("all")
    inputs, upstream = drawn(ids, "swiglu", torch.float32)
    y = run_in_tiles(inputs[0], inputs[1], plan, inputs[2], inputs[3], "swiglu")
    x, weights, w1, w2 = (value.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for value in inputs)
    assert not x.is_contiguous()
    strided = run_in_tiles(x, weights, plan, w1, w2, "swiglu")
    assert_close(strided, y, rtol=1e-6, atol=1e-6)
    strided.backward(upstream.t().contiguous().t())
    expected = in_tiles(inputs, upstream, plan, "swiglu")
    for name, leaf in zip(WHAT[1:], (x, weights, w1, w2), strict=True):
        assert_close(leaf.grad, expected[name], rtol=1e-6, atol=1e-6)


def test_an_expanded_gradient() -> None:
    ids, _, plan = route("all")
    inputs, upstream = drawn(ids, "swiglu", torch.float32)
    expected = in_tiles(inputs, torch.ones_like(upstream), plan, "swiglu")
    leaves = [value.requires_grad_() for value in inputs]
    run_in_tiles(leaves[0], leaves[1], plan, leaves[2], leaves[3], "swiglu").sum().backward()
    assert all(torch.equal(leaf.grad, expected[name]) for name, leaf in zip(WHAT[1:], leaves, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_a_mode_around_one_of_both(watched: str, dtype: torch.dtype) -> None:
    """Under one, torch's operations do what the compiled ones do elsewhere, with what those left."""
    ids, _, plan = route("all")
    inputs, upstream = drawn(ids, "swiglu", dtype)
    expected = in_tiles(inputs, upstream, plan, "swiglu")
    leaves = [value.requires_grad_() for value in inputs]
    with FlopCounterMode(display=False) if watched == "forward" else nullcontext():
        y = run_in_tiles(leaves[0], leaves[1], plan, leaves[2], leaves[3], "swiglu")
    with FlopCounterMode(display=False) if watched == "backward" else nullcontext():
        y.backward(upstream)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    for name, leaf in zip(WHAT[1:], leaves, strict=True):
        assert leaf.grad is not None
        assert float((leaf.grad - expected[name]).norm()) <= tolerance * float(expected[name].norm()), name


def test_what_is_kept_may_come_back_in_other_strides() -> None:
    ids, _, plan = route("all")
    inputs, upstream = drawn(ids, "swiglu", torch.float32)
    expected = in_tiles(inputs, upstream, plan, "swiglu")

    def turned(tensor: Tensor) -> Tensor:
        is_expert_weight = len(tensor) == L  # which are multiplied as they are, in another order of summation
        return tensor if is_expert_weight else tensor.transpose(0, -1).contiguous().transpose(0, -1)

    with torch.autograd.graph.saved_tensors_hooks(turned, lambda tensor: tensor):
        ours = in_tiles(inputs, upstream, plan, "swiglu")
    assert all(torch.equal(ours[name], expected[name]) for name in WHAT)


def test_second_derivatives_are_refused() -> None:
    ids, _, plan = route("all")
    inputs, _ = drawn(ids, "swiglu", torch.float32)
    x = inputs[0].requires_grad_()
    y = run_in_tiles(x, inputs[1], plan, inputs[2], inputs[3], "swiglu")
    torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@activations
@pytest.mark.parametrize("case", ["all", "gaps"])
def test_without_a_backward_nothing_is_kept(case: str, activation: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, _, plan = route(case)
    inputs, upstream = drawn(ids, activation, torch.float32)
    expected = in_tiles(inputs, upstream, plan, activation)["y"]
    first_products: list[int] = []
    watch_activation(monkeypatch, activation, lambda h: first_products.append(h.untyped_storage().data_ptr()))
    x, weights, w1, w2 = (value.requires_grad_() for value in inputs)
    with torch.no_grad():
        y = run_in_tiles(x, weights, plan, w1, w2, activation)
    assert torch.equal(y, expected)
    assert len(first_products) > 1
    assert len(set(first_products)) == 1
    first_products.clear()
    kept = run_in_tiles(x, weights, plan, w1, w2, activation)
    assert torch.equal(kept, expected)
    assert len(set(first_products)) == len(first_products)

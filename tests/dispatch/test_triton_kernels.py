"""The Triton kernels, against plain indexing and sums in float64 and against ``permute.py``.

They run on CUDA where there is one and otherwise in Triton's interpreter, which shows what a kernel computes but not
how its pointers overflow or align: ``benchmarks/kernels.py`` is for that.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe.dispatch.message import Field, layout
from lightning_moe.dispatch.permute import Permutation, permute, plan_permutation, unpermute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported
pytest.importorskip("triton")

from lightning_moe.dispatch.triton_kernels import (  # noqa: E402
    gather_rows,
    pack_rows,
    sum_rows,
    unpermute_backward,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
WIDTHS = [1, 7, 64, 3000]
TOP_K = range(1, 9)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
each_width = pytest.mark.parametrize("width", WIDTHS)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def wide(x: Tensor, gap: int = 5) -> Tensor:
    """The same values in rows that are further apart than they are long; what is between them is not a number."""
    buffer = x.new_full((x.shape[0], x.shape[1] + gap), float("nan"))
    buffer[:, : x.shape[1]] = x
    return buffer[:, : x.shape[1]]


def make_plan(num_tokens: int, top_k: int, num_experts: int = 9, kind: str = "complete") -> Permutation:
    ids_TK = torch.rand(num_tokens, num_experts, device=DEVICE).argsort(1)[:, :top_k]
    if kind == "complete":
        return plan_permutation(ids_TK, num_experts)
    kept_TK = torch.rand(ids_TK.shape, device=DEVICE) < 0.6
    if kind == "dropped":
        return plan_permutation(ids_TK, num_experts, kept_TK)
    return plan_permutation(ids_TK, num_experts, kept_TK, rows_per_expert=max(num_tokens, 1) + 1)


each_kind = pytest.mark.parametrize("kind", ["complete", "dropped", "gaps"])


def assert_rounded(actual: Tensor, exact: Tensor, terms: Tensor | float) -> None:
    """``actual`` is ``exact`` up to one ulp of its dtype and 1e-6 (1e-14 in float64) of what was added up."""
    error = (actual.double() - exact).abs()
    in_sum = 1e-14 if actual.dtype == torch.float64 else 1e-6
    smallest = torch.finfo(actual.dtype).tiny
    allowed = torch.finfo(actual.dtype).eps * exact.abs() + in_sum * terms + smallest
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the rounding"


def assert_same_messages(actual: Tensor, expected: Tensor, width: int, wire: torch.dtype) -> None:
    """Bit by bit, but for the cast to bf16 in the interpreter, which drops the low bits instead of rounding."""
    assert actual.dtype == torch.uint8
    if DEVICE == "cpu" and wire == torch.bfloat16:
        actual_x, expected_x = actual.view(wire)[:, :width], expected.view(wire)[:, :width]
        assert_rounded(actual_x, expected_x.double(), 0.0)
        actual_x.copy_(expected_x)
    assert torch.equal(actual, expected)


def padded(rows: Tensor) -> Tensor:
    """With a last row of zeros, which every index beyond the rows is clamped to."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


# gather_rows


@each_dtype
@each_width
def test_gather_rows(dtype: torch.dtype, width: int) -> None:
    x_AD = randn(6, width, dtype=dtype)
    index_R = ints(5, 0, 3, 3, -1, 6, 2, 10**12, -(10**12), 0, 5)
    valid_R = (index_R >= 0) & (index_R < 6)
    expected = x_AD[index_R.clamp(0, 5)] * valid_R.unsqueeze(1)
    for x in (x_AD, wide(x_AD), wide(x_AD, gap=8)):
        found = gather_rows(x, index_R)
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert torch.equal(found, expected)
        assert torch.equal(found, gather_rows(x, index_R))


@each_kind
@pytest.mark.parametrize("top_k", [1, 3])
def test_gather_rows_is_permute(kind: str, top_k: int) -> None:
    plan = make_plan(11, top_k, kind=kind)
    x_TD = randn(11, 20)
    assert torch.equal(gather_rows(x_TD, plan.assignment_R // top_k), permute(x_TD, plan))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_gather_rows_of_numbers_that_are_not_floats(dtype: torch.dtype) -> None:
    x_AD = torch.randint(0, 200, (5, 48), device=DEVICE).to(dtype)
    assert torch.equal(gather_rows(x_AD, ints(4, 9, 0)), padded(x_AD)[ints(4, 5, 0)])


def test_gather_rows_of_a_transposed_and_an_expanded_tensor() -> None:
    x_AD = randn(20, 4).T
    assert torch.equal(gather_rows(x_AD, ints(3, 1)), x_AD[ints(3, 1)])
    one_AD = randn(1, 20).expand(4, 20)
    assert torch.equal(gather_rows(one_AD, ints(3, 1)), one_AD[ints(3, 1)])


def test_gather_rows_from_beyond_two_to_the_31() -> None:
    stride = 2**31 + 16
    x_AD = torch.empty(stride + 32, dtype=torch.uint8, device=DEVICE).as_strided((2, 32), (stride, 1))
    x_AD[1] = torch.arange(32)
    assert gather_rows(x_AD, ints(1)).tolist() == [list(range(32))]


def test_gather_rows_of_more_rows_than_a_program_has() -> None:
    x_AD, index_R = randn(700, 3), torch.randint(-50, 750, (2500,), device=DEVICE)
    assert torch.equal(gather_rows(x_AD, index_R), padded(x_AD)[torch.where(index_R < 0, 700, index_R).clamp(max=700)])


@pytest.mark.parametrize(("sources", "rows", "width"), [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 2, 0)])
def test_gather_rows_of_nothing(sources: int, rows: int, width: int) -> None:
    found = gather_rows(randn(sources, width), torch.zeros(rows, dtype=torch.int64, device=DEVICE))
    assert found.shape == (rows, width)
    assert sources > 0 or not found.any()


# sum_rows


def exact_sums(y_RD: Tensor, row_AK: Tensor, weights_AK: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums in float64, and the sums of the terms' magnitudes."""
    num_rows = len(y_RD)
    row_AK = torch.where((row_AK < 0) | (row_AK > num_rows), num_rows, row_AK)
    terms_AKD = padded(y_RD.double())[row_AK]
    if weights_AK is not None:
        terms_AKD = terms_AKD * weights_AK.double().unsqueeze(-1)
    return terms_AKD.sum(1), terms_AKD.abs().sum(1)


@each_dtype
@each_width
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
def test_sum_rows(dtype: torch.dtype, width: int, weighted: bool) -> None:
    y_RD = randn(9, width, dtype=dtype)
    row_AK = ints(0, 8, 9, 3, 3, 4, -1, 10**12, 9, -5, 2, 1).view(4, 3)
    weights_AK = randn(4, 3) if weighted else None
    expected, terms = exact_sums(y_RD, row_AK, weights_AK)
    for y in (y_RD, wide(y_RD), wide(y_RD, gap=8)):
        found = sum_rows(y, row_AK, weights_AK)
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert_rounded(found, expected, terms)
        assert torch.equal(found, sum_rows(y, row_AK, weights_AK))


@each_kind
@pytest.mark.parametrize("top_k", TOP_K)
def test_sum_rows_is_unpermute(kind: str, top_k: int) -> None:
    plan = make_plan(7, top_k, kind=kind)
    y_RD, scores_TK = randn(len(plan.assignment_R), 12), torch.rand(7, top_k, device=DEVICE)
    assert_close(sum_rows(y_RD, plan.row_TK, scores_TK), unpermute(y_RD, scores_TK, plan), rtol=1e-6, atol=1e-6)


def test_sum_rows_adds_from_the_first_to_the_last() -> None:
    y_RD = torch.tensor([[1.0], [2.0**24], [-(2.0**24)]], device=DEVICE)
    assert sum_rows(y_RD, ints(0, 1, 2, 1, 2, 0).view(2, 3)).tolist() == [[0.0], [1.0]]


def test_the_weight_of_an_assignment_without_a_row_does_not_matter() -> None:
    y_RD, nan = torch.ones(1, 4, device=DEVICE), float("nan")
    found = sum_rows(y_RD, ints(0, 1).view(1, 2), torch.tensor([[2.0, nan]], device=DEVICE))
    assert found.tolist() == [[2.0] * 4]


def test_sum_rows_of_more_rows_than_a_program_has() -> None:
    y_RD, row_AK, weights_AK = randn(3000, 3), torch.randint(0, 3300, (1500, 2), device=DEVICE), randn(1500, 2)
    assert_rounded(sum_rows(y_RD, row_AK, weights_AK), *exact_sums(y_RD, row_AK, weights_AK))


@pytest.mark.parametrize(("rows", "sums", "width"), [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 2, 0)])
def test_sum_rows_of_nothing(rows: int, sums: int, width: int) -> None:
    row_AK = torch.zeros(sums, 2, dtype=torch.int64, device=DEVICE)
    found = sum_rows(randn(rows, width), row_AK, randn(sums, 2))
    assert found.shape == (sums, width)
    assert rows > 0 or not found.any()


# unpermute_backward


def check_backward(grad_AD: Tensor, y_RD: Tensor, weights_AK: Tensor, assignment_R: Tensor) -> tuple[Tensor, Tensor]:
    grad_RD, grad_weights_AK = unpermute_backward(grad_AD, y_RD, weights_AK, assignment_R)
    top_k = weights_AK.shape[1]
    exact_RD = torch.zeros(y_RD.shape, dtype=torch.float64, device=DEVICE)
    exact_N = torch.zeros(weights_AK.numel(), dtype=torch.float64, device=DEVICE)
    terms_N = torch.zeros_like(exact_N)
    for row, n in enumerate(assignment_R.tolist()):
        if 0 <= n < weights_AK.numel():
            grad_D = grad_AD[n // top_k].double()
            exact_RD[row] = grad_D * weights_AK.reshape(-1)[n].double()
            exact_N[n] = y_RD[row].double() @ grad_D
            terms_N[n] = (y_RD[row].double() * grad_D).abs().sum()
    assert grad_RD.dtype == y_RD.dtype
    assert grad_weights_AK.dtype == weights_AK.dtype
    assert grad_RD.is_contiguous()
    assert grad_weights_AK.is_contiguous()
    assert_rounded(grad_RD, exact_RD, 0.0)
    assert_rounded(grad_weights_AK.reshape(-1), exact_N, terms_N)
    return grad_RD, grad_weights_AK


@each_dtype
@each_width
def test_unpermute_backward(dtype: torch.dtype, width: int) -> None:
    grad_AD, y_RD = randn(4, width, dtype=dtype), randn(9, width, dtype=dtype)
    assignment_R = ints(11, 12, 0, 5, 12, 7, 3, 2, -1)  # 1, 4, 6, 8, 9 and 10 have no row
    weights_AK = randn(4, 3)
    grads = check_backward(grad_AD, y_RD, weights_AK, assignment_R)
    again = unpermute_backward(wide(grad_AD), wide(y_RD, gap=8), weights_AK, assignment_R)
    assert all(torch.equal(one, other) for one, other in zip(grads, again, strict=True))


@each_kind
@pytest.mark.parametrize("top_k", TOP_K)
def test_unpermute_backward_is_that_of_unpermute(kind: str, top_k: int) -> None:
    plan = make_plan(6, top_k, kind=kind)
    y_RD = randn(len(plan.assignment_R), 12).requires_grad_()
    scores_TK = torch.rand(6, top_k, device=DEVICE).requires_grad_()
    grad_TD = randn(6, 12)
    unpermute(y_RD, scores_TK, plan).backward(grad_TD)
    grad_RD, grad_scores_TK = unpermute_backward(grad_TD, y_RD.detach(), scores_TK.detach(), plan.assignment_R)
    assert torch.equal(grad_RD, y_RD.grad)
    assert_close(grad_scores_TK, scores_TK.grad, rtol=1e-6, atol=2e-6)


def test_unpermute_backward_of_the_gradient_of_a_sum() -> None:
    """Expanded from one number: neither rows nor elements are apart."""
    check_backward(randn(1).expand(4, 20), randn(8, 20), randn(4, 2), torch.randperm(8, device=DEVICE))


def test_unpermute_backward_of_more_rows_than_a_program_has() -> None:
    grad_AD, y_RD, weights_AK = randn(1500, 3), randn(3000, 3), randn(1500, 2)
    assignment_R = torch.randperm(3300, device=DEVICE)[:3000]
    grads = check_backward(grad_AD, y_RD, weights_AK, assignment_R)
    again = unpermute_backward(grad_AD, y_RD, weights_AK, assignment_R)
    assert all(torch.equal(one, other) for one, other in zip(grads, again, strict=True))


@pytest.mark.parametrize(("sources", "rows", "width"), [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 2, 0)])
def test_unpermute_backward_of_nothing(sources: int, rows: int, width: int) -> None:
    assignment_R = torch.arange(rows, device=DEVICE)
    found = unpermute_backward(randn(sources, width), randn(rows, width), randn(sources, 2), assignment_R)
    assert [tuple(grad.shape) for grad in found] == [(rows, width), (sources, 2)]
    assert not any(grad.any() for grad in found)


# pack_rows


def expected_messages(
    x_AD: Tensor, x_index_S: Tensor, weights_BM: Tensor, ids_BM: Tensor | None, meta_index_S: Tensor, wire: torch.dtype
) -> Tensor:
    """Byte by byte from what each message should hold."""
    rows = []
    for x_index, meta_index in zip(x_index_S.tolist(), meta_index_S.tolist(), strict=True):
        parts = [x_AD[x_index].to(wire).view(torch.uint8)]
        parts.append(torch.zeros(-parts[0].numel() % 4, dtype=torch.uint8, device=DEVICE))
        parts.append(weights_BM[meta_index].view(torch.uint8))
        if ids_BM is not None:
            parts.append(ids_BM[meta_index].to(torch.int32).view(torch.uint8))
        row = torch.cat(parts)
        rows.append(torch.cat([row, row.new_zeros(-row.numel() % 16)]))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=SHORT.get)
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.float16], ids=SHORT.get)
@pytest.mark.parametrize(("width", "entries"), [(1, 1), (7, 3), (16, 8), (3000, 6), (5, 40)])
def test_pack_rows(dtype: torch.dtype, wire: torch.dtype, width: int, entries: int) -> None:
    x_AD, weights_BM = randn(5, width, dtype=dtype), randn(4, entries)
    ids_BM = torch.randint(-1, 2**31 - 1, (4, entries), device=DEVICE)
    x_index_S, meta_index_S = ints(4, 0, 2, 2, 1, 4, 3), ints(3, 1, 0, 3, 2, 2, 0)
    for ids in (ids_BM, None):
        expected = expected_messages(x_AD, x_index_S, weights_BM, ids, meta_index_S, wire)
        for x in (x_AD, wide(x_AD)):
            found = pack_rows(x, x_index_S, weights_BM, ids, meta_index_S, wire)
            assert_same_messages(found, expected, width, wire)


def test_the_parts_of_a_message_can_be_viewed_and_gathered() -> None:
    x_AD, weights_BM, ids_BM = (
        randn(6, 21, dtype=torch.bfloat16),
        randn(6, 3),
        torch.arange(18, device=DEVICE).view(6, 3),
    )
    every = torch.arange(6, device=DEVICE)
    messages = pack_rows(x_AD, every, weights_BM, ids_BM, every, torch.bfloat16)
    fields = [Field(21, torch.bfloat16), Field(3, torch.float32), Field(3, torch.int32)]
    (_, weights_offset, ids_offset), row_bytes = layout(fields)
    assert messages.shape == (6, row_bytes)
    assert ids_offset is not None
    assert torch.equal(messages.view(torch.float32)[:, weights_offset // 4 :][:, :3], weights_BM)
    assert torch.equal(messages.view(torch.int32)[:, ids_offset // 4 :][:, :3].long(), ids_BM)
    x = messages.view(torch.bfloat16)[:, :21]
    assert torch.equal(gather_rows(x, ints(5, 0, 6)), padded(x_AD)[ints(5, 0, 6)])


def test_an_index_outside_gives_a_message_of_zeros() -> None:
    ones = torch.ones(2, 4, device=DEVICE)
    messages = pack_rows(ones, ints(-1, 2, 0), ones, ones.long(), ints(2, 0, -1), torch.float32)
    x, weights, ids = (
        messages.view(torch.float32)[:, :4],
        messages.view(torch.float32)[:, 4:8],
        messages.view(torch.int32),
    )
    assert x.sum(1).tolist() == [0, 0, 4]
    assert weights.sum(1).tolist() == ids[:, 8:12].sum(1).tolist() == [0, 4, 0]


def test_pack_rows_of_more_rows_than_a_program_has() -> None:
    x_AD, weights_BM, ids_BM = randn(300, 3), randn(200, 2), torch.randint(0, 99, (200, 2), device=DEVICE)
    x_index_S, meta_index_S = torch.randint(0, 300, (1500,)).to(DEVICE), torch.randint(0, 200, (1500,)).to(DEVICE)
    arguments = (x_AD, x_index_S, weights_BM, ids_BM, meta_index_S, torch.bfloat16)
    found, again = pack_rows(*arguments), pack_rows(*arguments)
    assert torch.equal(found, again)
    assert_same_messages(found, expected_messages(*arguments), 3, torch.bfloat16)


def test_pack_rows_of_nothing() -> None:
    empty = ints()
    assert pack_rows(randn(3, 5), empty, randn(3, 2), None, empty, torch.bfloat16).shape == (0, 32)
    assert pack_rows(randn(0, 5), empty, randn(0, 2), None, empty, torch.bfloat16).shape == (0, 32)
    without_entries = pack_rows(randn(3, 8), ints(2), randn(3, 0), None, ints(0), torch.bfloat16)
    assert without_entries.shape == (1, 16)
    without_width = pack_rows(randn(3, 0), ints(2), torch.ones(3, 1, device=DEVICE), None, ints(0), torch.bfloat16)
    assert without_width.view(torch.float32).tolist() == [[1, 0, 0, 0]]

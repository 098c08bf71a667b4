"""The local reordering, against index arrays written by hand and against plain loops in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lightning_moe.dispatch.permute import Permutation, permute, plan_permutation, sum_of_rows, unpermute

# (name, ids, experts, kept, rows of the assignments in order, row of every assignment, rows of the experts)
BY_HAND = [
    ("top1", [[2], [0], [2], [1]], 3, None, [1, 3, 0, 2], [[2], [0], [3], [1]], [1, 1, 2]),
    (
        "top2",
        [[1, 0], [1, 2], [0, 2]],
        4,
        None,
        [1, 4, 0, 2, 3, 5],
        [[2, 0], [3, 4], [1, 5]],
        [2, 2, 2, 0],
    ),
    ("one expert", [[1], [1], [1]], 2, None, [0, 1, 2], [[0], [1], [2]], [0, 3]),
    (
        "dropped",
        [[1, 0], [1, 2], [0, 2]],
        3,
        [[True, False], [False, True], [True, True]],
        [4, 0, 3, 5],  # the dropped assignments 1 and 2 get the rows behind these
        [[1, 4], [5, 2], [0, 3]],
        [1, 1, 2],
    ),
    ("all dropped", [[0, 1]], 2, [[False, False]], [], [[0, 1]], [0, 0]),
    (
        "dropped with foreign ids",
        [[-3], [7], [1]],
        2,
        [[False], [False], [True]],
        [2],
        [[1], [2], [0]],
        [0, 1],
    ),
]


@pytest.mark.parametrize(
    ("ids", "num_experts", "kept", "assignment", "row", "counts"),
    [case[1:] for case in BY_HAND],
    ids=[case[0] for case in BY_HAND],
)
def test_plan_by_hand(
    ids: list[list[int]],
    num_experts: int,
    kept: list[list[bool]] | None,
    assignment: list[int],
    row: list[list[int]],
    counts: list[int],
) -> None:
    kept_TK = None if kept is None else torch.tensor(kept)
    plan = plan_permutation(torch.tensor(ids), num_experts, kept_TK)
    assert plan.assignment_R.tolist() == assignment
    assert plan.row_TK.tolist() == row
    assert plan.tokens_per_expert_E.tolist() == counts
    told = plan_permutation(torch.tensor(ids), num_experts, kept_TK, num_rows=sum(counts))
    assert all(torch.equal(a, b) for a, b in zip(fields(told), fields(plan), strict=True))


def fields(plan: Permutation) -> tuple[Tensor, Tensor, Tensor]:
    return plan.assignment_R, plan.row_TK, plan.tokens_per_expert_E


def test_plan_of_no_tokens() -> None:
    for kept in (None, torch.zeros(0, 2, dtype=torch.bool)):
        plan = plan_permutation(torch.zeros(0, 2, dtype=torch.long), 3, kept)
        assert plan.assignment_R.shape == (0,)
        assert plan.row_TK.shape == (0, 2)
        assert plan.tokens_per_expert_E.tolist() == [0, 0, 0]


@st.composite
def routes(draw: st.DrawFn) -> tuple[Tensor, int, Tensor | None]:
    """Ids of distinct experts per token, the number of experts, and what is kept."""
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, min(3, num_experts)))
    num_tokens = draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    ids_TK = scores.argsort(-1)[:, :top_k].contiguous()
    share = draw(st.sampled_from([None, 0.0, 0.5, 0.9]))
    kept = None if share is None else torch.rand(num_tokens, top_k, generator=generator) < share
    return ids_TK, num_experts, kept


@given(routes())
@settings(max_examples=200, deadline=None)
def test_plan_invariants(case: tuple[Tensor, int, Tensor | None]) -> None:
    ids_TK, num_experts, kept_TK = case
    plan = plan_permutation(ids_TK, num_experts, kept_TK)
    ids = ids_TK.flatten().tolist()
    kept = [True] * len(ids) if kept_TK is None else kept_TK.flatten().tolist()
    rows = plan.assignment_R.tolist()
    # Every kept assignment has exactly one row; rows are in expert order and in token order within an expert.
    assert rows == sorted((i for i in range(len(ids)) if kept[i]), key=lambda i: (ids[i], i))
    # The way back: the row that an assignment names is its own, and the dropped point behind the rows.
    for i, row in enumerate(plan.row_TK.flatten().tolist()):
        assert (rows[row] == i) if kept[i] else (row >= len(rows))
    assert sorted(plan.row_TK.flatten().tolist()) == list(range(len(ids)))
    counts = [sum(k and e == expert for e, k in zip(ids, kept, strict=True)) for expert in range(num_experts)]
    assert plan.tokens_per_expert_E.tolist() == counts


def looped_permute(x_TD: Tensor, plan: Permutation) -> Tensor:
    top_k = plan.row_TK.shape[1]
    rows = [x_TD[assignment // top_k] for assignment in plan.assignment_R.tolist()]
    return torch.stack(rows) if rows else x_TD[:0]


def looped_unpermute(y_RD: Tensor, scores_TK: Tensor, plan: Permutation) -> Tensor:
    out = []
    for t, rows in enumerate(plan.row_TK.tolist()):
        y_D = torch.zeros(y_RD.shape[1], dtype=y_RD.dtype) + 0 * y_RD.sum()
        for k, row in enumerate(rows):
            if row < len(y_RD):
                y_D = y_D + scores_TK[t, k] * y_RD[row]
        out.append(y_D)
    return torch.stack(out) if out else y_RD[:0]


@given(routes())
@settings(max_examples=60, deadline=None)
def test_both_ways_are_the_plain_loops(case: tuple[Tensor, int, Tensor | None]) -> None:
    ids_TK, num_experts, kept_TK = case
    plan = plan_permutation(ids_TK, num_experts, kept_TK)
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, y, scores = drawn(len(ids_TK), 3), drawn(len(plan.assignment_R), 3), drawn(*ids_TK.shape)
    pairs: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (permute, looped_permute, (x,)),
        (unpermute, looped_unpermute, (y, scores)),
    ]
    for ours, looped, inputs in pairs:
        leaves = [[value.clone().requires_grad_() for value in inputs] for _ in range(2)]
        outputs = [ours(*leaves[0], plan), looped(*leaves[1], plan)]
        assert_close(outputs[0], outputs[1], rtol=0, atol=1e-14)
        upstream = drawn(*outputs[0].shape)
        for output in outputs:
            (output * upstream).sum().backward()
        for a, b in zip(*leaves, strict=True):
            assert_close(a.grad, b.grad if b.grad is not None else torch.zeros_like(b), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("ids", "num_experts", "kept"), [case[1:4] for case in BY_HAND], ids=[case[0] for case in BY_HAND]
)
def test_gradcheck(ids: list[list[int]], num_experts: int, kept: list[list[bool]] | None) -> None:
    plan = plan_permutation(torch.tensor(ids), num_experts, None if kept is None else torch.tensor(kept))
    x = torch.randn(len(ids), 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(plan.assignment_R), 3, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(len(ids), len(ids[0]), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, plan), (x,))
    assert torch.autograd.gradcheck(lambda y, scores: unpermute(y, scores, plan), (y, scores))


def test_dropped_tokens_get_zeros_and_no_gradient() -> None:
    kept = torch.tensor([[True, True], [False, False], [True, False]])
    plan = plan_permutation(torch.tensor([[0, 1], [0, 1], [1, 0]]), 2, kept)
    x = torch.randn(3, 4, requires_grad=True)
    scores = torch.rand(3, 2, requires_grad=True)
    y = unpermute(permute(x, plan), scores, plan)
    assert torch.equal(y[1], torch.zeros(4))
    y.backward(torch.randn(3, 4))
    assert x.grad is not None
    assert scores.grad is not None
    assert torch.equal(x.grad[1], torch.zeros(4))
    assert torch.equal(scores.grad == 0, ~kept)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_rows_keep_the_graph_connected(num_tokens: int) -> None:
    ids = torch.zeros(num_tokens, 2, dtype=torch.long)
    plan = plan_permutation(ids, 2, torch.zeros(num_tokens, 2, dtype=torch.bool))
    x = torch.randn(num_tokens, 4, requires_grad=True)
    scores = torch.rand(num_tokens, 2, requires_grad=True)
    rows = permute(x, plan)
    assert rows.shape == (0, 4)
    y = unpermute(rows, scores, plan)
    assert y.shape == (num_tokens, 4)
    y.sum().backward()
    assert x.grad is not None
    assert scores.grad is not None
    assert torch.equal(x.grad, torch.zeros(num_tokens, 4))
    assert torch.equal(scores.grad, torch.zeros(num_tokens, 2))


@given(routes(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_sum_of_rows_is_a_plain_loop(
    case: tuple[Tensor, int, Tensor | None], dtype: torch.dtype, width: int, has_gaps: bool
) -> None:
    ids_TK, num_experts, kept_TK = case
    plan = plan_permutation(ids_TK, num_experts, kept_TK, rows_per_expert=len(ids_TK) if has_gaps else None)
    y = torch.randn(len(plan.assignment_R), width, generator=torch.Generator().manual_seed(1)).to(dtype)
    y[plan.assignment_R == ids_TK.numel()] = float("nan")  # what stands in gaps is nobody's
    ours = sum_of_rows(y, plan)
    expected = torch.zeros(len(ids_TK), width, dtype=torch.float64)
    for t, rows in enumerate(plan.row_TK.tolist()):
        for row in rows:
            if row < len(y):
                expected[t] += y[row].double()
    assert (ours.dtype, ours.shape) == (dtype, expected.shape)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-14}[dtype]
    assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("rows_per_expert", [None, 3])
def test_bf16_rows_are_summed_in_fp32(rows_per_expert: int | None) -> None:
    """256 + 1 is 256 in bf16."""
    plan = plan_permutation(torch.tensor([[0, 1, 2, 3]]), 4, rows_per_expert=rows_per_expert)
    y = torch.ones(len(plan.assignment_R), 2, dtype=torch.bfloat16)
    y[0] = 256
    assert sum_of_rows(y, plan).tolist() == [[260, 260]]  # 259, rounded once


def test_the_sum_of_rows_of_any_stride() -> None:
    plan = plan_permutation(torch.tensor([[0, 1], [1, 0]]), 2)
    y = torch.randn(3, 4).t()
    assert_close(sum_of_rows(y, plan), torch.stack([y[0] + y[2], y[1] + y[3]]), rtol=1e-6, atol=1e-6)
    assert_close(sum_of_rows(y[:, :1].expand(4, 3), plan), torch.stack([y[0] + y[2], y[1] + y[3]])[:, :1].expand(2, 3))


@pytest.mark.parametrize("kept_share", [0.6, 1.0])
def test_bf16_rows_with_fp32_scores(kept_share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(40, 4, generator=generator).argsort(-1)[:, :2].contiguous()
    plan = plan_permutation(ids, 4, torch.rand(40, 2, generator=generator) < kept_share)
    y = torch.randn(len(plan.assignment_R), 8, generator=generator).bfloat16().requires_grad_()
    scores = torch.rand(40, 2, generator=generator).requires_grad_()
    upstream = torch.randn(40, 8, generator=generator).bfloat16()
    out = unpermute(y, scores, plan)
    out.backward(upstream)

    y64, scores64 = y.detach().double().requires_grad_(), scores.detach().double().requires_grad_()
    out64 = looped_unpermute(y64, scores64, plan)
    out64.backward(upstream.double())
    assert y.grad is not None
    assert scores.grad is not None
    assert (out.dtype, y.grad.dtype, scores.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    # Summed in fp32 and rounded once: off by half a unit in the last place at most.
    assert_close(out.double(), out64, rtol=2**-8, atol=1e-6)
    assert_close(y.grad.double(), y64.grad, rtol=2**-8, atol=1e-6)
    assert_close(scores.grad.double(), scores64.grad, rtol=1e-6, atol=1e-6)  # the router learns in fp32


def test_the_same_call_twice_is_bit_identical() -> None:
    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        ids = torch.rand(300, 8, generator=generator).argsort(-1)[:, :3].contiguous()
        plan = plan_permutation(ids, 8, torch.rand(300, 3, generator=generator) < 0.8)
        x = torch.randn(300, 16, generator=generator).requires_grad_()
        scores = torch.rand(300, 3, generator=generator).requires_grad_()
        y = unpermute(permute(x, plan).sin(), scores, plan)
        y.backward(torch.randn(300, 16, generator=generator))
        assert x.grad is not None
        assert scores.grad is not None
        return [*fields(plan), y, x.grad, scores.grad]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))

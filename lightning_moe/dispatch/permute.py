"""Local reordering of rows: token order to expert order and back. Nothing here communicates.

Both directions gather, in forward and in backward: a scatter-add would sum in an order that CUDA does not fix.

Shapes: T tokens, D width, K experts per token, N = T*K assignments, R rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Permutation:
    """Where each row comes from, and where each assignment went.

    Args:
        assignment_R: Flat index into the T*K assignments of every row; rows are in expert order and, within an
            expert, in token order. T*K where a row is padding.
        row_TK: Row of every assignment; R or more where it has none (dropped, or another rank's expert).
        tokens_per_expert_E: Rows of every expert, padding included.
        has_gaps: Whether rows may be padding.
    """

    assignment_R: Tensor
    row_TK: Tensor
    tokens_per_expert_E: Tensor
    has_gaps: bool = False


def plan_permutation(
    topk_ids_TK: Tensor,
    num_experts: int,
    kept_TK: Tensor | None = None,
    num_rows: int | None = None,
    rows_per_expert: int | None = None,
) -> Permutation:
    """Orders the assignments by expert; a stable sort keeps token order within an expert.

    Args:
        topk_ids_TK: Expert of every assignment, in [0, num_experts) wherever it is kept.
        num_experts: E.
        kept_TK: True where the assignment gets a row; ``None`` is everywhere.
        num_rows: How many are kept, where the caller knows it. Otherwise it is counted, which on an
            accelerator waits for the device when ``kept_TK`` is given.
        rows_per_expert: Give every expert so many rows, padded at the end; what is kept has to fit.

    Returns:
        The permutation.

    >>> plan = plan_permutation(torch.tensor([[1, 0], [1, 2]]), num_experts=3)
    >>> plan.assignment_R.tolist(), plan.row_TK.tolist(), plan.tokens_per_expert_E.tolist()
    ([1, 0, 2, 3], [[1, 0], [2, 3]], [1, 2, 1])
    """
    ids_N = topk_ids_TK.reshape(-1)
    if kept_TK is not None:
        ids_N = torch.where(kept_TK.reshape(-1), ids_N, num_experts)  # the dropped sort behind the last expert
    order_N = torch.argsort(ids_N, stable=True)
    row_N = torch.empty_like(order_N)
    row_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    tokens_per_expert_E = count_ids(ids_N, num_experts + 1)[:num_experts]
    if rows_per_expert is not None:
        return _with_gaps(ids_N, row_N, tokens_per_expert_E, rows_per_expert, topk_ids_TK.shape)
    if num_rows is None:
        num_rows = ids_N.numel() if kept_TK is None else int(tokens_per_expert_E.sum())
    return Permutation(order_N[:num_rows], row_N.view_as(topk_ids_TK), tokens_per_expert_E)


def _with_gaps(ids_N: Tensor, row_N: Tensor, counts_E: Tensor, rows_per_expert: int, shape: torch.Size) -> Permutation:
    """Moves every expert's rows to where they start when each has ``rows_per_expert``."""
    num_experts, num_rows = len(counts_E), len(counts_E) * rows_per_expert
    starts_E = torch.arange(num_experts, device=ids_N.device) * rows_per_expert
    shift_E = starts_E - (counts_E.cumsum(0) - counts_E)
    row_N = torch.where(ids_N < num_experts, row_N + shift_E[ids_N.clamp(max=num_experts - 1)], num_rows)
    assignment = torch.full((num_rows + 1,), ids_N.numel(), dtype=torch.int64, device=ids_N.device)
    assignment[row_N] = torch.arange(ids_N.numel(), device=ids_N.device)  # the last place takes all without a row
    return Permutation(
        assignment[:num_rows], row_N.view(shape), torch.full_like(counts_E, rows_per_expert), has_gaps=True
    )


def count_ids(ids_N: Tensor, num_ids: int) -> Tensor:
    """How often each id in [0, num_ids) occurs, int64; unlike ``torch.bincount`` it never waits for the device."""
    return torch.zeros(num_ids, dtype=torch.int64, device=ids_N.device).scatter_add_(0, ids_N, torch.ones_like(ids_N))


def permute(x_TD: Tensor, plan: Permutation) -> Tensor:
    """Rows for the experts, [T, D] -> [R, D]: row r is the token of assignment r."""
    return _Permute.apply(x_TD, plan)


def unpermute(y_RD: Tensor, topk_scores_TK: Tensor, plan: Permutation) -> Tensor:
    """Weighted sum of each token's rows, [R, D] -> [T, D]; an assignment without a row adds nothing.

    The products are summed in the wider of the two dtypes (scores are fp32) and returned in that of ``y_RD``.
    """
    return _Unpermute.apply(y_RD, topk_scores_TK, plan)


def reorder(rows: Tensor, index_R: Tensor) -> Tensor:
    """``rows[index_R]`` for an ``index_R`` that is a permutation of all rows."""
    return _Reorder.apply(rows, index_R)


def _rows_of_tokens(rows_RD: Tensor, plan: Permutation) -> Tensor:
    """[R, D] -> [T, K, D], zero where an assignment has no row."""
    num_rows, D = rows_RD.shape
    is_complete = not plan.has_gaps and num_rows == plan.row_TK.numel()
    return _gather(rows_RD, plan.row_TK.reshape(-1), is_complete).view(*plan.row_TK.shape, D)


def _tokens_of_rows(x_TD: Tensor, plan: Permutation) -> Tensor:
    """[T, D] -> [R, D], zero where a row is padding."""
    return _gather(x_TD, plan.assignment_R // plan.row_TK.shape[1], is_complete=not plan.has_gaps)


def _gather(rows: Tensor, index: Tensor, is_complete: bool) -> Tensor:
    """``rows[index]``, zero where an index is beyond the last row, which needs a look only if not ``is_complete``."""
    if is_complete:
        return rows.index_select(0, index)
    if len(rows) == 0:
        return rows.new_zeros((len(index), *rows.shape[1:]))
    gathered = rows.index_select(0, index.clamp(max=len(rows) - 1))
    return gathered.masked_fill((index >= len(rows)).unsqueeze(-1), 0)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: Permutation) -> Tensor:
        ctx.plan = plan
        return _tokens_of_rows(x_TD, plan)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _rows_of_tokens(grad_RD, ctx.plan).sum(1), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, topk_scores_TK: Tensor, plan: Permutation) -> Tensor:
        ctx.save_for_backward(y_RD, topk_scores_TK)
        ctx.plan = plan
        y_TKD = _rows_of_tokens(y_RD, plan)
        return (y_TKD * topk_scores_TK.unsqueeze(-1)).sum(1).to(y_RD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, topk_scores_TK = ctx.saved_tensors
        grad_RD = _tokens_of_rows(grad_TD, ctx.plan)
        scores_R1 = _gather(topk_scores_TK.reshape(-1, 1), ctx.plan.assignment_R, is_complete=not ctx.plan.has_gaps)
        y_TKD = _rows_of_tokens(y_RD, ctx.plan)
        # Multiplying in the scores' dtype keeps the router's gradient in fp32 when y is bf16.
        grad_scores_TK = (y_TKD.to(topk_scores_TK.dtype) * grad_TD.unsqueeze(1)).sum(-1)
        return (grad_RD * scores_R1).to(y_RD.dtype), grad_scores_TK.to(topk_scores_TK.dtype), None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_R: Tensor) -> Tensor:
        ctx.save_for_backward(index_R)
        return rows.index_select(0, index_R)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index_R,) = ctx.saved_tensors
        return grad.index_select(0, torch.argsort(index_R)), None

"""Local reordering of rows: token order to expert order and back. Nothing here communicates.

Both directions gather, in forward and in backward: a scatter-add would sum in an order that CUDA does not fix.

Shapes: T tokens, D width, K experts per token, N = T*K assignments, R rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_moe.parallel.autograd import check_first_order


@dataclass(frozen=True)
class Permutation:
    """Where each row comes from, and where each assignment went.

    Args:
        assignment_R: Flat index into the T*K assignments of every row; rows are in expert order and, within an
            expert, in token order. T*K where a row is padding.
        row_TK: Row of every assignment; R or more where it has none (dropped, or another rank's expert).
        tokens_per_expert_E: Rows of every expert, without padding.
        rows_per_expert: Rows that every expert has with its padding, which stands at the end; ``None`` where there
            is no padding.
    """

    assignment_R: Tensor
    row_TK: Tensor
    tokens_per_expert_E: Tensor
    rows_per_expert: int | None = None

    @property
    def has_gaps(self) -> bool:
        """Whether rows may be padding."""
        return self.rows_per_expert is not None

    @property
    def rows_E(self) -> Tensor:
        """Rows of every expert, padding included; they sum to R."""
        if self.rows_per_expert is None:
            return self.tokens_per_expert_E
        return torch.full_like(self.tokens_per_expert_E, self.rows_per_expert)

    @property
    def token_R(self) -> Tensor:
        """The token of every row; T where a row is padding."""
        return self.assignment_R // max(self.row_TK.shape[1], 1)


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
    # Integers are sorted by radix: the fewer bits, the fewer passes.
    sortable_N = ids_N.to(torch.int16) if num_experts < 2**15 else ids_N
    order_N = torch.argsort(sortable_N, stable=True)
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
    return Permutation(assignment[:num_rows], row_N.view(shape), counts_E, rows_per_expert)


def count_ids(ids_N: Tensor, num_ids: int) -> Tensor:
    """How often each id in [0, num_ids) occurs, int64; unlike ``torch.bincount`` it never waits for the device."""
    return torch.zeros(num_ids, dtype=torch.int64, device=ids_N.device).scatter_add_(0, ids_N, torch.ones_like(ids_N))


def permute(x_TD: Tensor, plan: Permutation) -> Tensor:
    """Rows for the experts, [T, D] -> [R, D]: row r is the token of assignment r."""
    permuted: Tensor = _Permute.apply(x_TD, plan)
    return permuted


def unpermute(y_RD: Tensor, topk_scores_TK: Tensor, plan: Permutation) -> Tensor:
    """Weighted sum of each token's rows, [R, D] -> [T, D]; an assignment without a row adds nothing.

    The products are summed in the wider of the two dtypes (scores are fp32) and returned in that of ``y_RD``.
    """
    summed: Tensor = _Unpermute.apply(y_RD, topk_scores_TK, plan)
    return summed


@cache
def triton_kernels() -> ModuleType | None:
    """Triton's kernels; ``None`` where Triton is not installed."""
    try:
        return import_module("lightning_moe.dispatch.triton_kernels")
    except ImportError:  # Triton comes with CUDA builds of torch, and those for some platforms are without
        return None


def kernels_for(rows: Tensor) -> ModuleType | None:
    """Triton's kernels where they can work on these rows; ``None`` leaves it to torch."""
    return triton_kernels() if rows.is_cuda else None


def rows_of_tokens(x_TD: Tensor, plan: Permutation) -> Tensor:
    """What :func:`permute` computes, without a gradient."""
    if kernels := kernels_for(x_TD):
        rows: Tensor = kernels.gather_rows(x_TD, plan.token_R)
        return rows
    return gather(x_TD, plan.token_R, is_complete=not plan.has_gaps)


def sum_of_rows(y_RD: Tensor, plan: Permutation) -> Tensor:
    """Sum of each token's rows, [R, D] -> [T, D], without a gradient; in fp32 or wider, returned in the dtype of y."""
    T, top_k = plan.row_TK.shape
    if kernels := kernels_for(y_RD):
        summed: Tensor = kernels.sum_rows(y_RD, plan.row_TK)
        return summed
    if y_RD.device.type == "cpu" and y_RD.dtype in _BAG_DTYPES and not plan.has_gaps:
        row_N = plan.row_TK.reshape(-1)
        ends_T = torch.arange(0, T * top_k, max(top_k, 1))
        if len(y_RD) != T * top_k:  # some have no row
            has_row_N = row_N < len(y_RD)
            ends_T = torch.cat([ends_T.new_zeros(1), has_row_N.view(T, top_k).sum(1).cumsum(0)[:-1]])[:T]
            row_N = row_N[has_row_N]
        if len(row_N) and y_RD.shape[1]:
            return functional.embedding_bag(row_N, y_RD.contiguous(), ends_T, mode="sum")
        return y_RD.new_zeros(T, y_RD.shape[1])
    y_TKD = _rows_by_token(y_RD, plan)
    return y_TKD.sum(1, dtype=torch.promote_types(y_RD.dtype, torch.float32)).to(y_RD.dtype)


_BAG_DTYPES = (torch.float32, torch.bfloat16)
"""For which the CPU has a fast kernel that gathers and sums in one go, in fp32 (in bf16 it rounds ties away from 0)."""


def _rows_by_token(rows_RD: Tensor, plan: Permutation) -> Tensor:
    """[R, D] -> [T, K, D], zero where an assignment has no row."""
    num_rows, D = rows_RD.shape
    is_complete = not plan.has_gaps and num_rows == plan.row_TK.numel()
    return gather(rows_RD, plan.row_TK.reshape(-1), is_complete).view(*plan.row_TK.shape, D)


def gather(rows: Tensor, index: Tensor, is_complete: bool) -> Tensor:
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
        return rows_of_tokens(x_TD, plan)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        if kernels_for(grad_RD):
            check_first_order()
        return sum_of_rows(grad_RD, ctx.plan), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, topk_scores_TK: Tensor, plan: Permutation) -> Tensor:
        ctx.save_for_backward(y_RD, topk_scores_TK)
        ctx.plan = plan
        if kernels := kernels_for(y_RD):
            summed: Tensor = kernels.sum_rows(y_RD, plan.row_TK, topk_scores_TK)
            return summed
        y_TKD = _rows_by_token(y_RD, plan)
        return (y_TKD * topk_scores_TK.unsqueeze(-1)).sum(1).to(y_RD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_RD, topk_scores_TK = ctx.saved_tensors
        if kernels := kernels_for(y_RD):
            check_first_order()
            return *kernels.unpermute_backward(grad_TD, y_RD, topk_scores_TK, ctx.plan.assignment_R), None
        grad_RD = rows_of_tokens(grad_TD, ctx.plan)
        scores_R1 = gather(topk_scores_TK.reshape(-1, 1), ctx.plan.assignment_R, is_complete=not ctx.plan.has_gaps)
        y_TKD = _rows_by_token(y_RD, ctx.plan)
        # Multiplying in the scores' dtype keeps the router's gradient in fp32 when y is bf16.
        grad_scores_TK = (y_TKD.to(topk_scores_TK.dtype) * grad_TD.unsqueeze(1)).sum(-1)
        return (grad_RD * scores_R1).to(y_RD.dtype), grad_scores_TK.to(topk_scores_TK.dtype), None

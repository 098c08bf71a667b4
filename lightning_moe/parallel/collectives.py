"""Collectives that autograd can go through; each one's backward is the opposite collective.

``torch.distributed.nn.functional`` has them for NCCL, but its all-gather has no backward on gloo.
Every rank of the group must call them the same number of times, in forward and in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames both and warns at each call of the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.splits, ctx.group = (output_splits, input_splits), group
        received = rows.new_empty((sum(output_splits), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), list(output_splits), list(input_splits), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        output_splits, input_splits = ctx.splits
        return _AllToAll.apply(grad, input_splits, output_splits, ctx.group), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty((rows.shape[0] * group.size(), *rows.shape[1:]))
        _all_gather_single(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        summed = rows.new_empty((rows.shape[0] // group.size(), *rows.shape[1:]))
        _reduce_scatter_single(summed, rows.contiguous(), group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllGather.apply(grad, ctx.group), None


def all_to_all(
    rows: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Sends ``input_splits[p]`` rows to every peer p and receives ``output_splits[p]`` rows from it.

    Args:
        rows: [sum(input_splits), ...], ordered by destination.
        output_splits: Rows to receive, by peer.
        input_splits: Rows to send, by peer.
        group: The ranks that take part.

    Returns:
        [sum(output_splits), ...], ordered by source.
    """
    return _AllToAll.apply(rows, output_splits, input_splits, group)


def all_gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of every rank, [P, ...] -> [size * P, ...]; P must be the same on every rank."""
    return _AllGather.apply(rows, group)


def reduce_scatter(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks, each keeping its share, [size * P, ...] -> [P, ...]."""
    return _ReduceScatter.apply(rows, group)

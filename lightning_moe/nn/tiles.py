"""The experts on a CPU: each expert's rows in tiles that stay in the cache from the first product to the last.

A tile is gathered from the tokens, goes through both products in buffers that the next one uses again, and is added to
its tokens, so that of many rows no array is written but the fused gate-up output, which is all that backward needs.

Shapes: A tokens on this rank, K experts per token, R rows in expert order, L local experts, D model width, F expert
width, G = 2F where the activation is gated and F where it is not, n rows of a tile, m those with padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_moe.config import Activation
from lightning_moe.dispatch.permute import Permutation, gather, sum_of_rows
from lightning_moe.nn.activation import activate_backward_into, activate_into

TILE = 1024
"""Most rows of a tile: of more, what one product wrote has left the cache before the next reads it; with fewer, each
product's own preparation of its weights, once per tile, begins to count."""


def run_in_tiles(
    x_AD: Tensor, weights_AK: Tensor, plan: Permutation, w1_LGD: Tensor, w2_LDF: Tensor, activation: Activation
) -> Tensor:
    """``y[a] = sum over k of weights[a, k] * E_k(x[a])``, [A, D] -> [A, D], in the dtype of ``x``; on the CPU only.

    The weight's gradient is the scalar product of the activation and its gradient, so that no expert's output is kept
    (SonicMoE, Guo et al. 2025).
    """
    y_AD: Tensor = _Tiles.apply(x_AD, weights_AK, w1_LGD, w2_LDF, plan, activation)
    return y_AD


@dataclass(frozen=True)
class _Tile:
    """Rows [start, start + size) of one expert; ``padded`` of them go into a product."""

    expert: int
    start: int
    size: int
    padded: int
    is_first: bool
    is_only: bool

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def spilled(self) -> slice:
        """The rows that a product writes: the padding runs into rows that later tiles write, or nobody reads."""
        return slice(self.start, self.start + self.padded)


def _tiles(plan: Permutation, dtype: torch.dtype) -> Iterator[_Tile]:
    """In the order of rows; an expert's tiles are of about one size."""
    start = 0
    multiple = _row_multiple(dtype)
    for expert, size in enumerate(plan.tokens_per_expert_E.tolist()):
        begin = start if plan.rows_per_expert is None else expert * plan.rows_per_expert
        start = begin + size
        number = -(-size // TILE)
        for i in range(number):
            first, end = size * i // number, size * (i + 1) // number
            padded = -(-(end - first) // multiple) * multiple
            yield _Tile(expert, begin + first, end - first, padded, i == 0, number == 1)


def _row_multiple(dtype: torch.dtype) -> int:
    """Products in bf16 are compiled for every number of rows (by oneDNN), which takes as long: so give it few."""
    return 8 if dtype in (torch.bfloat16, torch.float16) else 1


class _Buffers:
    """Memory for one tile, used again by each."""

    def __init__(self, like: Tensor, num_rows: int, **widths: int) -> None:
        self._of = {name: like.new_empty(num_rows, width) for name, width in widths.items()}

    def __call__(self, num_rows: int, *names: str) -> list[Tensor]:
        return [self._of[name][:num_rows] for name in names]


class _SumByToken:
    """Sums rows by token.

    Few rows are kept and summed at the end, in one pass; many are added tile by tile, so that none is kept.
    """

    def __init__(self, like_AD: Tensor, plan: Permutation, largest: int) -> None:
        num_rows, D = len(plan.assignment_R), like_AD.shape[1]
        self.plan, self.dtype = plan, like_AD.dtype
        self.keeps_rows = num_rows * D * like_AD.element_size() <= _FEW_BYTES and not plan.has_gaps
        self.rows = like_AD.new_empty(num_rows + _row_multiple(self.dtype) - 1 if self.keeps_rows else largest, D)
        if not self.keeps_rows:
            self.total_AD = like_AD.new_zeros(like_AD.shape, dtype=_wide(self.dtype))

    def rows_of(self, tile: _Tile) -> Tensor:
        """Where the tile's rows are to be written."""
        return self.rows[tile.spilled] if self.keeps_rows else self.rows[: tile.padded]

    def add(self, tile: _Tile, token: Tensor, weights: Tensor | None) -> None:
        """Adds what was written, each row times its weight."""
        rows = self.rows_of(tile)[: tile.size]
        if self.keeps_rows:
            if weights is not None:
                rows.mul_(weights)
            return
        rows = rows.to(self.total_AD.dtype)
        self.total_AD.index_add_(0, token, rows if weights is None else rows.mul_(weights))

    def result(self) -> Tensor:
        """[A, D]."""
        if self.keeps_rows:
            return sum_of_rows(self.rows[: len(self.plan.assignment_R)], self.plan)
        return self.total_AD.to(self.dtype)


_FEW_BYTES = 8 * 2**20
"""Rows that stay in the cache until they are summed."""


class _WeightGradient:
    """Gradient of stacked weights, to which every tile adds a product."""

    def __init__(self, weight_LGD: Tensor, is_needed: bool, plan: Permutation) -> None:
        self.total_LGD = torch.empty_like(weight_LGD) if is_needed else None
        self._sum_GD: Tensor | None = None
        if self.total_LGD is not None:
            for expert, size in enumerate(plan.tokens_per_expert_E.tolist()):
                if size == 0:
                    self.total_LGD[expert].zero_()

    def add(self, tile: _Tile, left: Tensor, right: Tensor) -> None:
        """Adds ``left @ right`` to that of the tile's expert."""
        if self.total_LGD is None:
            return
        total_GD, is_wide = self.total_LGD[tile.expert], left.dtype == _wide(left.dtype)
        if tile.is_only or (tile.is_first and is_wide):
            torch.mm(left, right, out=total_GD)
        elif is_wide:
            total_GD.addmm_(left, right)
        else:  # rounded to bf16 after every tile, small gradients would be lost on large ones
            if self._sum_GD is None:
                self._sum_GD = torch.empty_like(total_GD, dtype=_wide(left.dtype))
            if tile.is_first:
                self._sum_GD.zero_()
            total_GD.copy_(self._sum_GD.add_(left @ right))


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_AD: Tensor,
        weights_AK: Tensor,
        w1_LGD: Tensor,
        w2_LDF: Tensor,
        plan: Permutation,
        activation: Activation,
    ) -> Tensor:
        (D, F), G = w2_LDF.shape[1:], w1_LGD.shape[1]
        tiles, token_R, weights_R1 = _prepared(x_AD, weights_AK, plan)
        largest = max((tile.padded for tile in tiles), default=0)
        buffers, y = _Buffers(x_AD, largest, x=D, act=F), _SumByToken(x_AD, plan, largest)
        h_RG = x_AD.new_empty(len(token_R) + _row_multiple(x_AD.dtype) - 1, G)
        for tile in tiles:
            x, act = buffers(tile.padded, "x", "act")
            rows, size, token = tile.rows, tile.size, token_R[tile.rows]
            torch.index_select(x_AD, 0, token, out=x[:size])
            torch.mm(x, w1_LGD[tile.expert].t(), out=h_RG[tile.spilled])
            activate_into(h_RG[rows], activation, act_RF=act[:size])
            torch.mm(act, w2_LDF[tile.expert].t(), out=y.rows_of(tile))
            y.add(tile, token, weights_R1[rows])
        ctx.save_for_backward(x_AD, weights_AK, w1_LGD, w2_LDF, h_RG)
        ctx.plan, ctx.activation = plan, activation
        return y.result()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, weights_AK, w1_LGD, w2_LDF, h_RG = ctx.saved_tensors
        plan: Permutation = ctx.plan
        (D, F), G = w2_LDF.shape[1:], w1_LGD.shape[1]
        tiles, token_R, weights_R1 = _prepared(x_AD, weights_AK, plan)
        largest = max((tile.padded for tile in tiles), default=0)
        buffers = _Buffers(x_AD, largest, x=D, grad_y=D, act=F, silu=F, grad_act=F, grad_h=G)
        needs_x, _, needs_w1, needs_w2 = ctx.needs_input_grad[:4]
        grad_w1, grad_w2 = _WeightGradient(w1_LGD, needs_w1, plan), _WeightGradient(w2_LDF, needs_w2, plan)
        grad_weights_R = weights_AK.new_zeros(len(token_R))
        grad_x = _SumByToken(x_AD, plan, largest)
        for tile in tiles:
            x, grad_y, act, silu, grad_act, grad_h = buffers(
                tile.padded, "x", "grad_y", "act", "silu", "grad_act", "grad_h"
            )
            rows, size, token, weights = tile.rows, tile.size, token_R[tile.rows], weights_R1[tile.rows]
            torch.index_select(grad_AD, 0, token, out=grad_y[:size])
            torch.mm(grad_y, w2_LDF[tile.expert], out=grad_act)  # without the weight, for the weight's own gradient
            activate_into(h_RG[rows], ctx.activation, act_RF=act[:size], silu_RF=silu[:size])
            products = torch.mul(act[:size], grad_act[:size], out=grad_h[:size, :F])
            torch.sum(products, 1, dtype=grad_weights_R.dtype, out=grad_weights_R[rows])
            grad_y[:size].mul_(weights)
            activate_backward_into(
                h_RG[rows], ctx.activation, grad_act[:size].mul_(weights), silu[:size], grad_h_RG=grad_h[:size]
            )
            torch.index_select(x_AD, 0, token, out=x[:size])
            for padded in (grad_y, act, grad_h, x):  # what stands there would be summed into the weights' gradients
                padded[size:].zero_()
            grad_w2.add(tile, grad_y.t(), act)
            grad_w1.add(tile, grad_h.t(), x)
            if needs_x:
                torch.mm(grad_h, w1_LGD[tile.expert], out=grad_x.rows_of(tile))
                grad_x.add(tile, token, None)
        grad_weights_AK = gather(grad_weights_R.unsqueeze(1), plan.row_TK.reshape(-1), is_complete=False)
        grads = (
            grad_x.result() if needs_x else None,
            grad_weights_AK.view_as(weights_AK),
            grad_w1.total_LGD,
            grad_w2.total_LGD,
        )
        return *grads, None, None


def _prepared(x_AD: Tensor, weights_AK: Tensor, plan: Permutation) -> tuple[list[_Tile], Tensor, Tensor]:
    """The tiles, and the token and the weight of every row."""
    weights_R1 = gather(weights_AK.reshape(-1, 1), plan.assignment_R, is_complete=not plan.has_gaps)
    return list(_tiles(plan, x_AD.dtype)), plan.token_R, weights_R1


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What is summed over several tiles is summed in fp32 at least."""
    return torch.promote_types(dtype, torch.float32)

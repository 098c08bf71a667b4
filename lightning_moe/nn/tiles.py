"""The experts on a CPU: each expert's rows in tiles that stay in the cache from the first product to the last.

A tile is gathered from the tokens and goes through both products in buffers that the next one uses again. Of all rows
only the gate-up product is kept for backward, and of a run of tiles what is to be summed by token.

No block of memory is larger than it must be, since the allocator gives large ones back to the system and every page of
a new one costs a fault: the gate-up product is one block per tile, the rows to be summed are one that every run uses.

Shapes: A tokens on this rank, K experts per token, R rows in expert order, L local experts, D model width, F expert
width, P = 2 where the activation is gated and 1 where it is not, G = P*F, n rows of a tile with padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_moe.config import Activation
from lightning_moe.dispatch.permute import Permutation, gather
from lightning_moe.nn.activation import activate_backward_into, activate_into
from lightning_moe.parallel.autograd import first_order

TILE = 1024
"""Most rows of a tile: of more, what one product wrote has left the cache before the next reads it; with fewer, each
product's own preparation of its weights, once per tile, begins to count."""

_ROW_MULTIPLE = 8
"""Of the rows of a product in bf16: oneDNN compiles one for every number of rows, which takes as long as to run it."""

_RUN_BYTES = 16 * 2**20
"""Of rows that are kept until they are summed by token, and of their sums. glibc's malloc maps blocks above 32 MiB anew
each time."""

_MOST_RUNS = 8
"""Every run looks at all tokens, so that many rows are kept in a larger block rather than summed more often."""


def run_in_tiles(
    x_AD: Tensor, weights_AK: Tensor, plan: Permutation, w1_LGD: Tensor, w2_LDF: Tensor, activation: Activation
) -> Tensor:
    """``y[a] = sum over k of weights[a, k] * E_k(x[a])``, [A, D] -> [A, D], in the dtype of ``x``; on the CPU only.

    The weight's gradient is the scalar product of the activation and its gradient, so that no expert's output is kept
    (SonicMoE, Guo et al. 2025).
    """
    inputs = x_AD, weights_AK, w2_LDF, w1_LGD
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    y_AD: Tensor = _Tiles.apply(*inputs, plan, activation, keep)
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


def _tiles(plan: Permutation, dtype: torch.dtype) -> list[_Tile]:
    """In the order of rows; an expert's tiles are of about one size."""
    tiles = []
    start = 0
    multiple = _ROW_MULTIPLE if dtype in (torch.bfloat16, torch.float16) else 1
    for expert, size in enumerate(plan.tokens_per_expert_E.tolist()):
        begin = start if plan.rows_per_expert is None else expert * plan.rows_per_expert
        start = begin + size
        number = -(-size // TILE)
        for i in range(number):
            first, end = size * i // number, size * (i + 1) // number
            padded = -(-(end - first) // multiple) * multiple
            tiles.append(_Tile(expert, begin + first, end - first, padded, i == 0, number == 1))
    return tiles


@dataclass(frozen=True)
class _Run:
    """Tiles whose rows are summed together."""

    tiles: list[_Tile]

    @property
    def start(self) -> int:
        return self.tiles[0].start

    @property
    def size(self) -> int:
        """Rows from the first tile's start to the last one's end."""
        return self.tiles[-1].start + self.tiles[-1].size - self.start

    def place_of(self, tile: _Tile) -> slice:
        """The rows that a product writes, from the start of the run; its padding runs into those of later tiles."""
        return slice(tile.start - self.start, tile.start - self.start + tile.padded)


def _runs(tiles: list[_Tile], bytes_per_row: int) -> list[_Run]:
    """At most ``_MOST_RUNS`` of about one size."""
    total = sum(tile.size for tile in tiles)
    number = min(-(-total * bytes_per_row // _RUN_BYTES), _MOST_RUNS)
    runs: list[list[_Tile]] = [[] for _ in range(number)]
    done = 0
    for tile in tiles:
        runs[done * number // total].append(tile)
        done += tile.size
    return [_Run(run) for run in runs if run]


class _SumByToken:
    """Sums rows by token, a run at a time."""

    def __init__(self, like_AD: Tensor, plan: Permutation, runs: list[_Run]) -> None:
        self._like_AD, self._row_AK = like_AD, plan.row_TK
        longest = max((run.size for run in runs), default=0)
        self._rows = like_AD.new_empty(longest + _ROW_MULTIPLE, like_AD.shape[1])
        # A sum of two is rounded once either way.
        self._wide = _wide(like_AD.dtype) if len(runs) > 2 else like_AD.dtype
        self._total_AD: Tensor | None = None
        self._tokens = max(_RUN_BYTES // (like_AD.shape[1] * like_AD.element_size()), 1)  # whose sums are made at once

    def rows_of(self, run: _Run, tile: _Tile) -> Tensor:
        """Where a tile is to be written."""
        return self._rows[run.place_of(tile)]

    def add(self, run: _Run) -> None:
        """Adds what was written."""
        rows = self._rows[: run.size + 1]
        rows[run.size].zero_()  # for assignments that have no row in this run
        index_AK = self._row_AK - run.start
        index_AK.masked_fill_((index_AK < 0) | (index_AK >= run.size), run.size)
        if self._total_AD is None and len(index_AK) <= self._tokens:
            self._total_AD = functional.embedding_bag(index_AK, rows, mode="sum").to(self._wide)
            return
        if self._total_AD is None:
            self._total_AD = torch.zeros_like(self._like_AD, dtype=self._wide)
        for total, index in zip(self._total_AD.split(self._tokens), index_AK.split(self._tokens), strict=True):
            total.add_(functional.embedding_bag(index, rows, mode="sum"))

    def result(self) -> Tensor:
        """[A, D]."""
        if self._total_AD is None:
            return torch.zeros_like(self._like_AD)
        return self._total_AD.to(self._like_AD.dtype)


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
    """Takes w2 before w1, because gradients leave in that order, as they do from any other network.

    Ranks with the same experts may come by different ways, depending on their tokens, and DeepSpeed's ZeRO 1 and 2 add
    up what they hand it in the order in which they do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_AD: Tensor,
        weights_AK: Tensor,
        w2_LDF: Tensor,
        w1_LGD: Tensor,
        plan: Permutation,
        activation: Activation,
        keep: bool,
    ) -> Tensor:
        D, F = w2_LDF.shape[1:]
        work = _Work(x_AD, weights_AK, plan)
        x_nD, act_nF = work.buffers(D, F)
        w1_LPFD = w1_LGD.unflatten(1, (-1, F))
        y = _SumByToken(x_AD, plan, work.runs)
        h: list[Tensor] = []
        memory = None if keep else work.buffers(w1_LGD.shape[1])[0]
        for run in work.runs:
            for tile in run.tiles:
                n, expert = tile.padded, tile.expert
                token, weights = work.token_R[tile.rows], work.weights_R1[tile.rows]
                h_PnF = x_AD.new_empty(w1_LPFD.shape[1], n, F) if memory is None else _parts(memory, n, F)
                torch.index_select(x_AD, 0, token, out=x_nD[: tile.size])
                for part, w1_FD in zip(h_PnF, w1_LPFD[expert], strict=True):  # so that each is contiguous
                    torch.mm(x_nD[:n], w1_FD.t(), out=part)
                activate_into(h_PnF, activation, act_nF=act_nF[:n])
                act_nF[: tile.size].mul_(weights)
                torch.mm(act_nF[:n], w2_LDF[expert].t(), out=y.rows_of(run, tile))
                if keep:
                    h.append(h_PnF)
            y.add(run)
        ctx.save_for_backward(x_AD, weights_AK, w2_LDF, w1_LGD, *h)
        ctx.plan, ctx.activation = plan, activation
        return y.result()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, weights_AK, w2_LDF, w1_LGD, *h = ctx.saved_tensors
        plan: Permutation = ctx.plan
        (D, F), G = w2_LDF.shape[1:], w1_LGD.shape[1]
        work = _Work(x_AD, weights_AK, plan)
        x_nD, grad_y_nD, act_nF, silu_nF, grad_act_nF, grad_h_nG = work.buffers(D, D, F, F, F, G)
        needs_x, _, needs_w2, needs_w1 = ctx.needs_input_grad[:4]
        grad_w1, grad_w2 = _WeightGradient(w1_LGD, needs_w1, plan), _WeightGradient(w2_LDF, needs_w2, plan)
        grad_weights_R = weights_AK.new_zeros(len(work.token_R))
        grad_x = _SumByToken(x_AD, plan, work.runs) if needs_x else None
        saved = iter(h)
        for run in work.runs:
            for tile in run.tiles:
                n, rows, expert = tile.padded, slice(tile.size), tile.expert
                token, weights = work.token_R[tile.rows], work.weights_R1[tile.rows]
                h_PnF, x, grad_y = next(saved), x_nD[:n], grad_y_nD[:n]
                act, silu, grad_act, grad_h = act_nF[:n], silu_nF[:n], grad_act_nF[:n], grad_h_nG[:n]
                torch.index_select(grad_AD, 0, token, out=grad_y[rows])
                torch.mm(grad_y, w2_LDF[expert], out=grad_act)  # without the weight, for the weight's own gradient
                activate_into(h_PnF, ctx.activation, act_nF=act, silu_nF=silu)
                products = torch.mul(act[rows], grad_act[rows], out=grad_h[rows, :F])
                torch.sum(products, 1, dtype=grad_weights_R.dtype, out=grad_weights_R[tile.rows])
                act[rows].mul_(weights)
                grad_act[rows].mul_(weights)
                activate_backward_into(h_PnF, ctx.activation, grad_act, silu, grad_h_nG=grad_h)
                torch.index_select(x_AD, 0, token, out=x[rows])
                if n > tile.size:  # what stands in the padding would be summed into the weights' gradients
                    for padded in (grad_y, act, grad_h, x):
                        padded[tile.size :].zero_()
                grad_w2.add(tile, grad_y.t(), act)
                grad_w1.add(tile, grad_h.t(), x)
                if grad_x is not None:
                    torch.mm(grad_h, w1_LGD[expert], out=grad_x.rows_of(run, tile))
            if grad_x is not None:
                grad_x.add(run)
        grad_weights_AK = gather(grad_weights_R.unsqueeze(1), plan.row_TK.reshape(-1), is_complete=False)
        grads = (
            None if grad_x is None else grad_x.result(),
            grad_weights_AK.view_as(weights_AK),
            grad_w2.total_LGD,
            grad_w1.total_LGD,
        )
        return *grads, None, None, None


def _parts(memory: Tensor, n: int, F: int) -> Tensor:
    """The beginning of it as [P, n, F]."""
    return memory.view(-1)[: memory.shape[1] * n].view(-1, n, F)


class _Work:
    """What forward and backward walk along."""

    def __init__(self, x_AD: Tensor, weights_AK: Tensor, plan: Permutation) -> None:
        tiles = _tiles(plan, x_AD.dtype)
        self._like, self._largest = x_AD, max((tile.padded for tile in tiles), default=0)
        self.runs = _runs(tiles, x_AD.shape[1] * x_AD.element_size())
        self.token_R = plan.token_R
        weights_R1 = gather(weights_AK.reshape(-1, 1), plan.assignment_R, is_complete=not plan.has_gaps)
        self.weights_R1 = weights_R1.to(x_AD.dtype)  # mixed products take three times as long

    def buffers(self, *widths: int) -> list[Tensor]:
        """Memory for one tile, which each uses again."""
        return [self._like.new_empty(self._largest, width) for width in widths]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What is summed over several tiles is summed in fp32 at least."""
    return torch.promote_types(dtype, torch.float32)

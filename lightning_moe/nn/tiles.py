"""The experts on a CPU: each expert's rows in tiles that stay in the cache from the first product to the last.

A tile is gathered from the tokens and goes through both products in buffers that the next one uses again. Of all rows
only the gate-up product is kept for backward, and of a run of tiles what is to be summed by token.

With more than one thread, each works on experts of its own: an operation on one tile is too small to be divided. An
expert's tiles come in the same order either way.

No block of memory is larger than it must be, since the allocator gives large ones back to the system and every page of
a new one costs a fault: the gate-up product is one block per tile, the rows to be summed are one that every run uses.
Nothing large is allocated by a worker, from whose arena glibc gives back blocks of any size.

Shapes: A tokens on this rank, K experts per token, R rows in expert order, L local experts, D model width, F expert
width, P = 2 where the activation is gated and 1 where it is not, G = P*F, n rows of a tile with padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lightning_moe.config import Activation
from lightning_moe.dispatch.permute import Permutation, gather
from lightning_moe.nn.tile_operations import TileOperations, operations_for
from lightning_moe.nn.tiling import Run, SumByToken, Tile, cut, runs_of, wide
from lightning_moe.nn.workers import num_workers, run_parts
from lightning_moe.parallel.autograd import first_order


def run_in_tiles(
    x_AD: Tensor, weights_AK: Tensor, plan: Permutation, w1_LGD: Tensor, w2_LDF: Tensor, activation: Activation
) -> Tensor:
    """``y[a] = sum over k of weights[a, k] * E_k(x[a])``, [A, D] -> [A, D], in the dtype of ``x``; on the CPU only.

    The weight's gradient is the scalar product of the activation and its gradient, so that no expert's output is kept
    (SonicMoE, Guo et al. 2025).
    """
    assert len(x_AD) == len(plan.row_TK)
    inputs = _plain(x_AD), weights_AK, w2_LDF, w1_LGD
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    y_AD: Tensor = _Tiles.apply(*inputs, plan, activation, keep)
    return y_AD


class _WeightGradient:
    """Gradient of stacked weights, to which every tile adds a product."""

    def __init__(self, weight_LGD: Tensor, is_needed: bool, plan: Permutation) -> None:
        self.total_LGD = torch.empty_like(weight_LGD) if is_needed else None
        self._totals = [] if self.total_LGD is None else self.total_LGD.unbind()
        self._wide = wide(weight_LGD.dtype)
        self._sums: dict[int, Tensor] = {}
        for total_GD, size in zip(self._totals, plan.tokens_per_expert_E.tolist(), strict=False):
            if size == 0:
                total_GD.zero_()

    def add(self, tile: Tile, left: Tensor, right: Tensor) -> None:
        """Adds ``left @ right`` to that of the tile's expert."""
        if self.total_LGD is None:
            return
        total_GD, is_wide = self._totals[tile.expert], left.dtype == self._wide
        if tile.is_first and (is_wide or tile.is_last):
            torch.mm(left, right, out=total_GD)
        elif is_wide:
            total_GD.addmm_(left, right)
        else:  # rounded to bf16 after every tile, small gradients would be lost on large ones
            # Into a tensor of its own, since autocast, which a thread may or may not have, leaves such products alone.
            product_GD = torch.mm(left, right, out=torch.empty_like(total_GD)).to(self._wide)
            sum_GD = product_GD if tile.is_first else self._sums.pop(tile.expert).add_(product_GD)
            if tile.is_last:
                total_GD.copy_(sum_GD)
            else:
                self._sums[tile.expert] = sum_GD


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
        (D, F), G = w2_LDF.shape[1:], w1_LGD.shape[1]
        work = _Work(x_AD, weights_AK, plan, activation, D, F, *() if keep else (G,))
        w1_LPFD = w1_LGD.unflatten(1, (-1, F))
        y = SumByToken(x_AD, weights_AK, plan, work.runs)
        h = [x_AD.new_empty(G // F, tile.padded, F) for tile in work.tiles] if keep else []

        def prepare(run: Run, tile: Tile, x_nD: Tensor, act_nF: Tensor, *memory: Tensor) -> _Step:
            n, token_m, y_nD = tile.padded, work.token_R[tile.rows], y.rows_of(run, tile)
            h_PnF = h[tile.index] if keep else memory[0].view(-1)[: n * G].view(-1, n, F)
            # So that each part is contiguous: the processor foresees what is read in a row.
            parts = [(h_nF, w1_FD.t()) for h_nF, w1_FD in zip(h_PnF, w1_LPFD[tile.expert], strict=True)]
            w2_FD = w2_LDF[tile.expert].t()

            def step(do: TileOperations) -> None:
                do.gather(x_AD, token_m, out_nD=x_nD)
                for h_nF, w1_DF in parts:
                    torch.mm(x_nD, w1_DF, out=h_nF)
                do.activate(h_PnF, act_nF=act_nF)
                torch.mm(act_nF, w2_FD, out=y_nD)

            return step

        for run in work.runs:
            work.walk(run, prepare)
            y.add(run)
        ctx.save_for_backward(x_AD, weights_AK, w2_LDF, w1_LGD, *h)
        ctx.plan, ctx.activation = plan, activation
        return y.result()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, weights_AK, w2_LDF, w1_LGD, *h = ctx.saved_tensors
        x_AD, *h = map(_plain, (x_AD, *h))  # users' hooks may have changed what was kept
        assert all(h_PnF.dtype == x_AD.dtype for h_PnF in h)
        plan: Permutation = ctx.plan
        (D, F), G = w2_LDF.shape[1:], w1_LGD.shape[1]
        grad_AD = _plain(grad_AD)
        work = _Work(x_AD, weights_AK, plan, ctx.activation, D, D, F, F, F, G)
        needs_x, _, needs_w2, needs_w1 = ctx.needs_input_grad[:4]
        grad_w1, grad_w2 = _WeightGradient(w1_LGD, needs_w1, plan), _WeightGradient(w2_LDF, needs_w2, plan)
        grad_weights_R = weights_AK.new_zeros(len(work.token_R))
        grad_x = SumByToken(x_AD, None, plan, work.runs) if needs_x else None

        def prepare(
            run: Run,
            tile: Tile,
            x: Tensor,
            grad_y: Tensor,
            act: Tensor,
            grad_act: Tensor,
            memory: Tensor,
            grad_h: Tensor,
        ) -> _Step:
            w1_GD, w2_DF, h_PnF = w1_LGD[tile.expert], w2_LDF[tile.expert], h[tile.index]
            token_m, weights_m = work.token_R[tile.rows], work.weights_R[tile.rows]
            grad_weights_m = grad_weights_R[tile.rows]
            grad_y_Dn, grad_h_Gn = grad_y.t(), grad_h.t()
            grad_x_nD = None if grad_x is None else grad_x.rows_of(run, tile)

            def step(do: TileOperations) -> None:
                do.gather(grad_AD, token_m, out_nD=grad_y)
                torch.mm(grad_y, w2_DF, out=grad_act)  # without the weight, for the weight's own gradient
                do.activate_backward(
                    h_PnF,
                    grad_act,
                    weights_m,
                    act_nF=act,
                    grad_h_nG=grad_h,
                    grad_weights_m=grad_weights_m,
                    memory_nF=memory,
                )
                do.gather(x_AD, token_m, out_nD=x)
                grad_w2.add(tile, grad_y_Dn, act)
                grad_w1.add(tile, grad_h_Gn, x)
                if grad_x_nD is not None:
                    torch.mm(grad_h, w1_GD, out=grad_x_nD)

            return step

        for run in work.runs:
            work.walk(run, prepare)
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


class _Work:
    """What forward and backward walk along, with memory of some widths for one tile at a time on every thread."""

    def __init__(
        self, x_AD: Tensor, weights_AK: Tensor, plan: Permutation, activation: Activation, *widths: int
    ) -> None:
        self.tiles = cut(plan, x_AD.dtype)
        self.runs = runs_of(self.tiles, x_AD.shape[1] * x_AD.element_size(), num_workers())
        self.token_R = plan.token_R
        weights_R1 = gather(weights_AK.reshape(-1, 1), plan.assignment_R, is_complete=not plan.has_gaps)
        self.weights_R = weights_R1.squeeze(1)
        most = max((tile.padded for tile in self.tiles), default=0)
        number = max((len(run.shares) for run in self.runs), default=0)
        self._operations = partial(operations_for, x_AD, weights_AK, activation)
        self._buffers = [[x_AD.new_empty(most, width) for width in widths] for _ in range(number)]

    def walk(self, run: Run, prepare: Callable[..., _Step]) -> None:
        """Takes the step that ``prepare(run, tile, *buffers)`` returns for every tile."""
        do = self._operations(torch.get_num_threads() // len(run.shares))
        parts = [
            partial(_walk, *part, partial(prepare, run), do) for part in zip(run.shares, self._buffers, strict=False)
        ]
        if len(parts) == 1:
            parts[0]()
        else:
            run_parts(parts)


def _plain(tensor: Tensor) -> Tensor:
    """With its values in memory as they are, one after the other: copied only where they are not."""
    return tensor.resolve_neg().contiguous()


def _walk(tiles: list[Tile], buffers: list[Tensor], prepare: Callable[..., _Step], do: TileOperations) -> None:
    of_rows = cache(lambda rows: [buffer[:rows] for buffer in buffers])
    for start in range(0, len(tiles), _PREPARED):
        for step in [prepare(tile, *of_rows(tile.padded)) for tile in tiles[start : start + _PREPARED]]:
            step(do)


_PREPARED = 8
"""Tiles whose views are made at once: after a product, which leaves nothing else in the cache, each takes several times
as long. Made for all at once, they would keep other workers from beginning."""

_Step = Callable[[TileOperations], None]
"""What is done to one tile."""

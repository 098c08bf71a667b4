"""Finds the fastest dispatcher by trying all of them on the real batch.

Shapes: T local tokens, D width, K experts per token, A tokens that arrive here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_moe.dispatch.base import Dispatcher, FixedShape
from lightning_moe.parallel import ExpertGroups
from lightning_moe.parallel.autograd import in_backward


class DispatchTuner:
    """Times candidates in the backward of the first micro-batches, then chooses one for good.

    In backward, because that leaves a layer once a micro-batch whatever is recomputed. The choice takes effect once no
    forward waits for its backward, because a forward and its recomputation must take the same way. A trial moves the
    micro-batch's own tokens there and back and their gradients, with no experts between: those cost the same for all.
    What the layer computes stays as it is.

    Args:
        candidates: Dispatchers by name.
        groups: All ranks of the EP and the EDP group agree.
        num_chunks: Parts in which tokens travel.
        current: What to use meanwhile.

    Attributes:
        layer: What the log calls the layer whose tokens these are.
        chosen: Name of the fastest; ``None`` while trials go on.
        seconds: Times of each candidate, each that of the slowest rank; the first trial, which warms up, is left out.
    """

    TRIALS = 4
    """Micro-batches; the first warms up."""

    def __init__(
        self,
        candidates: Mapping[str, Dispatcher[Any]],
        groups: ExpertGroups,
        num_chunks: int,
        current: Dispatcher[Any],
    ) -> None:
        self.candidates = dict(candidates)
        self.groups = groups
        self.num_chunks = num_chunks
        self._current = current
        self.layer = "this MoE layer"
        self.chosen: str | None = None
        self.seconds: dict[str, list[float]] = {name: [] for name in candidates}
        self._trials = 0
        self._under_way = 0

    def __deepcopy__(self, memo: dict[int, object]) -> DispatchTuner:
        """Copies of a model, as for weight averaging, make the same choice; a process group has no copy."""
        return self

    @property
    def current(self) -> Dispatcher[Any]:
        """What to use in a forward that begins now."""
        if self.chosen is not None and self._under_way == 0 and not in_backward():
            self._current = self.candidates[self.chosen]
        return self._current

    def watch(
        self,
        topk_ids_TK: Tensor,
        kept_TK: Tensor | None,
        shape: FixedShape | None,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and weights as they are, on their way into ``dispatch``; a trial follows on their gradients' return.

        Collective there over the ranks that agree. No trial is made where neither has a gradient.
        """
        has_gradient = torch.is_grad_enabled() and (x_TD.requires_grad or topk_scores_TK.requires_grad)
        if not has_gradient or (self.chosen is not None and self._under_way == 0):
            return x_TD, topk_scores_TK
        batch = x_TD.detach(), topk_ids_TK, topk_scores_TK.detach(), kept_TK, shape
        is_first = not in_backward()  # and no recomputation, whose graph may never have a backward

        def attempt() -> None:
            self._under_way -= is_first
            if self.chosen is None:
                self._try(*batch)

        self._under_way += is_first
        if x_TD.requires_grad:
            return _Trial.apply(x_TD, attempt), topk_scores_TK
        return x_TD, _Trial.apply(topk_scores_TK, attempt)

    def _try(self, *batch: Any) -> None:
        device = batch[0].device
        times = torch.tensor([self._time(dispatcher, *batch) for dispatcher in self.candidates.values()], device=device)
        for group in (self.groups.ep_group, self.groups.edp_group):
            if group is not None:
                dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
        if self._trials > 0:
            for name, seconds in zip(self.candidates, times.tolist(), strict=True):
                self.seconds[name].append(seconds)
        self._trials += 1
        if self._trials == self.TRIALS:
            self._choose()

    def _choose(self) -> None:
        medians = {name: statistics.median(seconds) for name, seconds in self.seconds.items()}
        self.chosen = min(medians, key=lambda name: medians[name])
        times = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in medians.items())
        rank_zero_info(
            f"dispatcher='tune': {self.layer} goes on with {self.chosen}. There and back with gradients, median of "
            f"{self.TRIALS - 1} batches on the slowest rank: {times}."
        )

    def _time(
        self,
        dispatcher: Dispatcher[Any],
        x_TD: Tensor,
        topk_ids_TK: Tensor,
        topk_scores_TK: Tensor,
        kept_TK: Tensor | None,
        shape: FixedShape | None,
    ) -> float:
        """Seconds of one journey there and back, and of its gradients."""
        with torch.enable_grad():
            x_TD, scores_TK = x_TD.clone().requires_grad_(), topk_scores_TK.clone().requires_grad_()
            dist.barrier(self.groups.ep_group)
            start = _now(x_TD.device)
            routes = dispatcher.plan(topk_ids_TK, kept_TK, shape, self.num_chunks)
            parts = dispatcher.dispatch(x_TD, scores_TK, routes)
            leaving = [
                dispatcher.combine((part.x_AD * part.weights_AK.sum(1, keepdim=True)).to(x_TD.dtype), part)
                for part in parts
            ]
            y_TD = torch.cat([part.wait() for part in leaving])
            torch.autograd.grad(y_TD, (x_TD, scores_TK), torch.ones_like(y_TD))
            return _now(x_TD.device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Trial(torch.autograd.Function):
    """Identity whose backward does something else as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, attempt: Callable[[], None]) -> Tensor:
        ctx.attempt = attempt
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.attempt()
        return grad, None

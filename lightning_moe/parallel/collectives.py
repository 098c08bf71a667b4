"""Collectives that are started now and waited for later, and journeys that autograd can follow.

Every rank of the group must start them in the same order and equally often, in forward and in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.parallel.autograd import first_order
from lightning_moe.parallel.traffic import TrafficMeter

# torch 2.13 renames both and warns at each call of the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Pending(Generic[T]):
    """A result that is on its way.

    Args:
        wait: Returns it when it is there; called once.
    """

    wait: Callable[[], T]

    def then(self, finish: Callable[[T], U]) -> Pending[U]:
        """What ``finish`` makes of it once it is there."""
        return Pending(lambda: finish(self.wait()))


def start_all_to_all(
    rows: Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group: dist.ProcessGroup,
    meter: TrafficMeter | None = None,
) -> Pending[Tensor]:
    """Sends ``input_splits[p]`` rows to every peer p and receives ``output_splits[p]`` rows from it.

    Args:
        rows: [sum(input_splits), ...], ordered by destination.
        output_splits: Rows to receive, by peer.
        input_splits: Rows to send, by peer.
        group: The ranks that take part.
        meter: Counts bytes and waiting, here and below.

    Returns:
        [sum(output_splits), ...], ordered by source.
    """
    rows = rows.contiguous()
    received = rows.new_empty((sum(output_splits), *rows.shape[1:]))
    row_bytes, rank = rows.element_size() * rows.shape[1:].numel(), group.rank()

    def start() -> dist.Work:
        return dist.all_to_all_single(received, rows, [*output_splits], [*input_splits], group=group, async_op=True)

    to_others = len(rows) - input_splits[rank], len(received) - output_splits[rank]
    return _started(start, received, rows, meter, *(row_bytes * number for number in to_others))


def start_all_gather(rows: Tensor, group: dist.ProcessGroup, meter: TrafficMeter | None = None) -> Pending[Tensor]:
    """Rows of every rank, [P, ...] -> [size * P, ...]; P must be the same on every rank."""
    rows = rows.contiguous()
    gathered = rows.new_empty((rows.shape[0] * group.size(), *rows.shape[1:]))
    num_bytes = rows.nbytes * (group.size() - 1)
    start = partial(_all_gather_single, gathered, rows, group=group, async_op=True)
    return _started(start, gathered, rows, meter, num_bytes, num_bytes)


def start_reduce_scatter(rows: Tensor, group: dist.ProcessGroup, meter: TrafficMeter | None = None) -> Pending[Tensor]:
    """Sum over the ranks, each keeping its share, [size * P, ...] -> [P, ...]."""
    rows = rows.contiguous()
    summed = rows.new_empty((rows.shape[0] // group.size(), *rows.shape[1:]))
    num_bytes = rows.nbytes - summed.nbytes
    start = partial(_reduce_scatter_single, summed, rows, group=group, async_op=True)
    return _started(start, summed, rows, meter, num_bytes, num_bytes)


def all_gather(rows: Tensor, group: dist.ProcessGroup, meter: TrafficMeter | None = None) -> Tensor:
    """As :func:`start_all_gather`, waited for."""
    return start_all_gather(rows, group, meter).wait()


def max_over_ranks(numbers: Tensor, group: dist.ProcessGroup, meter: TrafficMeter | None = None) -> None:
    """Puts the largest of each number over the ranks in its place."""
    meter = meter or TrafficMeter()
    num_bytes = 2 * numbers.nbytes * (group.size() - 1) / group.size()  # as a ring sends them
    meter.add(num_bytes, num_bytes)
    with meter.waiting(numbers.device):
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)


def on_any_rank(holds: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether something holds on any rank of the group; waits for the device."""
    held = torch.tensor(int(holds), device=device)
    max_over_ranks(held, group)
    return bool(held)


def _started(
    start: Callable[[], dist.Work], result: Tensor, sent: Tensor, meter: TrafficMeter | None, *bytes_there_and_here: int
) -> Pending[Tensor]:
    meter = meter or TrafficMeter()
    meter.add(*bytes_there_and_here)
    with meter.waiting(sent.device):
        work = start()

    def wait(sent: Tensor = sent) -> Tensor:  # what is sent has to live until it is
        with meter.waiting(sent.device):
            work.wait()
        return result

    return Pending(wait)


Leg = Callable[..., Pending[tuple[Tensor, ...]]]
"""One way of a journey: starts with some tensors, and arrives with others."""


def travel(there: Leg, back: Leg, *tensors: Tensor) -> Pending[tuple[Tensor, ...]]:
    """Starts a journey whose gradients travel the other way.

    In backward, the way back is started where the arrival was waited for, and waited for where the journey began:
    what was computed meanwhile in forward has its backward meanwhile, too.

    Args:
        there: Called now with ``tensors``. What of its result is not floating-point has no gradient.
        back: Called in backward with the gradients of the floating-point part of that; arrives with those of
            ``tensors``.
        *tensors: What sets out.
    """
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return there(*tensors)
    luggage: list[Pending[tuple[Tensor, ...]]] = []
    token: Tensor = _SetOut.apply(there, luggage, *tensors)
    return Pending(partial(_Arrive.apply, token, back, luggage))


class _SetOut(torch.autograd.Function):
    """Returns a token for the arrival to depend on: what is still on its way must not be touched."""

    @staticmethod
    def forward(ctx: Any, there: Leg, luggage: list[Pending[tuple[Tensor, ...]]], *tensors: Tensor) -> Tensor:
        luggage.append(there(*tensors))
        ctx.luggage = luggage
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    @first_order
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.luggage.pop().wait()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, back: Leg, luggage: list[Pending[tuple[Tensor, ...]]]) -> tuple[Tensor, ...]:
        arrived = luggage.pop().wait()
        ctx.back, ctx.luggage, ctx.device = back, luggage, token.device
        ctx.has_gradient = [tensor.is_floating_point() for tensor in arrived]
        ctx.mark_non_differentiable(*(tensor for tensor in arrived if not tensor.is_floating_point()))
        return arrived

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.luggage.append(ctx.back(*(grad for grad, has in zip(grads, ctx.has_gradient, strict=True) if has)))
        return torch.zeros((), device=ctx.device), None, None

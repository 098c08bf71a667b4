"""What the dispatchers of a step send, and the share of its time that they take.

Shapes: W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.nn import MoE
from lightning_moe.parallel.traffic import Mark, mark, seconds_between

_NUMBERS = 4


class StepTraffic:
    """Measures single optimizer steps.

    Args:
        layers: Whose dispatchers.
        device: Of this rank.
    """

    def __init__(self, layers: Sequence[MoE], device: torch.device) -> None:
        self.meters = list({id(layer.groups.meter): layer.groups.meter for layer in layers}.values())
        self.travels = any(layer.groups.ep_size > 1 for layer in layers)
        self.device = device
        self._began: Mark | None = None
        self._spans: list[tuple[Mark, Mark]] = []  # of the step, up to each validation in the middle of it
        self._is_measured = False

    def begin(self) -> None:
        """Where the first micro-batch of a step begins; again in the others, where it does nothing."""
        if self._began is None and self.travels:
            self._spans = []
            self._began = mark(self.device)
            for meter in self.meters:
                meter.start()

    def pause(self) -> None:
        """Where a validation begins, which may be between the micro-batches of a step."""
        if self._began is not None:
            self._spans.append((self._began, mark(self.device)))
            for meter in self.meters:
                meter.pause()

    def resume(self) -> None:
        """Where it is over."""
        if self._began is not None:
            self._began = mark(self.device)
            for meter in self.meters:
                meter.resume()

    def end(self) -> Tensor:
        """Where the step is over: this rank's numbers in its place among those of all, [4 * W], to be summed.

        On CUDA the host waits for the device.
        """
        is_spread = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if is_spread else (0, 1)
        numbers_W4 = torch.zeros(world, _NUMBERS, dtype=torch.float64)
        self._is_measured = self._began is not None  # not where one batch had several steps
        if self._began is not None:
            spans = [*self._spans, (self._began, mark(self.device))]
            seconds = sum(seconds_between(first, last) for first, last in spans)
            for meter in self.meters:
                traffic = meter.stop()
                numbers_W4[rank] += torch.tensor([traffic.sent_bytes, traffic.received_bytes, traffic.seconds, 0.0])
            numbers_W4[rank, -1] = seconds
            self._began = None
        return numbers_W4.flatten().to(self.device)

    def values(self, numbers: Tensor) -> dict[str, Tensor]:
        """What is logged of the numbers of all ranks, by name; nothing where nothing travels."""
        if not self._is_measured:
            return {}
        sent_W, received_W, waited_W, seconds_W = numbers.view(-1, _NUMBERS).unbind(1)
        return {
            "moe/dispatch_bytes": sent_W.mean(),
            "moe/dispatch_bytes_received": received_W.max(),
            "moe/dispatch_seconds": waited_W.mean(),
            "moe/dispatch_seconds_slowest": waited_W.max(),
            "moe/dispatch_share": (waited_W / seconds_W).mean(),
        }

    def drop(self) -> None:
        """Leaves the meters off, in a step that does not end."""
        for meter in self.meters:
            if meter.is_on:
                meter.stop()
        self._began = None

"""How many bytes travel between ranks, and how long a rank waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Mark = float | torch.cuda.Event
"""A moment: of the clock on the CPU, of the current stream on CUDA."""


def mark(device: torch.device) -> Mark:
    """This moment, for which nobody waits."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: Mark, second: Mark) -> float:
    """Seconds from one moment to a later one of the same device. On CUDA the host waits until that has come."""
    if isinstance(first, float) or isinstance(second, float):
        assert isinstance(first, float)
        assert isinstance(second, float)
        return second - first
    second.synchronize()
    return first.elapsed_time(second) / 1e3


@dataclass(frozen=True)
class Traffic:
    """What travelled while a meter was on.

    Args:
        sent_bytes: From this rank to others.
        received_bytes: From others to this rank.
        seconds: For which this rank's work stood still until it had come.
    """

    sent_bytes: float
    received_bytes: float
    seconds: float


class TrafficMeter:
    """Counts bytes and waiting while it is on; off, it costs nothing and nothing waits for a device.

    What is computed while rows travel is no waiting: the time is from where a rank stands still to where it goes on, so
    that it has the other ranks' delays in it, too.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._bytes: list[tuple[float | Tensor, float | Tensor]] = []
        self._spans: list[tuple[Mark, Mark]] = []

    def start(self) -> None:
        """Begins to count, from 0."""
        self.is_on = True
        self._bytes, self._spans = [], []

    def pause(self) -> None:
        """Leaves out what comes until :meth:`resume`."""
        self.is_on = False

    def resume(self) -> None:
        """Goes on counting."""
        self.is_on = True

    def stop(self) -> Traffic:
        """What travelled since :meth:`start`. On CUDA the host waits for the device."""
        self.is_on = False
        seconds = sum(seconds_between(first, second) for first, second in self._spans)
        sent, received = (float(sum(counts)) for counts in zip((0.0, 0.0), *self._bytes, strict=True))
        self._bytes, self._spans = [], []
        return Traffic(sent, received, seconds)

    def add(self, sent_bytes: float | Tensor, received_bytes: float | Tensor) -> None:
        """Counts bytes to and from other ranks; scalar tensors are looked at no earlier than in :meth:`stop`."""
        if self.is_on:
            self._bytes.append((sent_bytes, received_bytes))

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Around where a rank waits for others."""
        # What a CUDA graph holds happens at another time, or often.
        if not self.is_on or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            yield
            return
        first = mark(device)
        yield
        self._spans.append((first, mark(device)))

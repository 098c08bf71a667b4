"""Alternating paired timings, the line that says where they were taken, and tables; for the scripts beside it."""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_moe.nn.tile_operations import compiled_library

PACKAGES = ("torch", "lightning-moe", "transformers", "deepspeed", "triton")


@dataclass
class Pass:
    """One forward and backward of a module, with respect to its input and all its weights.

    Args:
        module: From ``x`` to a tensor like ``upstream``.
        x: A leaf that requires its gradient.
        upstream: Gradient of the output: random and contiguous, as a layer above would send it.
    """

    module: nn.Module
    x: Tensor
    upstream: Tensor

    def __call__(self) -> None:
        """Runs it; the gradients are left in ``.grad``."""
        self.module(self.x).backward(self.upstream)

    def clear(self) -> None:
        """Drops all gradients, as ``optimizer.zero_grad()`` does before a step."""
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)

    @property
    def parameter_bytes(self) -> int:
        """Size of the weights, and so of their gradients."""
        return sum(parameter.nbytes for parameter in self.module.parameters())


@dataclass
class Timings:
    """Seconds of every candidate in every round.

    Args:
        seconds: Of each, in order.
        anchor: The candidate that ran right before each of the others, if there is one.
        before: Seconds of the anchor right before each of the others.
        busy: CPU time of this process over wall-clock time, over all of it. On one thread of the CPU it is near 1, and
            lower where other processes took the core: such timings are not worth quoting.
    """

    seconds: dict[str, list[float]]
    anchor: str | None = None
    before: dict[str, list[float]] = field(default_factory=dict)
    busy: float = 0.0

    def median(self, name: str) -> float:
        """Median time of a candidate, in seconds."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Distance of the quartiles over the median: how far the rounds are from each other."""
        if len(self.seconds[name]) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds[name], n=4, method="inclusive")
        return (high - low) / self.median(name)

    def ratio(self, name: str, other: str, scale: float = 1.0) -> float:
        """Median over the pairs of ``scale`` times the time of ``name`` over that of ``other``.

        A pair is two neighbours where one of the two is the anchor, and otherwise two calls of one round.
        """
        if name == other:
            return scale
        mine = self.before[other] if name == self.anchor else self.seconds[name]
        theirs = self.before[name] if other == self.anchor else self.seconds[other]
        return statistics.median(scale * a / b for a, b in zip(mine, theirs, strict=True))

    def fastest(self, names: Iterable[str]) -> str:
        """Name of the smallest median."""
        return min(names, key=self.median)


def alternate(
    passes: Mapping[str, Pass],
    rounds: int,
    *,
    anchor: str | None = None,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> Timings:
    """Times the candidates in turn, so that a slow spell of the machine meets them all.

    Without an anchor a round is A, B, C. With one, X, it is X, A, X, B, X, C: everybody is compared with the X right
    before it. The slowest come last and an X that does not count comes first: a call that leaves much memory to be
    mapped anew slows the next one down, and that should not be the X of a close pair. What a call allocates and frees
    is in its time, what dropping the gradients costs is not.
    """
    others = [name for name in passes if name != anchor]
    timings = Timings({name: [] for name in passes}, anchor, {name: [] for name in others})
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup):
            found = {}
            for name in passes:
                progress(f"warm-up {number + 1} of {warmup}: {name}")
                found[name] = timed(passes[name])
        if anchor and warmup:
            others.sort(key=lambda name: found[name])
        wall, used = time.perf_counter(), time.process_time()
        for number in range(rounds):
            if anchor:
                timed(passes[anchor])
            for name in others:
                progress(f"round {number + 1} of {rounds}: {name}")
                if anchor:
                    timings.before[name].append(timed(passes[anchor]))
                timings.seconds[name].append(timed(passes[name]))
            gc.collect()
        timings.busy = (time.process_time() - used) / (time.perf_counter() - wall)
    finally:
        gc.enable()
    if anchor:
        timings.seconds[anchor] = [seconds for name in others for seconds in timings.before[name]]
    return timings


def timed(candidate: Pass) -> float:
    """Seconds of one call, with all of its work on the device; no gradient is there before or after."""
    candidate.clear()
    synchronize(candidate.x.device)
    start = time.perf_counter()
    candidate()
    synchronize(candidate.x.device)
    elapsed = time.perf_counter() - start
    candidate.clear()
    return elapsed


def synchronize(device: torch.device) -> None:
    """Waits for an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads of torch inside; ``None`` leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def header(device: torch.device) -> str:
    """Versions, processors, and what the layer's tiles run on."""
    versions = [f"{name} {found}" for name in PACKAGES if (found := _version(name))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    tiles = "in C" if compiled_library() else "by torch"
    where = f"{cpu_model()}, {cores} of {os.cpu_count()} cores usable, tiles {tiles}"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; {where}"
    return f"{', '.join(versions)}, Python {platform.python_version()}; {where}."


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                widest = ", AVX-512 and bf16" if "avx512_bf16" in info.read_text() else ""
                return line.split(":", 1)[1].strip() + widest
    return platform.processor() or platform.machine()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    rows = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if not i else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0] + " |", rule, *(line + " |" for line in lines[1:])])


def progress(text: str) -> None:
    """Overwrites one line of stderr; where that is no terminal, writes a line now and then."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text and time.monotonic() - _said[0] > 20:
        _said[0] = time.monotonic()
        print(text, file=sys.stderr, flush=True)


_said = [-math.inf]


def show(text: str) -> None:
    """Prints a result, over what :func:`progress` left on a terminal."""
    progress("")
    print(text, flush=True)


def report(problems: Sequence[str]) -> int:
    """Prints every missed target to stderr; returns the exit code."""
    for problem in problems:
        print(f"missed: {problem}", file=sys.stderr)
    return 1 if problems else 0

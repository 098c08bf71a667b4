"""Threads among which work is divided, each with its share of torch's threads.

Torch divides one operation at a time among its threads and waits for the last of them. Where operations are small, that
costs more than it saves; of work that comes in independent parts, every thread can do a part of its own instead.

The threads are those of torch's own OpenMP where they can be. After an operation these spin for milliseconds in wait of
the next one: where no core is to spare, others would have to wait for them (with 4 threads on 4 cores, forward and
backward of a layer of 8 experts took 1.7 times as long).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_MOST_WORKERS = 8
"""Each has buffers of its own."""


def num_workers() -> int:
    """How many parts to divide work into here and now; 1 leaves it to the calling thread and torch's own threads.

    Dispatch modes, which count operations or decide what is recomputed, see the calling thread only.
    """
    return 1 if is_in_torch_dispatch_mode() else _divided(torch.get_num_threads())[0]


def run_parts(parts: Sequence[Callable[[], None]]) -> None:
    """Calls all parts, on as many threads, without autograd, and returns when the last has ended.

    Args:
        parts: At most :func:`num_workers`. They must not use random numbers, and write to different memory.

    Raises:
        BaseException: The first of what the parts raised, in their order; an interrupt may come before it.
    """
    if sys.is_finalizing():  # no other thread runs Python any more
        for part in parts:
            _run(part, torch.is_inference_mode_enabled())
        return
    start = _openmp(os.getpid()) if _divided(torch.get_num_threads())[1] == 1 else None
    if start is None:
        _run_on_pool(parts)
    else:
        _run_on_openmp(parts, start)


def _run_on_openmp(parts: Sequence[Callable[[], None]], start: Any) -> None:
    """On threads within which every operation has one thread. Signals are handled when all parts have ended."""
    inference = torch.is_inference_mode_enabled()
    left = deque(enumerate(parts))  # there may be fewer threads than were asked for
    errors: dict[int, BaseException] = {}

    def take_parts() -> None:
        while left:
            try:
                number, part = left.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                _run(part, inference)
            except BaseException as error:  # noqa: BLE001 - see below
                errors[number] = error

    def taker() -> Iterator[None]:
        try:
            yield
            take_parts()
        except BaseException as error:  # noqa: BLE001 - see below
            errors[-1] = error

    # What leaves a callback is lost, and an interrupt may come anywhere in Python's code, before its first line, too.
    # So the callback itself is C's, and what it goes on with is within "try" already.
    takers = [taker() for _ in parts]
    for each in takers:
        next(each)
    start(_BODY(partial(next, map(next, takers))), None, len(parts), 0)
    if errors:
        try:
            raise min((errors[number] for number in sorted(errors)), key=lambda error: isinstance(error, Exception))
        finally:
            errors.clear()  # they hold this frame, which holds them
    assert not left


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp(pid: int) -> Any:
    """``GOMP_parallel`` of the OpenMP runtime that torch uses; ``None`` where that is not GNU's, or not for certain.

    Also where the process has forked, or may be the fork of one that had used it: GNU's threads do not survive that and
    are waited for all the same. (A child of ``os.fork()`` that imports this first is not seen; torch hangs there, too.)
    """
    if pid != _PID or multiprocessing.parent_process() is not None:
        return None
    library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    try:
        start, preloaded = ctypes.CDLL(str(library)).GOMP_parallel, ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError, TypeError):  # Windows' CDLL takes no None
        return None
    if ctypes.cast(start, ctypes.c_void_p).value != ctypes.cast(preloaded, ctypes.c_void_p).value:
        return None  # as with LD_PRELOAD=libiomp5.so, where torch would not know itself within a parallel region
    start.argtypes, start.restype = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return start


_PID = os.getpid()


def _run_on_pool(parts: Sequence[Callable[[], None]]) -> None:
    num_threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    pool = _pool(os.getpid(), num_threads)  # threads do not survive a fork
    # The first is for the calling thread: were it to sleep, those that it wakes could all end up on its processor.
    others = [pool.submit(_run, part, inference) for part in parts[1:]]
    torch.set_num_threads(_divided(num_threads)[1])
    try:
        _run(parts[0], inference)
    finally:
        torch.set_num_threads(num_threads)
        wait(others)
    for other in others:
        other.result()


def _run(part: Callable[[], None], inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():  # both are of a thread
        part()


def _divided(num_threads: int) -> tuple[int, int]:
    """How many workers, and torch's threads of each: as many workers as leave at most a tenth of the threads idle."""
    few = range(1, min(num_threads, _MOST_WORKERS) + 1)
    workers = max(n for n in few if 10 * (num_threads % n) <= num_threads)
    return workers, num_threads // workers


@cache
def _pool(pid: int, num_threads: int) -> ThreadPoolExecutor:
    """Of one process and one setting of ``torch.set_num_threads``: the workers other than the calling thread."""
    del pid
    workers, threads_each = _divided(num_threads)
    pool = ThreadPoolExecutor(max(workers - 1, 1), "lightning_moe_worker", _set_threads, (threads_each,))
    all_there = Barrier(workers)
    try:
        started = [pool.submit(all_there.wait) for _ in range(workers - 1)]
        all_there.wait()
        for future in started:
            future.result()
    except BaseException:  # those that wait would do so for ever
        all_there.abort()
        pool.shutdown(wait=False)
        raise
    torch.set_num_threads(num_threads)  # what a thread sets is also where those begin that come after it
    return pool


def _set_threads(number: int) -> None:
    torch.get_num_threads()  # the first use of torch in a thread sets it to what the process has
    torch.set_num_threads(number)

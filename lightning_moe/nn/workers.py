"""Python threads among which work is divided, each with its share of torch's threads.

Torch divides one operation at a time among its threads and waits for the last of them. Where operations are small, that
costs more than it saves; of work that comes in independent parts, every thread can do a part of its own instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier

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
    """Calls all parts, each on a thread of its own, without autograd, and returns when the last has ended.

    Args:
        parts: At most :func:`num_workers`. They must not use random numbers, and write to different memory.

    Raises:
        Exception: The first of what the parts raised, in their order.
    """
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
    started = [pool.submit(all_there.wait) for _ in range(workers - 1)]
    all_there.wait()
    for future in started:
        future.result()
    torch.set_num_threads(num_threads)  # what a thread sets is also where those begin that come after it
    return pool


def _set_threads(number: int) -> None:
    torch.get_num_threads()  # the first use of torch in a thread sets it to what the process has
    torch.set_num_threads(number)

"""Work divided among threads that share torch's threads."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_moe.nn import workers
from lightning_moe.nn.workers import num_workers, run_parts


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["OpenMP", "pool"])
def threads_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kind: str = request.param
    if kind == "pool":
        monkeypatch.setattr(workers, "_openmp", lambda pid: None)
    elif workers._openmp(os.getpid()) is None:
        pytest.skip("torch's OpenMP has no GOMP_parallel")
    return kind


@pytest.mark.parametrize(
    ("threads", "expected"),
    [(1, (1, 1)), (2, (2, 1)), (7, (7, 1)), (8, (8, 1)), (11, (5, 2)), (12, (6, 2)), (64, (8, 8))],
)
def test_threads_are_divided_among_workers(threads: int, expected: tuple[int, int]) -> None:
    assert workers._divided(threads) == expected


def test_every_part_has_a_thread_with_its_share_and_no_autograd(threads_of: str) -> None:
    found: list[tuple[int, bool, bool]] = []
    here = threading.Barrier(4)

    def part() -> None:
        here.wait(10)  # until all are there
        found.append((threading.get_ident(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        if threads_of == "pool":  # on OpenMP's, operations have one thread whatever this says
            assert torch.get_num_threads() == 1

    assert num_workers() == 4
    run_parts([part] * 4)
    assert len({thread for thread, *_ in found}) == 4
    assert threading.get_ident() in {thread for thread, *_ in found}
    assert [entry[1:] for entry in found] == [(False, False)] * 4
    found.clear()
    with torch.inference_mode():
        run_parts([part] * 4)
    assert [entry[1:] for entry in found] == [(False, True)] * 4
    assert torch.get_num_threads() == 4
    assert torch.is_grad_enabled()


def test_results_have_the_bits_of_one_thread(threads_of: str) -> None:
    left, right = torch.randn(4, 300, 257), torch.randn(4, 257, 310)
    found = torch.empty(4, 300, 310)
    run_parts([partial(torch.mm, left[i], right[i], out=found[i]) for i in range(4)])
    torch.set_num_threads(1)
    assert all(torch.equal(found[i], left[i] @ right[i]) for i in range(4))


def test_fewer_threads_than_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where OMP_THREAD_LIMIT says so."""

    def start(body: Callable[[None], None], data: None, number: int, flags: int) -> None:
        body(None)
        body(None)

    monkeypatch.setattr(workers, "_openmp", lambda pid: start)
    found: list[int] = []
    run_parts([partial(found.append, i) for i in range(4)])
    assert found == [0, 1, 2, 3]


def test_another_number_of_threads() -> None:
    run_parts([lambda: None])
    torch.set_num_threads(9)
    found: list[int] = []
    run_parts([lambda: found.append(torch.get_num_threads())] * num_workers())
    assert found == [3] * 3
    assert torch.get_num_threads() == 9


def test_the_first_exception_comes_when_all_parts_have_ended(threads_of: str) -> None:
    ended = []

    def fail(number: int) -> None:
        raise ValueError(number)

    def slow() -> None:
        time.sleep(0.2)
        ended.append(1)

    with pytest.raises(ValueError, match="1"):
        run_parts([slow, lambda: fail(1), lambda: fail(2)])
    assert ended == [1]
    with pytest.raises(ValueError, match="2"):
        run_parts([lambda: fail(2), slow, lambda: fail(1)])
    assert ended == [1, 1]
    assert torch.get_num_threads() == 4
    run_parts([slow])
    assert ended == [1, 1, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGALRM")
def test_an_interrupt_is_not_lost_nor_is_a_part() -> None:
    """Whenever it comes. In a process of its own, since pytest-timeout uses the same signal."""
    script = """
import random, signal, torch
from lightning_moe.nn.workers import run_parts
class Interrupt(BaseException): pass
fired = False
def handler(*_):
    global fired
    fired = True
    raise Interrupt
signal.signal(signal.SIGALRM, handler)
torch.set_num_threads(2)
lost = missing = interrupted = 0
for _ in range(4000):
    ran, fired = [], False
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 2e-4))
        run_parts([lambda: ran.append(0), lambda: ran.append(1)])
        missing += len(ran) != 2
        lost += fired
        while not fired:
            pass
    except Interrupt:
        interrupted += 1
print(lost, missing, interrupted > 3900)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=True)
    assert done.stdout == "0 0 True\n", done.stderr
    assert "Exception ignored" not in done.stderr


def test_another_openmp_that_was_preloaded_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if workers._openmp(os.getpid()) is None:
        pytest.skip("torch's OpenMP is not GNU's")

    class Library:
        def __init__(self, name: str | None) -> None:
            self.GOMP_parallel = ctypes.CFUNCTYPE(None)(lambda: None)

    workers._openmp.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", Library)
    try:
        assert workers._openmp(os.getpid()) is None
    finally:
        workers._openmp.cache_clear()


def test_an_interrupt_comes_before_an_exception() -> None:
    def fail(error: BaseException) -> None:
        raise error

    if workers._openmp(os.getpid()) is None:
        pytest.skip("torch's OpenMP is not GNU's")
    with pytest.raises(SystemExit):
        run_parts([partial(fail, ValueError()), partial(fail, SystemExit())])


def test_dispatch_modes_see_everything() -> None:
    with FlopCounterMode(display=False):
        assert num_workers() == 1
    assert num_workers() == 4


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
@pytest.mark.parametrize("imported", ["before", "after"])
def test_after_a_fork(imported: str) -> None:
    """Where the parent has used OpenMP, whose threads are not there in the child."""
    script = f"""
import multiprocessing, os, sys, torch
def child():
    from lightning_moe.nn.workers import run_parts
    found = []
    run_parts([lambda: found.append(1)] * 2)
    sys.exit(2 + len(found))
torch.set_num_threads(2)
if {imported == "before"}:
    from lightning_moe.nn.workers import run_parts
    run_parts([lambda: None] * 2)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(30)
print(process.exitcode)
process.kill()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "4\n", done.stderr

"""Work divided among threads that share torch's threads."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

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


@pytest.mark.parametrize(
    ("threads", "expected"),
    [(1, (1, 1)), (2, (2, 1)), (7, (7, 1)), (8, (8, 1)), (11, (5, 2)), (12, (6, 2)), (64, (8, 8))],
)
def test_threads_are_divided_among_workers(threads: int, expected: tuple[int, int]) -> None:
    assert workers._divided(threads) == expected


def test_every_part_has_a_thread_with_its_share_and_no_autograd() -> None:
    found: list[tuple[str, int, bool, bool]] = []
    here = threading.Barrier(4)

    def part() -> None:
        here.wait()  # until all are there
        name, threads = threading.current_thread().name, torch.get_num_threads()
        found.append((name, threads, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    assert num_workers() == 4
    run_parts([part] * 4)
    assert len({name for name, *_ in found}) == 4
    assert [entry[1:] for entry in found] == [(1, False, False)] * 4
    found.clear()
    with torch.inference_mode():
        run_parts([part] * 4)
    assert [entry[1:] for entry in found] == [(1, False, True)] * 4
    assert torch.get_num_threads() == 4
    assert torch.is_grad_enabled()


def test_another_number_of_threads() -> None:
    run_parts([lambda: None])
    torch.set_num_threads(9)
    found: list[int] = []
    run_parts([lambda: found.append(torch.get_num_threads())] * num_workers())
    assert found == [3] * 3
    assert torch.get_num_threads() == 9


def test_the_first_exception_comes_when_all_parts_have_ended() -> None:
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


def test_dispatch_modes_see_everything() -> None:
    with FlopCounterMode(display=False):
        assert num_workers() == 1
    assert num_workers() == 4


@pytest.mark.grid
@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
def test_after_a_fork() -> None:
    script = """
import os, torch
from lightning_moe.nn.workers import run_parts
torch.set_num_threads(2)
found = []
run_parts([lambda: found.append(1)] * 2)
if (child := os.fork()) == 0:
    run_parts([lambda: found.append(1)] * 2)
    os._exit(len(found))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "4\n"

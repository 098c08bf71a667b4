"""Bytes and waiting, against what is known by hand."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.parallel.collectives import (
    all_gather,
    max_over_ranks,
    start_all_gather,
    start_all_to_all,
    start_reduce_scatter,
)
from lightning_moe.parallel.traffic import Traffic, TrafficMeter, mark, seconds_between
from lightning_moe.testing import RankPool

CPU = torch.device("cpu")
ROW = torch.zeros(1, 3).nbytes


def splits(sender: int, receiver: int) -> int:
    """Rows that one rank sends to another; rank 1 gets none."""
    return 0 if receiver == 1 else 1 + 2 * sender + receiver


def everything(meter: TrafficMeter | None) -> list[Tensor]:
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    sends, receives = ([splits(*pair) for pair in pairs] for pairs in (
        [(rank, peer) for peer in range(world)],
        [(peer, rank) for peer in range(world)],
    ))  # fmt: skip
    largest = torch.tensor([rank, -rank])
    results = [
        start_all_to_all(torch.full((sum(sends), 3), float(rank)), receives, sends, group, meter).wait(),
        start_all_gather(torch.full((2, 3), float(rank)), group, meter).wait(),
        all_gather(torch.full((1, 3), float(rank)), group, meter),
        start_reduce_scatter(torch.full((2 * world, 3), float(rank)), group, meter).wait(),
    ]
    max_over_ranks(largest, group, meter)
    return [*results, largest]


def counted() -> tuple[Traffic, Traffic, bool]:
    meter = TrafficMeter()
    unmetered = everything(None)
    everything(meter)  # off
    meter.start()
    same = all(torch.equal(a, b) for a, b in zip(everything(meter), unmetered, strict=True))
    first = meter.stop()
    everything(meter)  # off again
    meter.start()
    return first, meter.stop(), same


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_to_and_from_others(world: int, get_pool: Any) -> None:
    for rank, (traffic, nothing, same) in enumerate(get_pool(world).run(counted)):
        others = [peer for peer in range(world) if peer != rank]
        both_ways = (2 * len(others) + len(others) + 2 * len(others)) * ROW + 2 * 16 * len(others) / world
        sent = sum(splits(rank, peer) for peer in others) * ROW + both_ways
        received = sum(splits(peer, rank) for peer in others) * ROW + both_ways
        assert (traffic.sent_bytes, traffic.received_bytes) == (sent, received)
        assert traffic.seconds > 0
        assert nothing == Traffic(0.0, 0.0, 0.0)
        assert same


def kept_waiting(seconds: float) -> tuple[float, float]:
    """Seconds that this rank waits where rank 1 comes late, with and without something else to do meanwhile."""
    rank, group, meter = dist.get_rank(), dist.group.WORLD, TrafficMeter()
    assert group is not None
    waited = []
    for is_busy in (False, True):
        dist.barrier()
        meter.start()
        if rank == 1:
            time.sleep(seconds)
        pending = start_all_gather(torch.ones(1, 1), group, meter)
        if is_busy and rank == 0:
            time.sleep(2 * seconds)  # as experts would
        pending.wait()
        waited.append(meter.stop().seconds)
    return waited[0], waited[1]


def test_only_standing_still_is_waiting(pool2: RankPool) -> None:
    late = 0.3
    (idle, busy), (itself, itself_again) = pool2.run(kept_waiting, late)
    assert idle > 0.8 * late
    assert max(busy, itself, itself_again) < 0.5 * late


def test_scalar_tensors_are_counted_too() -> None:
    meter = TrafficMeter()
    meter.add(5, 5)  # off
    meter.start()
    meter.add(torch.tensor(3), 1)
    meter.add(2, torch.tensor(4))
    assert meter.stop() == Traffic(5.0, 5.0, 0.0)


def test_moments() -> None:
    first = mark(CPU)
    time.sleep(0.01)
    assert seconds_between(first, mark(CPU)) >= 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moments_of_a_gpu_are_those_of_its_work() -> None:
    device = torch.device("cuda")
    torch.cuda.synchronize()
    start, meter = time.perf_counter(), TrafficMeter()
    meter.start()
    with meter.waiting(device):
        torch.cuda._sleep(10**9)  # cycles: about half a second
    assert time.perf_counter() - start < 0.1  # nobody waits before the end
    torch.cuda.synchronize()
    busy = time.perf_counter() - start
    assert 0.8 * busy < meter.stop().seconds <= 1.01 * busy

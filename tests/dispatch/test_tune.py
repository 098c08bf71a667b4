"""The tuner tries all, changes nothing meanwhile, and all ranks choose the same."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning_utilities.core import rank_zero
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_moe import MoE, MoEConfig
from lightning_moe.dispatch import DispatchTuner
from lightning_moe.parallel import building_for
from lightning_moe.testing import RankPool
from tests.dispatch.test_dispatchers import LIMIT, groups_of
from tests.selection import one_in

WIDTH = 8
STEPS = DispatchTuner.TRIALS + 2


def layer(dispatcher: str, ep_size: int, **fields: Any) -> MoE:
    torch.manual_seed(0)
    with building_for(groups_of(ep_size)):
        return MoE(WIDTH, MoEConfig(8, 2, 12, dispatcher=dispatcher, **fields))


def batch(step: int) -> Tensor:
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(100 * step + rank)
    num_tokens = 0 if (rank, step) == (1, 2) else 5 + rank  # one rank has nothing once
    return torch.randn(num_tokens, WIDTH, generator=generator, requires_grad=True)


def train(moe: MoE, recompute: bool | None) -> tuple[list[list[Tensor]], list[str | None]]:
    found, chosen = [], []
    for step in range(STEPS):
        x = batch(step)
        y: Any = moe(x) if recompute is None else checkpoint(moe, x, use_reentrant=recompute)
        y.square().sum().backward()
        assert x.grad is not None
        found.append([y.detach(), x.grad])
        chosen.append(None if moe.tuner is None else moe.tuner.chosen)
    return found, chosen


def tune(ep_size: int, recompute: bool | None, fields: dict[str, Any]) -> tuple[str, dict[str, list[float]]]:
    tuned = layer("tune", ep_size, **fields)
    found, chosen = train(tuned, recompute)
    expected, _ = train(layer("alltoall", ep_size, **fields), None)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert chosen[: DispatchTuner.TRIALS - 1] == [None] * (DispatchTuner.TRIALS - 1)
    assert tuned.tuner is not None
    name = chosen[-1]
    assert name is not None
    assert tuned.dispatcher is tuned.tuner.candidates[name]
    return name, tuned.tuner.seconds


@pytest.mark.parametrize(
    ("recompute", "fields"),
    one_in(2, [None, True, False], [{}, {"overlap_chunks": 2, "capacity_factor": 1.0, "pad_to_capacity": True}]),
    ids=str,
)
def test_all_ranks_choose_the_fastest(recompute: bool | None, fields: dict[str, Any], pool4: RankPool) -> None:
    answers = pool4.run(tune, 2, recompute, fields, timeout=LIMIT)
    assert answers == [answers[0]] * 4  # of both EP groups
    name, seconds = answers[0]
    assert {len(times) for times in seconds.values()} == {DispatchTuner.TRIALS - 1}
    assert sorted(seconds) == ["allgather", "alltoall", "fused"]
    medians = {candidate: sorted(times)[len(times) // 2] for candidate, times in seconds.items()}
    assert medians[name] == min(medians.values())


def spoken(ep_size: int) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = rank_zero.log  # that of Fabric or of the Trainer, whichever was imported last
    logger.addHandler(handler)
    try:
        train(layer("tune", ep_size), None)
    finally:
        logger.removeHandler(handler)
    return [text for text in messages if "'tune'" in text]


def test_choice_and_numbers_are_logged_once(pool2: RankPool) -> None:
    first, second = pool2.run(spoken, 2, timeout=LIMIT)
    assert (len(first), len(second)) == (1, 0)
    assert re.fullmatch(
        r"dispatcher='tune': this MoE layer goes on with (allgather|alltoall|fused)\. There and back with gradients, "
        r"median of 3 batches on the slowest rank: allgather \d+\.\d\d ms, alltoall \d+\.\d\d ms, fused \d+\.\d\d ms\.",
        first[0],
    )


def only_evaluated(ep_size: int) -> str | None:
    moe = layer("tune", ep_size).eval()
    with torch.no_grad():
        for step in range(STEPS):
            moe(batch(step))
    assert moe.tuner is not None
    return moe.tuner.chosen


def test_evaluation_tries_nothing(pool2: RankPool) -> None:
    assert pool2.run(only_evaluated, 2, timeout=LIMIT) == [None, None]


def test_one_rank_that_holds_all_has_nothing_to_tune() -> None:
    moe = MoE(WIDTH, MoEConfig(8, 2, 12, dispatcher="tune"))
    assert moe.tuner is None
    assert type(moe.dispatcher).__name__ == "LocalDispatcher"


def used_three_times(fastest: str, recompute: bool | None) -> list[str]:
    """The dispatchers after each step, of a layer whose last trial falls amid a backward."""
    moe = layer("tune", 2)
    assert moe.tuner is not None
    for name, candidate in moe.tuner.candidates.items():
        if name != fastest:
            slowed_down(candidate)
    used = []
    for step in range(STEPS):
        x = y = batch(step)
        for _ in range(3):
            y = moe(y) if recompute is None else checkpoint(moe, y, use_reentrant=recompute)  # type: ignore[assignment]
        y.square().sum().backward()
        used.append(type(moe.dispatcher).__name__)
        assert x.grad is not None
    return used


def slowed_down(dispatcher: Any) -> None:
    plan = dispatcher.plan

    def slowly(*args: Any) -> Any:
        time.sleep(0.02)
        return plan(*args)

    dispatcher.plan = slowly


@pytest.mark.parametrize(
    ("fastest", "expected", "recompute"),
    one_in(2, [("allgather", "AllGatherDispatcher"), ("alltoall", "AllToAllDispatcher")], [None, True, False]),
)
def test_a_choice_amid_a_backward_waits_for_its_end(
    fastest: str, expected: str, recompute: bool | None, pool2: RankPool
) -> None:
    """What is recomputed after the choice must take the way of its forward."""
    for used in pool2.run(used_three_times, fastest, recompute, timeout=LIMIT):
        assert used == ["FusedDispatcher"] + [expected] * (STEPS - 1)


def overlapping(fastest: str) -> list[str]:
    """As a pipeline does: the next forward comes before the backward of the one before."""
    moe = layer("tune", 2)
    assert moe.tuner is not None
    for name, candidate in moe.tuner.candidates.items():
        if name != fastest:
            slowed_down(candidate)
    used, waiting = [], []
    for step in [0, 1, 3, 4, 5, 6, 7]:
        waiting.append(checkpoint(moe, batch(step), use_reentrant=False))
        if len(waiting) == 2:
            waiting.pop(0).square().sum().backward()  # type: ignore[union-attr]
        used.append(type(moe.dispatcher).__name__)
    waiting.pop(0).square().sum().backward()  # type: ignore[union-attr]
    return [*used, type(moe.dispatcher).__name__]


def test_a_choice_waits_for_every_backward(pool2: RankPool) -> None:
    for used in pool2.run(overlapping, "allgather", timeout=LIMIT):
        assert used == ["FusedDispatcher"] * 7 + ["AllGatherDispatcher"]

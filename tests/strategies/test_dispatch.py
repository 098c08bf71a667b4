"""Every dispatcher, in parts and at once, with and without capacity and recomputation, trains as one process does."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from lightning_moe.nn import experts
from tests.callbacks.runs import in_order, layers_of, parallel
from tests.strategies.test_exactness import Case, assert_same, check, dataset, fit, pairwise
from tests.toy import CONFIG, Toy, ToyData, Trained, train_reference

CAPACITY: dict[str, dict[str, Any]] = {
    "dropless": {},
    "dropping": {"capacity_factor": 0.75, "min_capacity": 1},
    "padded": {"capacity_factor": 0.75, "min_capacity": 1, "pad_to_capacity": True},
}
SGD = {"optimizer": torch.optim.SGD, "learning_rate": 0.3}
STEPS = 2  # plain SGD has no memory: the second step is like every later one


def case_of(dispatcher: str, chunks: int, capacity: str, ep_size: int, stage: int) -> Case:
    moe = replace(CONFIG, overlap_chunks=chunks, num_shared_experts=1, **CAPACITY[capacity])
    return Case(4, ep_size, stage, dispatcher, accumulate=2, moe=moe)


GRID = {
    (case_of(dispatcher, chunks, capacity, ep_size, number % 4), recompute): None
    for number, (dispatcher, chunks, capacity, ep_size, recompute) in enumerate(
        itertools.product(
            ("allgather", "alltoall", "fused", "tune"),
            (1, 3),
            CAPACITY,
            (2, 4),
            (None, "reentrant", "non-reentrant"),
        )
    )
}


def factors(case: tuple[Case, str | None]) -> tuple[Any, ...]:
    run, recompute = case
    capacity = run.moe.capacity_factor, run.moe.pad_to_capacity
    return run.dispatcher, run.moe.overlap_chunks, capacity, run.ep_size, recompute


def name(case: tuple[Case, str | None]) -> str:
    run, recompute = case
    return f"{run}-chunks{run.moe.overlap_chunks}-padded{run.moe.pad_to_capacity}-{recompute}"


# By size: ranks make new process groups when it changes, and keep the old ones.
SOME = sorted(pairwise(list(GRID), factors), key=lambda case: case[0].ep_size)


@pytest.mark.parametrize("case", SOME, ids=name)
def test_run_is_that_of_one_process(case: tuple[Case, str | None], get_pool: Any) -> None:
    check(case[0], get_pool, aux=(0.5, 0.05), steps=STEPS, recompute=case[1], **SGD)


@pytest.mark.grid
@pytest.mark.parametrize("case", GRID, ids=name)
def test_run_is_that_of_one_process_everywhere(case: tuple[Case, str | None], get_pool: Any) -> None:
    check(case[0], get_pool, aux=(0.5, 0.05), steps=STEPS, recompute=case[1], **SGD)


def fit_in_tiles(ranks: list[int], *args: Any, **kwargs: Any) -> Trained:
    """These experts are so small that no tile would be made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "tiles_are_faster", lambda *_: dist.get_rank() in ranks)
        return fit(*args, **kwargs)


TILES_ON = ([0, 1], [0, 3], [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [  # one of each stage by default
        pytest.param(
            stage, ranks, marks=[pytest.mark.grid] * ((stage + place) % len(TILES_ON) != 2), id=f"{stage}-{ranks}"
        )
        for stage in range(4)
        for place, ranks in enumerate(TILES_ON)
    ],
)
def test_experts_in_tiles(stage: int, ranks: list[int], get_pool: Any) -> None:
    """On all ranks, or on some, whose gradients must still be added to the same of the others'."""
    case = case_of("fused", 1 + stage % 2, "dropping", 2, stage)
    results = get_pool(4).run(fit_in_tiles, ranks, case, (0.5, 0.05), STEPS, recompute="non-reentrant", **SGD)
    model = Toy(case.config, **SGD)
    assert_same(
        results,
        train_reference(model, dataset(case, STEPS), 4, STEPS, case.accumulate, load_balancing=0.5, router_z=0.05),
    )


def test_bf16_on_the_wire_costs_its_rounding_only(get_pool: Any) -> None:
    exact, narrow = (
        get_pool(4).run(fit, Case(4, 2, 1, "fused", moe=replace(CONFIG, dispatch_dtype=dtype)), **SGD)
        for dtype in (None, "bfloat16")
    )
    for a, b in zip(exact, narrow, strict=True):
        assert a.grad_norms != b.grad_norms  # it is not the same run
        assert b.grad_norms == pytest.approx(a.grad_norms, rel=2e-2)
        for key, weight in a.state.items():
            assert_close(b.state[key], weight, rtol=2e-2, atol=2e-2, msg=lambda m, k=key: f"{k}: {m}")


def tuned() -> list[str]:
    """What tuners call their layers after a step."""
    trainer, model = parallel(2, 2, max_steps=1), Toy(replace(CONFIG, dispatcher="tune"))
    trainer.fit(model, in_order(ToyData(4)))
    return [layer.tuner.layer for layer in layers_of(model) if layer.tuner is not None]


def test_the_log_of_tune_names_layers(get_pool: Any) -> None:
    assert get_pool(2).run(tuned) == [["blocks.0", "blocks.1"]] * 2

"""An EP run is the same run as that of one process over the same global batch (DESIGN 4.2)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import pytest
import torch
from torch.testing import assert_close

from lightning_moe import AuxLossCallback, ExpertBiasUpdate, ExpertParallelStrategy, MoEConfig
from tests.toy import BATCH, CONFIG, Toy, ToyData, Trained, first_batches, loader, train_reference

LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 4)]
STEPS = 3


@dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    world: int
    ep_size: int
    stage: int
    dispatcher: str = "allgather"
    capacity_factor: float | None = None
    accumulate: int = 1
    clip: float | None = None
    lazy: bool = False
    precision: Any = "32-true"
    moe: MoEConfig = CONFIG
    bias_rate: float = 0.0

    @property
    def config(self) -> MoEConfig:
        """That of the layers, as far as the reference is concerned."""
        return self.moe if self.capacity_factor is None else replace(self.moe, capacity_factor=self.capacity_factor)

    def __str__(self) -> str:
        return (
            f"w{self.world}ep{self.ep_size}-zero{self.stage}-{self.dispatcher}-cap{self.capacity_factor}"
            f"-acc{self.accumulate}-clip{self.clip}"
        )


FULL_GRID = [
    Case(world, ep_size, stage, dispatcher, capacity, accumulate, clip)
    for (world, ep_size), stage, dispatcher, capacity, accumulate, clip in itertools.product(
        LAYOUTS, range(4), ("allgather", "alltoall", "fused"), (None, 1.25), (1, 3), (None, 0.3)
    )
]


def pairwise(cases: list[Case], factors: Callable[[Case], tuple[Any, ...]]) -> list[Case]:
    """A small part of a grid in which every pair of values of two factors occurs, chosen greedily."""

    def pairs(case: Case) -> set[Any]:
        return set(itertools.combinations(enumerate(factors(case)), 2))

    missing = set().union(*(pairs(case) for case in cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def factors(case: Case) -> tuple[Any, ...]:
    return (case.world, case.ep_size), case.stage, case.dispatcher, case.capacity_factor, case.accumulate, case.clip


def fit(case: Case, aux: tuple[float, float] = (0.0, 0.0), steps: int = STEPS, size: int = 0, **toy: Any) -> Trained:
    """Trains on this rank; every rank sees other rows."""
    from lightning_moe.testing.state import full_state

    model = Toy(replace(case.config, dispatcher=case.dispatcher), lazy=case.lazy, **toy)
    callbacks: list[L.Callback] = [AuxLossCallback(*aux)]
    if case.bias_rate:
        callbacks.append(ExpertBiasUpdate(case.bias_rate))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=case.world,
        strategy=ExpertParallelStrategy(case.ep_size, stage=case.stage),
        max_steps=steps,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
        precision=case.precision,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = dataset(case, steps, size)
    trainer.fit(model, loader(data, case.world, torch.distributed.get_rank()))
    state = full_state(trainer)
    model.eval()
    batch = first_batches(data, case.world).chunk(case.world)[torch.distributed.get_rank()]
    with torch.no_grad():
        output = trainer.strategy.model(batch.to(next(model.parameters()).dtype)).float()
    return Trained(state, model.grad_norms, output)


def dataset(case: Case, steps: int = STEPS, size: int = 0) -> ToyData:
    return ToyData(size or case.world * BATCH * steps * case.accumulate)


def assert_same(results: list[Trained], reference: Trained, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Weights and norms are the same on every rank, outputs those of its own batch."""
    for trained, output in zip(results, reference.output.chunk(len(results)), strict=True):
        _assert_same(trained, replace(reference, output=output), rtol, atol)


def _assert_same(trained: Trained, reference: Trained, rtol: float, atol: float) -> None:
    assert_close(torch.tensor(trained.grad_norms), torch.tensor(reference.grad_norms), rtol=rtol, atol=atol)
    assert trained.state.keys() == reference.state.keys()
    for name, expected in reference.state.items():
        assert_close(trained.state[name], expected.float(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert_close(trained.output, reference.output.float(), rtol=rtol, atol=atol)


def check(case: Case, get_pool: Any, aux: tuple[float, float] = (0.0, 0.0), steps: int = STEPS, **toy: Any) -> None:
    results = get_pool(case.world).run(fit, case, aux, steps, **toy)
    toy.pop("recompute", None)
    model = Toy(case.config, **toy)
    assert_same(
        results,
        train_reference(
            model, dataset(case, steps), case.world, steps, case.accumulate, case.clip, *aux, bias_rate=case.bias_rate
        ),
    )


# By size: ranks make new process groups when it changes, and keep the old ones.
@pytest.mark.parametrize("case", sorted(pairwise(FULL_GRID, factors), key=lambda case: case.ep_size), ids=str)
def test_run_is_that_of_one_process(case: Case, get_pool: Any) -> None:
    check(case, get_pool)


@pytest.mark.grid
@pytest.mark.parametrize("case", FULL_GRID, ids=str)
def test_run_is_that_of_one_process_everywhere(case: Case, get_pool: Any) -> None:
    check(case, get_pool)

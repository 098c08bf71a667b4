"""Ranks with different numbers of batches: one clear error on all of them, at the same batch, and no rank hangs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_moe import AuxLossCallback, ExpertLoadMonitor
from tests.callbacks.runs import Manual, parallel
from tests.toy import Toy, ToyData

BATCH = 2


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Nobody can tell its length."""

    def __init__(self, batches: int, seed: int) -> None:
        self.data = ToyData(batches * BATCH, seed=seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.data[i] for i in range(len(self.data))])


def load(batches: int, streams: bool) -> DataLoader[Any]:
    rank = dist.get_rank()
    return DataLoader(Stream(batches, rank) if streams else ToyData(batches * BATCH, seed=rank), batch_size=BATCH)


def run(
    stage: str, batches: tuple[int, ...], streams: bool = True, manual: bool = False, **options: Any
) -> dict[str, Any]:
    """A stage with so many batches on each rank; in training, validation follows every epoch."""
    model = Manual(accumulate=2) if manual else Toy()
    trainer = parallel(
        len(batches), len(batches), callbacks=[AuxLossCallback(), ExpertLoadMonitor()], **{"max_epochs": 2, **options}
    )
    mine, even = load(batches[dist.get_rank()], streams), load(2, streams)
    said, calls = None, {
        "train": lambda: trainer.fit(model, mine, even),
        "val": lambda: trainer.fit(model, even, mine),
        "validate": lambda: trainer.validate(model, mine, verbose=False),
        "test": lambda: trainer.test(model, mine, verbose=False),
        "predict": lambda: trainer.predict(model, mine),
    }  # fmt: skip
    try:
        calls[stage]()
    except MisconfigurationException as error:
        said = str(error)
    dist.barrier()
    return {"said": said, "steps": trainer.global_step, "epoch": trainer.current_epoch}


def message(stage: str, number: int) -> str:
    return (
        f"{stage}_dataloader: batch {number} is the last one of some ranks, and others have more. Experts are spread "
        "over ranks, which take batches together. Give each rank as many, as DistributedSampler does, or use "
        f"limit_{stage}_batches={number}."
    )


@pytest.mark.parametrize(
    ("batches", "accumulate", "streams", "manual"),
    [
        ((3, 5), 1, True, False),
        ((5, 3), 2, False, False),  # rank 1 would step where rank 0 accumulates
        ((5, 3), 2, True, True),
        ((4, 4, 1, 4), 3, True, False),
        pytest.param((1, 2), 1, False, False, marks=pytest.mark.grid),
    ],
)
def test_training(batches: tuple[int, ...], accumulate: int, streams: bool, manual: bool, get_pool: Any) -> None:
    options: dict[str, Any] = {} if manual else {"accumulate_grad_batches": accumulate}
    results = get_pool(len(batches)).run(run, "train", batches, streams, manual, **options)
    steps = (min(batches) - 1) // accumulate
    assert results == [{"said": message("train", min(batches)), "steps": steps, "epoch": 0}] * len(batches)


@pytest.mark.parametrize("stage", ["val", "validate", "test", "predict"])
@pytest.mark.parametrize("batches", [(3, 1), pytest.param((2, 3), marks=pytest.mark.grid)])
def test_evaluation(stage: str, batches: tuple[int, ...], get_pool: Any) -> None:
    results = get_pool(2).run(run, stage, batches)
    prefix = "val" if stage == "validate" else stage
    assert [result["said"] for result in results] == [message(prefix, min(batches))] * 2


@pytest.mark.parametrize(("stage", "batches"), [("train", (0, 1)), ("val", (3, 0)), ("predict", (0, 2))])
def test_a_rank_without_any_batch(stage: str, batches: tuple[int, ...], get_pool: Any) -> None:
    said = (
        f"{stage}_dataloader: some ranks have no batch, and others have. Experts are spread over ranks, which take "
        "batches together. Give each rank as many."
    )
    assert [result["said"] for result in get_pool(2).run(run, stage, batches)] == [said] * 2


@pytest.mark.parametrize(
    ("stage", "batches", "options", "steps"),
    [
        ("train", (3, 3), {}, 6),
        ("train", (5, 3), {"limit_train_batches": 3}, 6),
        ("train", (5, 3), {"max_steps": 2}, 2),
        ("val", (1, 4), {"limit_val_batches": 1, "num_sanity_val_steps": 2}, 4),
        ("train", (4, 4), {"accumulate_grad_batches": 3, "val_check_interval": 1}, 4),
    ],
)
@pytest.mark.parametrize("streams", [True, pytest.param(False, marks=pytest.mark.grid)])
def test_what_is_even_is_left_alone(
    stage: str, batches: tuple[int, ...], options: dict[str, Any], steps: int, streams: bool, get_pool: Any
) -> None:
    for result in get_pool(2).run(run, stage, batches, streams, **options):
        assert (result["said"], result["steps"]) == (None, steps)


def after_a_failure() -> list[str | None]:
    """The same Trainer is used again once it has failed."""
    trainer, said = parallel(2, 2, callbacks=[AuxLossCallback()], max_epochs=1), []
    for batches in ((2, 3), (3, 3), (3, 2)):
        try:
            trainer.fit(Toy(), load(batches[dist.get_rank()], True))
            said.append(None)
        except MisconfigurationException as error:
            said.append(str(error).partition(":")[2][:8])
        trainer.fit_loop.epoch_progress.reset()
    return said


def test_after_a_failure(get_pool: Any) -> None:
    assert get_pool(2).run(after_a_failure) == [[" batch 2", None, " batch 2"]] * 2


def lone() -> int:
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Toy(), DataLoader(Stream(3, 0), batch_size=BATCH))
    return trainer.global_step


def test_one_process_has_nobody_to_ask() -> None:
    assert lone() == 3
    assert not torch.distributed.is_initialized()

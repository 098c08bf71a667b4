"""Lightning's counts of epochs and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moe.checkpoint import MoECheckpointIO
from lightning_moe.checkpoint.pieces import Piece
from lightning_moe.checkpoint.progress import before_epoch_end, is_within_epoch
from lightning_moe.checkpoint.saving import Snapshot, save


def loop(
    batches: int, is_last: bool, epochs: tuple[int, int, int], completed_batches: int | None = None
) -> dict[str, Any]:
    """As after some batches of an epoch of which (begun, processed, completed) there have been so many."""
    done = batches if completed_batches is None else completed_batches
    batch = {"ready": batches, "started": batches, "processed": batches, "completed": done}
    begun, processed, completed = epochs
    epoch = {"ready": begun, "started": begun, "processed": processed, "completed": completed}
    return {
        "epoch_progress": {"total": dict(epoch), "current": dict(epoch)},
        "epoch_loop.batch_progress": {"total": dict(batch), "current": dict(batch), "is_last_batch": is_last},
        "epoch_loop.state_dict": {"_batches_that_stepped": batches},
    }


@pytest.mark.parametrize("epochs", [(2, 2, 1), (2, 2, 2)], ids=["in on_train_epoch_end", "after fit"])
@pytest.mark.parametrize("max_epochs", [None, -1, 3])
def test_the_end_of_an_epoch_becomes_the_end_of_its_last_batch(
    epochs: tuple[int, int, int], max_epochs: int | None
) -> None:
    saved = loop(5, True, epochs)
    expected = loop(5, True, (2, 1, 1), completed_batches=4)
    expected["epoch_loop.state_dict"]["_batches_that_stepped"] = 4
    assert before_epoch_end(saved, max_epochs) == expected
    assert saved == loop(5, True, epochs), "changed what it was given"


@pytest.mark.parametrize(
    ("saved", "max_epochs"),
    [
        (loop(3, False, (2, 1, 1)), 5),  # in the middle of an epoch
        (loop(5, True, (2, 1, 1), completed_batches=4), 5),  # in on_train_batch_end
        (loop(5, True, (2, 1, 1)), 5),  # in validation, from which Lightning goes on rightly
        (loop(5, True, (2, 2, 1)), 2),  # a run that is over
        (loop(0, False, (0, 0, 0)), 5),  # before the first batch
    ],
)
def test_everything_else_is_left_alone(saved: dict[str, Any], max_epochs: int) -> None:
    assert before_epoch_end(saved, max_epochs) is saved


@pytest.mark.parametrize(
    ("saved", "expected"),
    [(loop(3, False, (1, 0, 0)), True), (loop(5, True, (1, 0, 0)), False), (loop(0, False, (0, 0, 0)), False)],
)
def test_within_an_epoch(saved: dict[str, Any], expected: bool) -> None:
    assert is_within_epoch(saved) == expected


def test_a_trainer_without_the_strategy_gets_it_so(tmp_path: Path) -> None:
    run = {"lightning": {"loops": {"fit_loop": loop(5, True, (2, 2, 1)), "other": 1}}, "extra_state": {}}
    save(Snapshot({"model/w": Piece((2,), 0, torch.ones(2))}, run=run), tmp_path / "a.ckpt")
    loops = MoECheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["loops"]
    assert loops == {"fit_loop": before_epoch_end(loop(5, True, (2, 2, 1)), None), "other": 1}
    assert loops["fit_loop"] != loop(5, True, (2, 2, 1))

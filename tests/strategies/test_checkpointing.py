"""What becomes of checkpoints while a run goes on: failures, and saving in the background."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_moe import ExpertParallelStrategy, MoEConfig
from lightning_moe.checkpoint import Checkpoint, CheckpointError, read_weights, storage
from lightning_moe.strategies import writer
from tests.callbacks.runs import quiet
from tests.strategies.test_resume import Recording, of_rank
from tests.toy import CONFIG


def trainer_of(world: int = 2, ep_size: int = 2, stage: int = 1, **options: Any) -> L.Trainer:
    own = {key: options.pop(key) for key in ("async_save", "on_save_error") if key in options}
    strategy = ExpertParallelStrategy(ep_size, stage=stage, **own)
    options = {
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in options.get("callbacks", ())),
        **options,
    }
    return quiet(devices=world, strategy=strategy, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Step(L.Callback):
    """Does something after the given steps."""

    def __init__(self, what: Any, *steps: int) -> None:
        self.what, self.steps = what, steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.what(trainer)


# ---------------------------------------------------------------------------------------- failures


def failing(folder: str, on_save_error: Any, async_save: bool, bad_rank: int) -> tuple[str, list[str], int]:
    """The second save fails on one rank; top-k would remove the first for it."""
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=1)
    write_file, calls = storage.write_file, 0

    def write_or_fail(path: Path, items: Any, planner: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 and dist.get_rank() == bad_rank:
            raise OSError(28, "No space left on device")
        write_file(path, items, planner)

    said = ""
    trainer = trainer_of(on_save_error=on_save_error, async_save=async_save, callbacks=[saver], max_steps=6)
    with patch.object(storage, "write_file", write_or_fail):
        try:
            trainer.fit(Recording(), of_rank(2))
        except CheckpointError as error:
            said = str(error)
    dist.barrier()
    return said, names(Path(folder)), trainer.global_step


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("async_save", [False, True])
def test_a_failed_save_ends_the_run(bad_rank: int, async_save: bool, get_pool: Any, tmp_path: Path) -> None:
    for said, left, steps in get_pool(2).run(failing, str(tmp_path), "raise", async_save, bad_rank):
        assert said.startswith(
            f"{tmp_path}/step=4.ckpt: the checkpoint could not be saved (on rank {bad_rank}: No space left on device). "
        )
        assert left == ["step=2.ckpt"]
        assert steps == (6 if async_save else 4)  # heard of with the next save
    read_weights(tmp_path / "step=2.ckpt")


@pytest.mark.parametrize("async_save", [False, True])
def test_a_failed_save_is_warned_of(async_save: bool, get_pool: Any, tmp_path: Path) -> None:
    for said, left, steps in get_pool(2).run(failing, str(tmp_path), "warn", async_save, 1):
        assert (said, steps) == ("", 6)
        assert left == ["step=2.ckpt", "step=6.ckpt"], "the one before the failed one stays, the last is whole"
    for name in ("step=2.ckpt", "step=6.ckpt"):
        read_weights(tmp_path / name)


class WithHyperParameters(Recording):
    def __init__(self, loss: Any, size: int, where: Path, config: MoEConfig = CONFIG) -> None:
        super().__init__(config=config)
        self.save_hyperparameters(logger=False)


def saved_with_hyper_parameters(folder: str) -> dict[str, Any]:
    path = str(Path(folder) / "a.ckpt")
    trainer = trainer_of(max_steps=2, callbacks=[Step(lambda t: t.save_checkpoint(path), 1)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(WithHyperParameters(partial(nn.functional.mse_loss), 3, Path("there")), of_rank(2))
    said = [str(w.message) for w in caught if "a checkpoint does not keep" in str(w.message)]
    return {"said": said, "kept": Checkpoint(path).run()["lightning"]["hyper_parameters"]}


def test_hyper_parameters_that_cannot_be_kept_are_left_out(get_pool: Any, tmp_path: Path) -> None:
    found = get_pool(2).run(saved_with_hyper_parameters, str(tmp_path))
    (said,) = found[0]["said"]
    assert said == (
        "hyper_parameters: a checkpoint does not keep loss, which it could not read back without executing code. "
        "Resuming needs none of it; leave it out with save_hyperparameters(ignore=[...])."
    )
    assert found[1]["said"] == []
    assert found[0]["kept"] == {"size": 3, "where": "there", "config": asdict(CONFIG)}


class Unreadable(L.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"thing": os.getpid} if dist.get_rank() == 1 else {}


def saved_with_something_unreadable(folder: str) -> str:
    trainer = trainer_of(callbacks=[Unreadable()], max_steps=1)
    trainer.fit(Recording(), of_rank(2))
    with pytest.raises(CheckpointError) as caught:
        trainer.save_checkpoint(Path(folder) / "a.ckpt")
    assert not list(Path(folder).iterdir())
    return str(caught.value)


def test_what_one_rank_cannot_save_is_said_by_all(get_pool: Any, tmp_path: Path) -> None:
    said = get_pool(2).run(saved_with_something_unreadable, str(tmp_path))
    assert said[0] == said[1]
    assert f"{tmp_path}/a.ckpt: the checkpoint could not be saved (on rank 1: checkpoint['lightning']" in said[0]
    assert "['callbacks']['Unreadable']['thing']: cannot be saved" in said[0]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="on_save_error='ignore': must be 'raise' or 'warn'"):
        ExpertParallelStrategy(on_save_error="ignore")  # type: ignore[arg-type]


def linked_in_background(folder: str) -> str:
    saver = ModelCheckpoint(folder, every_n_train_steps=1, save_last="link")
    with pytest.raises(MisconfigurationException) as caught:
        trainer_of(async_save=True, callbacks=[saver], max_steps=1).fit(Recording(), of_rank(2))
    return str(caught.value)


def test_a_link_to_what_is_not_yet_written_is_refused(get_pool: Any, tmp_path: Path) -> None:
    assert "save_last='link' with async_save=True" in get_pool(2).run(linked_in_background, str(tmp_path))[0]


def another_model(folder: str) -> list[str]:
    trainer = trainer_of(max_steps=1)
    trainer.fit(Recording(), of_rank(2))
    path = str(Path(folder) / "a.ckpt")
    trainer.save_checkpoint(path)
    said = []
    for config in ({"num_experts": 8}, {"intermediate_size": 20}):
        with pytest.raises(CheckpointError) as caught:
            trainer_of(max_steps=2).fit(Recording(config=replace(CONFIG, **config)), of_rank(2), ckpt_path=path)
        said.append(str(caught.value))
    return said


def test_another_model_is_refused_on_every_rank(get_pool: Any, tmp_path: Path) -> None:
    ranks = get_pool(2).run(another_model, str(tmp_path))
    assert ranks[0] == ranks[1]
    assert "blocks.0.router.weight: [4, 8] in the checkpoint, [8, 8] in the model" in ranks[0][0]
    assert "blocks.0.experts.w1: [4, 24, 8] in the checkpoint, [4, 40, 8] in the model" in ranks[0][1]


def between_steps(folder: str) -> list[str]:
    def save(trainer: L.Trainer) -> None:
        trainer.save_checkpoint(Path(folder) / "a.ckpt")

    trainer = trainer_of(max_steps=2, accumulate_grad_batches=2, callbacks=[Step(save, 1)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Recording(), of_rank(2))
    return [str(w.message) for w in caught if "between two optimizer steps" in str(w.message)]


def test_a_save_between_two_steps_is_warned_of(get_pool: Any, tmp_path: Path) -> None:
    assert [len(said) for said in get_pool(2).run(between_steps, str(tmp_path))] == [1, 0]


def factored(folder: str, ep_size: int) -> str:
    """Adafactor keeps a sum for each row and column of a matrix."""
    trainer = trainer_of(ep_size=ep_size, stage=0, max_steps=4, callbacks=[Step(lambda t: t.save_checkpoint(path), 4)])
    path = str(Path(folder) / "a.ckpt")
    model = Recording(optimizer=lambda groups, lr: torch.optim.Adafactor(groups, lr=lr))
    try:
        trainer.fit(model, of_rank(2))
    except CheckpointError as error:
        return str(error)
    trainer_of(ep_size=ep_size, stage=0, max_steps=7).fit(
        resumed := Recording(optimizer=lambda groups, lr: torch.optim.Adafactor(groups, lr=lr)),
        of_rank(2),
        ckpt_path=path,
    )
    trainer_of(ep_size=ep_size, stage=0, max_steps=7).fit(
        whole := Recording(optimizer=lambda groups, lr: torch.optim.Adafactor(groups, lr=lr)), of_rank(2)
    )
    return "same" if whole.losses[4:] == resumed.losses else "another"


def test_state_that_belongs_to_a_layout_is_refused(get_pool: Any, tmp_path: Path) -> None:
    assert get_pool(2).run(factored, str(tmp_path), 1) == ["same"] * 2
    said = get_pool(2).run(factored, str(tmp_path), 2)
    assert said[0] == said[1]
    assert "Adafactor keeps 'row_var' of shape [2, 24, 1] for blocks.0.experts.w1" in said[0]


# ---------------------------------------------------------------------------------- in the background


def saved_in_background(folder: str) -> dict[str, Any]:
    """The save of step 2 is held up until step 4 is over; what it writes is what there was at step 2."""
    seen: dict[str, Any] = {"at 2": None, "names": []}
    save = writer.save

    def slow_save(snapshot: Any, path: Path, group: Any) -> None:
        if path.name == "step=2.ckpt":
            time.sleep(1.0)
        save(snapshot, path, group)

    def look(trainer: L.Trainer) -> None:
        if trainer.global_step == 2:
            seen["at 2"] = trainer.lightning_module.inp.weight.detach().clone()
        seen["names"].append(names(Path(folder)))

    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=1)
    trainer = trainer_of(async_save=True, max_steps=6, callbacks=[saver, Step(look, 2, 3)])
    with patch.object(writer, "save", slow_save):
        trainer.fit(Recording(), of_rank(2))
    return seen


def test_saving_in_the_background(get_pool: Any, tmp_path: Path) -> None:
    seen = get_pool(2).run(saved_in_background, str(tmp_path))[0]
    assert all(not [n for n in found if n.startswith("step")] for found in seen["names"]), "training waited"
    assert names(tmp_path) == ["step=6.ckpt"], "all are written at the end of fit, and the old ones gone"


def copied_at_once(folder: str) -> None:
    """A snapshot is not changed by the steps that come while it is being written."""
    weights = {}
    save = writer.save

    def slow_save(snapshot: Any, path: Path, group: Any) -> None:
        time.sleep(0.5)
        save(snapshot, path, group)

    def keep(trainer: L.Trainer) -> None:
        if trainer.global_step == 1:
            weights["then"] = trainer.lightning_module.inp.weight.detach().clone()
            trainer.save_checkpoint(Path(folder) / "a.ckpt")

    trainer = trainer_of(stage=0, async_save=True, max_steps=4, callbacks=[Step(keep, 1)])
    with patch.object(writer, "save", slow_save):
        trainer.fit(model := Recording(), of_rank(2))
    saved = read_weights(Path(folder) / "a.ckpt")["inp.weight"]
    assert torch.equal(saved, weights["then"])
    assert not torch.equal(saved, model.inp.weight)
    step = Checkpoint(Path(folder) / "a.ckpt").run()["scalars"]["inp.weight"]["step"]
    assert float(step) == 1.0


def test_the_copy_is_of_its_moment(get_pool: Any, tmp_path: Path) -> None:
    get_pool(2).run(copied_at_once, str(tmp_path))

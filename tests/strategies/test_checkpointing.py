"""What becomes of checkpoints while a run goes on: failures, saving in the background, signals, unusual modules."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_moe import ExpertParallelStrategy, MoEConfig
from lightning_moe.checkpoint import Checkpoint, CheckpointError, is_checkpoint, read_weights, storage
from lightning_moe.data import ResumableDataLoader
from lightning_moe.engine import deepspeed as engine
from lightning_moe.strategies import writer
from lightning_moe.testing.state import full_state
from tests.callbacks.runs import quiet
from tests.strategies.test_resume import Recording, of_rank
from tests.toy import CONFIG, Toy


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


# ----------------------------------------------------------------------------------------- signals


def preempted(folder: str, rank: int, callbacks_save: bool, accumulate: int) -> dict[str, Any]:
    """One rank gets SIGTERM in the middle of a step; then the run is started again."""

    class Killed(Recording):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if len(self.losses) == 3 and dist.get_rank() == rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss

    def data() -> Any:
        plain = of_rank(2)
        return ResumableDataLoader(plain.dataset, batch_size=plain.batch_size, sampler=plain.sampler)

    def run(model: Toy, path: str | None) -> L.Trainer:
        saver = ModelCheckpoint(folder, every_n_train_steps=100, save_on_exception=callbacks_save)
        trainer = trainer_of(max_epochs=4, callbacks=[saver], accumulate_grad_batches=accumulate)
        trainer.fit(model, data(), ckpt_path=path)
        return trainer

    whole = Recording()
    trainer_of(max_epochs=4, accumulate_grad_batches=accumulate).fit(whole, data())
    killed = Killed()
    with pytest.raises(SIGTERMException) as caught:
        run(killed, None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "Lightning's handlers stayed"
    dist.barrier()
    left = names(Path(folder))
    resumed = Recording()
    run(resumed, "last")
    return {"steps": len(killed.losses), "left": left, "code": caught.value.code,
            "same": whole.losses[len(killed.losses):] == resumed.losses}  # fmt: skip


@pytest.mark.parametrize(
    ("rank", "callbacks_save", "accumulate", "batches", "left"),
    [  # asked with batch 4, heard of with 5; the end of the next step
        (0, False, 1, 5, "last.ckpt"),
        (1, False, 2, 6, "last.ckpt"),
        (1, True, 1, 5, "epoch=1-step=5.ckpt last.ckpt"),
    ],
)
def test_sigterm_on_any_rank_saves_and_ends_all(
    rank: int, callbacks_save: bool, accumulate: int, batches: int, left: str, get_pool: Any, tmp_path: Path
) -> None:
    ranks = get_pool(2).run(preempted, str(tmp_path), rank, callbacks_save, accumulate)
    assert ranks[0] == ranks[1]
    assert ranks[0]["steps"] == batches
    assert ranks[0]["left"] == left.split()
    assert ranks[0]["code"] == SIGTERMException().code
    assert ranks[0]["same"]


def requeued(folder: str) -> dict[str, Any]:
    """SLURM's signal comes to one rank in the middle of a step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    slurm = {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": world, "NTASKS_PER_NODE": world, "JOB_ID": 17}
    os.environ.update({f"SLURM_{name}": str(value) for name, value in slurm.items()})
    scontrol = Path(folder) / "bin" / "scontrol"
    if rank == 0:
        scontrol.parent.mkdir()
        scontrol.write_text(f'#!/bin/sh\necho "$@" > {folder}/said')
        scontrol.chmod(0o755)
    dist.barrier()
    os.environ["PATH"] = f"{scontrol.parent}:{os.environ['PATH']}"

    class Signalled(Recording):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if len(self.losses) == 2 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return loss

    plugins = [SLURMEnvironment(auto_requeue=True)]
    common: dict[str, Any] = {"plugins": plugins, "max_epochs": 3, "default_root_dir": folder}
    trainer_of(**common).fit(whole := Signalled(), of_rank(2))
    path = str(Path(folder) / "hpc_ckpt_1.ckpt")
    step = Checkpoint(path).manifest.step
    trainer_of(max_epochs=3).fit(resumed := Recording(), of_rank(2), ckpt_path=path)
    return {"step": step, "said": (Path(folder) / "said").read_text().split(), "steps": len(whole.losses),
            "same": whole.losses[step:] == resumed.losses, "handler": signal.getsignal(signal.SIGUSR1)}  # fmt: skip


def test_slurms_signal_saves_and_requeues(get_pool: Any, tmp_path: Path) -> None:
    ranks = get_pool(2).run(requeued, str(tmp_path))
    assert ranks[0] == {"step": 4, "said": ["requeue", "17"], "steps": 12, "same": True, "handler": signal.SIG_DFL}
    assert ranks[1] == ranks[0]


# ---------------------------------------------------------------------------------- unusual modules


class Unusual(Recording):
    """With buffers of several kinds, a frozen part, a tied and an empty parameter, a metric."""

    def __init__(self, with_empty: bool) -> None:
        self.with_empty = with_empty
        super().__init__()

    def build(self) -> None:
        super().build()
        self.norm = nn.BatchNorm1d(3)
        self.conv = nn.Conv2d(4, 4, 3)
        self.register_buffer("strided", torch.arange(6.0).view(2, 3).t())
        self.frozen = nn.Linear(4, 3)
        self.frozen.requires_grad_(False)
        self.again = self.out
        if self.with_empty:  # which DeepSpeed's ZeRO 3 cannot run
            self.empty = nn.Parameter(torch.zeros(0, 3), requires_grad=False)
        self.register_buffer("no_elements", torch.zeros(0))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("not_saved", torch.zeros(2), persistent=False)
        self.accuracy = MeanMetric()
        self.accuracy.persistent(True)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        image = self.conv(x.new_ones(1, 4, 4, 4)).sum()
        return self.norm(y.transpose(1, 2)).transpose(1, 2) + 0.01 * image + self.frozen(x[..., :4])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count += 1
        loss = super().training_step(batch, batch_idx)
        self.accuracy.update(loss.detach())
        return loss


def unusual(folder: str, stage: int, precision: Any, elsewhere: tuple[int, int]) -> dict[str, Any]:
    path, with_empty = str(Path(folder) / "a.ckpt"), 3 not in (stage, elsewhere[1])
    whole = trainer_of(
        stage=stage, max_steps=7, precision=precision, callbacks=[Step(lambda t: t.save_checkpoint(path), 4)]
    )
    whole.fit(model := Unusual(with_empty), of_rank(2))
    torch.manual_seed(9)
    other = Unusual(with_empty)
    for tensor in (other.frozen.weight, other.conv.weight, other.count, other.norm.running_mean, other.strided):
        tensor.data.fill_(7)
    resumed = trainer_of(ep_size=elsewhere[0], stage=elsewhere[1], max_steps=7, precision=precision)
    resumed.fit(other, of_rank(2), ckpt_path=path)
    saved = read_weights(path)
    return {
        "losses": (model.losses[4:], other.losses),
        "count": int(other.count),
        "strided": torch.equal(other.strided, model.strided) and not other.strided.is_contiguous(),
        "frozen": full_state(resumed)["frozen.weight"].tolist() == full_state(whole)["frozen.weight"].tolist(),
        "metric": (float(model.accuracy.mean_value), float(other.accuracy.mean_value)),
        "names": saved.keys() == Unusual(with_empty).state_dict().keys(),
        "strict": bool(Unusual(with_empty).load_state_dict(saved)),
        "dtypes": {str(saved[name].dtype) for name in ("conv.weight", "blocks.0.experts.w1")},
    }


@pytest.mark.parametrize(
    ("stage", "precision", "elsewhere"),
    [
        (0, "32-true", (2, 0)),
        (1, "bf16-true", (2, 1)),
        (3, "32-true", (2, 3)),
        (2, "32-true", (1, 3)),
        pytest.param(3, "32-true", (1, 0), marks=pytest.mark.grid),
        pytest.param(0, "bf16-true", (2, 0), marks=pytest.mark.grid),
    ],
)
def test_everything_that_a_module_may_have(
    stage: int, precision: str, elsewhere: tuple[int, int], get_pool: Any, tmp_path: Path
) -> None:
    found = get_pool(2).run(unusual, str(tmp_path), stage, precision, elsewhere)[0]
    whole, resumed = found["losses"]
    assert resumed == (whole if elsewhere == (2, stage) else pytest.approx(whole, abs=1e-5))
    assert len(resumed) == 3
    assert found["count"] == 7
    assert found["strided"]
    assert found["frozen"]
    assert found["names"]
    assert found["strict"]
    assert found["dtypes"] == {"torch.float32"}, "masters, whatever the model computes in"


def weights_alone(folder: str) -> dict[str, Any]:
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_weights_only=True)
    trainer_of(max_steps=2, callbacks=[saver]).fit(model := Recording(), of_rank(2))
    path = str(Path(folder) / "step=2.ckpt")
    saved = Checkpoint(path)
    validated = trainer_of(stage=3).validate(Recording(), of_rank(2), ckpt_path=path, verbose=False)
    expected = trainer_of().validate(model, of_rank(2), verbose=False)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        trainer_of(max_steps=4).fit(Recording(), of_rank(2), ckpt_path=path)
    return {"optimizer": saved.names("optimizer/"), "validated": validated, "expected": expected}


def test_weights_alone(get_pool: Any, tmp_path: Path) -> None:
    found = get_pool(2).run(weights_alone, str(tmp_path))[0]
    assert found["optimizer"] == []
    assert found["validated"][0]["val_loss"] == pytest.approx(found["expected"][0]["val_loss"], abs=1e-6)


# -------------------------------------------------------------------------------- DeepSpeed's format


def of_deepspeed(folder: str, stage: int) -> dict[str, Any]:
    """As Lightning's own DeepSpeedStrategy saves it."""
    path = str(Path(folder) / "a.ckpt")

    def save(trainer: L.Trainer) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, ExpertParallelStrategy)
        with engine.plain_checkpoints(strategy.deepspeed_engine) if stage == 3 else nullcontext():
            DeepSpeedStrategy.save_checkpoint(strategy, trainer._checkpoint_connector.dump_checkpoint(False), path)
        dist.barrier()

    trainer_of(stage=stage, max_steps=7, callbacks=[Step(save, 4)]).fit(whole := Recording(), of_rank(2))
    with caplog_of("lightning.pytorch.utilities.rank_zero") as said:
        trainer_of(stage=stage, max_steps=7).fit(resumed := Recording(), of_rank(2), ckpt_path=path)
    refused = ""
    if stage == 3:
        with pytest.raises(CheckpointError) as caught:
            trainer_of(stage=stage).validate(Recording(), of_rank(2), ckpt_path=path, verbose=False)
        refused = str(caught.value)
    return {
        "losses": (whole.losses[4:], resumed.losses),
        "said": said,
        "refused": refused,
        "new": is_checkpoint(Path(path)),
    }


@contextmanager
def caplog_of(name: str) -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize("stage", [0, 1, 3, pytest.param(2, marks=pytest.mark.grid)])
def test_a_checkpoint_of_deepspeeds_format_loads_with_a_hint(stage: int, get_pool: Any, tmp_path: Path) -> None:
    found = get_pool(2).run(of_deepspeed, str(tmp_path), stage)[0]
    whole, resumed = found["losses"]
    assert resumed == whole
    assert len(resumed) == 3
    assert not found["new"]
    hint = [text for text in found["said"] if "is of DeepSpeed's format, which resumes only in the layout" in text]
    assert len(hint) == 1
    assert ("save anew with trainer.save_checkpoint" in found["refused"]) == (stage == 3)

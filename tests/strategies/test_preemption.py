"""SIGTERM and SLURM's signal: all ranks save and end, or go on, after the same step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_moe.checkpoint import Checkpoint
from lightning_moe.data import ResumableDataLoader
from tests.strategies.test_checkpointing import names, trainer_of
from tests.strategies.test_resume import Recording, of_rank
from tests.toy import Toy


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
        trainer = trainer_of(max_epochs=2, callbacks=[saver], accumulate_grad_batches=accumulate)
        trainer.fit(model, data(), ckpt_path=path)
        return trainer

    whole = Recording()
    trainer_of(max_epochs=2, accumulate_grad_batches=accumulate).fit(whole, data())
    killed = Killed()
    with pytest.raises(SIGTERMException) as caught:
        run(killed, None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "Lightning's handlers stayed"
    dist.barrier()
    left = names(Path(folder))
    resumed = Recording()
    run(resumed, "last")
    assert resumed.losses
    return {"steps": len(killed.losses), "left": left, "code": caught.value.code,
            "same": whole.losses[len(killed.losses):] == resumed.losses}  # fmt: skip


@pytest.mark.parametrize(
    ("rank", "callbacks_save", "accumulate", "batches", "left"),
    [  # asked and heard of with batch 4; the end of the next step
        (0, False, 1, 4, "last.ckpt"),
        (1, False, 2, 4, "last.ckpt"),
        (1, True, 1, 4, "epoch=1-step=4.ckpt last.ckpt"),
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
            if len(self.losses) == 3 and dist.get_rank() == 1:
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

"""A rank that dies or raises in the middle of a step ends the whole run, under Lightning's own launcher."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch.utils.data import DataLoader

from lightning_moe import AuxLossCallback, ExpertParallelStrategy
from tests.commands import run_command
from tests.toy import Toy, ToyData

DEADLINE = 30.0
"""Seconds from the failure of one rank to the end of the last process."""
HEALTHY_STEPS = 2


class Failing(Toy):
    """One rank fails between the two MoE layers of its third step; the other waits for it in the second layer."""

    def __init__(self, how: str, rank: int, mark: str) -> None:
        super().__init__()
        self.how, self.failing_rank, self.mark = how, rank, mark
        self.blocks[1].register_forward_pre_hook(self.fail)

    def fail(self, *_: Any) -> None:
        if self.global_step < HEALTHY_STEPS or self.global_rank != self.failing_rank:
            return
        Path(self.mark).write_text(str(os.getpid()))
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError(f"rank {self.failing_rank} has had enough")


def main(how: str, rank: str, mark: str) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ExpertParallelStrategy(2),
        callbacks=[AuxLossCallback()],
        max_steps=100,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(ToyData(64), batch_size=4, num_workers=1)  # whose worker must end, too
    trainer.fit(Failing(how, int(rank), mark), data)
    print("trained to the end")


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("how", "rank"),
    [
        ("kill", 1),
        ("raise", 0),
        pytest.param("kill", 0, marks=pytest.mark.grid),
        pytest.param("raise", 1, marks=pytest.mark.grid),
    ],
)
def test_one_failing_rank_ends_the_run(how: str, rank: int, tmp_path: Path, project_root: Path) -> None:
    mark = tmp_path / "failed"
    command: list[str | Path] = [sys.executable, "-m", "tests.strategies.test_crash", how, str(rank), mark]
    ended = run_command(
        command, tmp_path, timeout=60, patience=DEADLINE, mark=mark, environment={"PYTHONPATH": str(project_root)}
    )
    assert mark.exists(), f"The rank did not come to its third step:\n{ended.output}"
    assert not ended.left, f"Still running:\n{ended.left}\n{ended.output}"
    assert ended.seconds_after_mark is not None
    assert ended.seconds_after_mark < DEADLINE
    assert ended.code != 0, ended.output
    assert "trained to the end" not in ended.output
    if how == "kill" and rank == 0:
        assert ended.code == -signal.SIGKILL
    if how == "raise":
        assert f"ArithmeticError: rank {rank} has had enough" in ended.output


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A rank that dies or raises in the middle of a step ends the whole run, under Lightning's own launcher."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_moe import AuxLossCallback, ExpertParallelStrategy
from tests.commands import Finished, run_command, side_by_side
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
    # Which saves on an exception would wait for ranks that have none.
    saver = ModelCheckpoint(Path(mark).parent / "saved", every_n_train_steps=1000, save_on_exception=True)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ExpertParallelStrategy(2),
        callbacks=[AuxLossCallback(), saver] if how == "save" else [AuxLossCallback()],
        max_steps=100,
        logger=False,
        enable_checkpointing=how == "save",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(ToyData(64), batch_size=4, num_workers=1)  # whose worker must end, too
    trainer.fit(Failing(how, int(rank), mark), data)
    print("trained to the end")


def crash(how: str, rank: int, folder: Path, project_root: Path) -> Finished:
    command: list[str | Path] = [sys.executable, "-m", "tests.strategies.test_crash", how, str(rank), folder / "failed"]
    environment = {"PYTHONPATH": str(project_root)}
    return run_command(command, folder, 60, patience=DEADLINE, mark=folder / "failed", environment=environment)


@pytest.fixture(scope="module")
def crashes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, project_root: Path
) -> dict[tuple[str, int], Callable[[], Finished]]:
    """Those of the tests that were selected."""
    cases = [item.callspec.params for item in request.session.items if item.path == request.path]  # type: ignore[attr-defined]
    return side_by_side(
        {
            (case["how"], case["rank"]): partial(
                crash, **case, folder=tmp_path_factory.mktemp("crash"), project_root=project_root
            )
            for case in cases
        }
    )


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("how", "rank"),
    [
        ("kill", 1),
        ("save", 0),
        pytest.param("kill", 0, marks=pytest.mark.grid),
        pytest.param("raise", 0, marks=pytest.mark.grid),
        pytest.param("raise", 1, marks=pytest.mark.grid),
        pytest.param("save", 1, marks=pytest.mark.grid),
    ],
)
def test_one_failing_rank_ends_the_run(
    how: str, rank: int, crashes: dict[tuple[str, int], Callable[[], Finished]]
) -> None:
    ended = crashes[how, rank]()
    assert ended.seconds_after_mark is not None, f"The rank did not come to its third step:\n{ended.output}"
    assert not ended.left, f"Still running:\n{ended.left}\n{ended.output}"
    assert ended.seconds_after_mark < DEADLINE
    assert ended.code != 0, ended.output
    assert "trained to the end" not in ended.output
    if how == "kill" and rank == 0:
        assert ended.code == -signal.SIGKILL
    if how == "save":
        said = "ModelCheckpoint: no checkpoint is saved on this ArithmeticError, because not all ranks have failed"
        assert said in ended.output
    if how != "kill":
        assert f"ArithmeticError: rank {rank} has had enough" in ended.output


if __name__ == "__main__":
    main(*sys.argv[1:])

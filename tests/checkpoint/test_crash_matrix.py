"""Whenever a save is killed, a whole checkpoint stands under the name that it was for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_moe.checkpoint import Checkpoint, CheckpointError, directory
from tests.checkpoint.crashing import MOMENTS, SIZE, WORLD, Moment, run

TAKES_EFFECT = MOMENTS.index(next(m for m in MOMENTS if (m.name, m.when) == ("_exchange", "after")))


def value_of(path: Path) -> float:
    """The one number that a whole checkpoint of these tests is full of."""
    saved = Checkpoint(path)
    saved.verify()
    value: float = saved.run()["value"]
    assert torch.equal(saved.tensor("model/w"), torch.full((SIZE,), value))
    assert torch.equal(saved.tensor("optimizer/exp_avg/w"), torch.full((SIZE,), value))
    assert saved.run()["scalars"] == {"w": {"step": torch.tensor(value)}}
    assert [rank["rank"] for rank in saved.ranks()] == list(range(WORLD))
    return value


def test_there_are_at_least_twenty_moments() -> None:
    assert len({str(moment) for moment in MOMENTS}) == len(MOMENTS) >= 20


def test_without_a_crash_nothing_else_is_left(tmp_path: Path) -> None:
    assert run(tmp_path, None, kill_all=False) == [0, 0]
    assert value_of(tmp_path / "last.ckpt") == 2.0
    assert not (tmp_path / ".writing").exists()


@pytest.mark.parametrize(
    ("moment", "kill_all"),
    [  # by default all moments when all ranks are killed, and some when one is
        pytest.param(moment, kill_all, marks=[pytest.mark.grid] * (not kill_all and index % 4 > 0))
        for index, moment in enumerate(MOMENTS)
        for kill_all in (True, False)
    ],
    ids=lambda value: str(value) if isinstance(value, Moment) else ("all ranks" if value else "one rank"),
)
def test_killed(moment: Moment, kill_all: bool, tmp_path: Path) -> None:
    codes = run(tmp_path, moment, kill_all)
    if kill_all:
        assert codes == [-9, -9]
    else:
        assert codes[moment.rank] == -9
        assert codes[1 - moment.rank] == 3, "the other rank did not raise a CheckpointError"
    assert value_of(tmp_path / "last.ckpt") == (2.0 if MOMENTS.index(moment) >= TAKES_EFFECT else 1.0)

    # And the run that resumes saves under that name again.
    (tmp_path / "store").unlink(missing_ok=True)
    assert run(tmp_path, None, kill_all=False, existing=False) == [0, 0]
    assert value_of(tmp_path / "last.ckpt") == 2.0
    assert not (tmp_path / ".writing").exists()


@pytest.mark.parametrize("moment", MOMENTS[: TAKES_EFFECT - 1 : 3], ids=str)
def test_killed_in_the_first_save_of_a_name(moment: Moment, tmp_path: Path) -> None:
    run(tmp_path, moment, kill_all=True, existing=False)
    assert not (tmp_path / "last.ckpt").exists()


def test_where_two_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: two renames, and a kill between them leaves the earlier checkpoint beside its place."""
    monkeypatch.setattr(directory, "_exchange", lambda one, other: False)
    assert run(tmp_path, None, kill_all=False) == [0, 0]
    assert value_of(tmp_path / "last.ckpt") == 2.0
    assert not (tmp_path / ".writing").exists()


@pytest.mark.parametrize("call", [1, 2])
def test_killed_where_two_names_cannot_be_exchanged(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first of two renames the earlier checkpoint is beside its place, and one is told so."""
    monkeypatch.setattr(directory, "_exchange", lambda one, other: False)
    path, moment = tmp_path / "last.ckpt", Moment(Path, "rename", "after", call)
    assert run(tmp_path, moment, kill_all=True) == [-9, -9]
    if call == 1:
        beside = directory.earlier(path)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(path)
        assert str(caught.value).endswith(f"which is whole at {beside}. Move that back.")
        assert value_of(beside) == 1.0
    else:
        assert value_of(path) == 2.0
    (tmp_path / "store").unlink()
    assert run(tmp_path, None, kill_all=False, existing=False) == [0, 0]
    assert value_of(path) == 2.0
    assert not (tmp_path / ".writing").exists()

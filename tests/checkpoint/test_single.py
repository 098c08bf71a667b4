"""A file of Lightning's, read as a folder is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_moe.checkpoint import CheckpointError
from lightning_moe.checkpoint.pieces import Piece
from lightning_moe.checkpoint.single import LightningFile


def write(path: Path) -> Path:
    a, b = torch.arange(6.0).view(2, 3), torch.ones(4)
    state = {i: {"step": torch.tensor(2.0), "exp_avg": t / 2} for i, t in enumerate((b, a))}
    torch.save(
        {
            "state_dict": {"a": a, "b": b, "again": b, "metric": 3},
            "optimizer_states": [{"state": state, "param_groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]}],
            "epoch": 4,
        },
        path,
    )  # fmt: skip
    return path


def test_by_names(tmp_path: Path) -> None:
    saved = LightningFile(write(tmp_path / "a.ckpt"), [["b"], ["a"]], {"again"})
    assert sorted(saved.check({"a": (2, 3), "b": (4,)})) == ["a", "b"]
    assert saved.moments_of("a") == ["exp_avg"]
    run = saved.run()
    assert run["lightning"] == {"epoch": 4}
    assert run["extra_state"] == {"metric": 3}
    assert run["scalars"] == {name: {"step": torch.tensor(2.0)} for name in ("a", "b")}
    assert run["optimizer_groups"] == [{"names": ["b"], "values": {"lr": 0.1}}, {"names": ["a"], "values": {"lr": 0.2}}]
    values_N = torch.zeros(3, dtype=torch.bfloat16)
    saved.fill({"optimizer/exp_avg/a": Piece((2, 3), 2, values_N)})
    assert values_N.tolist() == [1.0, 1.5, 2.0]
    with pytest.raises(CheckpointError, match="b: only in the checkpoint"):
        saved.check({"a": (2, 3)})


def test_other_groups_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError) as caught:
        LightningFile(path, [["a", "b"]], {"again"})
    assert str(caught.value) == (
        f"{path}: its optimizer has groups of [1, 1] parameters, and configure_optimizers returned one with [2]. "
        "Return the same groups as in the run that saved it, or load its weights alone."
    )


def test_without_an_optimizer_weights_alone(tmp_path: Path) -> None:
    run = LightningFile(write(tmp_path / "a.ckpt"), [], {"again"}).run()
    assert "optimizer_groups" not in run

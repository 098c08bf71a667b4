"""The refusal of another layout by checkpoints of DeepSpeed's format."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from lightning_moe.checkpoint import CheckpointLayout, check_layout

LAYOUT_FILE = "lightning_moe_layout.json"  # that lightning_moe wrote beside DeepSpeed's files before 0.2


def test_same_layout_passes(tmp_path: Path) -> None:
    (tmp_path / LAYOUT_FILE).write_text(json.dumps(asdict(CheckpointLayout(4, 2, 1))))
    check_layout(tmp_path, CheckpointLayout(4, 2, 1))


def test_a_checkpoint_of_another_strategy_passes(tmp_path: Path) -> None:
    check_layout(tmp_path, CheckpointLayout(4, 2, 1))


def test_another_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / LAYOUT_FILE).write_text(json.dumps(asdict(CheckpointLayout(4, 2, 1))))
    with pytest.raises(ValueError, match="was saved with") as caught:
        check_layout(tmp_path, CheckpointLayout(2, 1, 1))
    assert str(caught.value) == (
        f"ckpt_path='{tmp_path}': was saved with world_size=4 (now 2), expert_parallel_size=2 (now 1), and this "
        "format resumes only in the layout in which it was saved. Start with those values."
    )

"""The refusal of another layout by checkpoints of DeepSpeed's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_moe.checkpoint import CheckpointError
from lightning_moe.checkpoint.deepspeed_format import LAYOUT_FILE, check_layout
from lightning_moe.checkpoint.manifest import SavedLayout


def write(folder: Path) -> None:
    saved = {"world_size": 4, "expert_parallel_size": 2, "stage": 1}
    (folder / LAYOUT_FILE).write_text(json.dumps(saved))


def test_same_layout_passes(tmp_path: Path) -> None:
    write(tmp_path)
    check_layout(tmp_path, SavedLayout(4, 2, 1, "bf16-true"))


def test_a_checkpoint_of_another_strategy_passes(tmp_path: Path) -> None:
    check_layout(tmp_path, SavedLayout(4, 2, 1))


def test_another_layout_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        check_layout(tmp_path, SavedLayout(2, 1, 1))
    assert str(caught.value) == (
        f"ckpt_path='{tmp_path}': was saved with world_size=4 (now 2), expert_parallel_size=2 (now 1), and DeepSpeed's "
        "format resumes only in the layout in which it was saved. Start with those values, and save anew."
    )

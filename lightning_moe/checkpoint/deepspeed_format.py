"""Checkpoints of DeepSpeed's format, which is bound to a layout: the refusal of another one."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_moe.checkpoint.errors import CheckpointError
from lightning_moe.checkpoint.manifest import SavedLayout

LAYOUT_FILE = "lightning_moe_layout.json"
"""What lightning_moe wrote beside DeepSpeed's files while that was its only format."""


def check_layout(checkpoint: Path, layout: SavedLayout) -> None:
    """Refuses a checkpoint of another layout, which DeepSpeed would in part load without a word and wrongly.

    A checkpoint that has no layout beside it, such as one made by Lightning's DeepSpeedStrategy, passes.

    Raises:
        CheckpointError: the layouts differ.
    """
    path = checkpoint / LAYOUT_FILE
    saved = json.loads(path.read_text()) if path.is_file() else {}
    differences = [
        f"{name}={value} (now {getattr(layout, name)})"
        for name, value in saved.items()
        if value != getattr(layout, name)
    ]
    if differences:
        raise CheckpointError(
            f"ckpt_path={str(checkpoint)!r}: was saved with {', '.join(differences)}, and DeepSpeed's format resumes "
            "only in the layout in which it was saved. Start with those values, and save anew."
        )

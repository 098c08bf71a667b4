"""Checkpoints of DeepSpeed's format, which is bound to a layout: the refusal of another one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE_NAME = "lightning_moe_layout.json"


@dataclass(frozen=True)
class CheckpointLayout:
    """What a checkpoint of DeepSpeed's format is bound to.

    Args:
        world_size: Ranks.
        expert_parallel_size: Ranks of one EP group.
        stage: ZeRO stage.
    """

    world_size: int
    expert_parallel_size: int
    stage: int


def check_layout(checkpoint: Path, layout: CheckpointLayout) -> None:
    """Refuses a checkpoint of another layout, which DeepSpeed would in part load without a word and wrongly.

    A checkpoint that has no layout beside it, such as one made by Lightning's DeepSpeedStrategy, passes.

    Raises:
        ValueError: the layouts differ.
    """
    path = checkpoint / FILE_NAME
    if not path.is_file():
        return
    saved = CheckpointLayout(**json.loads(path.read_text()))
    differences = [
        f"{name}={getattr(saved, name)} (now {getattr(layout, name)})"
        for name in asdict(layout)
        if getattr(saved, name) != getattr(layout, name)
    ]
    if differences:
        raise ValueError(
            f"ckpt_path={str(checkpoint)!r}: was saved with {', '.join(differences)}, and this format resumes only "
            "in the layout in which it was saved. Start with those values."
        )

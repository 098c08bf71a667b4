"""Whether a checkpoint is as it was written: file by file, telling how far it is."""

from __future__ import annotations

from collections.abc import Callable

from lightning_moe.checkpoint.loading import Checkpoint
from lightning_moe.checkpoint.manifest import damage
from lightning_moe.checkpoint.storage import SUFFIX

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, and with how many bytes of how many are done."""


def problems(checkpoint: Checkpoint, on_progress: OnProgress | None = None) -> list[str]:
    """What is wrong with the files of a checkpoint.

    Args:
        checkpoint: An opened one; its manifest was compared with its own checksum when it was opened.
        on_progress: Called before the first file and after each.

    Returns:
        A message for every file that is missing, that has changed, or that has tensors and is not of this checkpoint.
    """
    report = on_progress or (lambda what, done, total: None)
    files = checkpoint.manifest.files
    done, total = 0, sum(stored.size for stored in files.values())
    report("verifying", done, total)
    found = []
    for name, stored in files.items():
        problem = damage(checkpoint.path, name, stored)
        if problem is not None:
            found.append(problem)
        done += stored.size
        report("verifying", done, total)
    # What reads tensors takes every file of tensors that it finds.
    strangers = sorted(path for path in checkpoint.path.glob(f"*{SUFFIX}") if path.name not in files)
    return found + [f"{path}: is not of this checkpoint, and would be read with it. Remove it." for path in strangers]

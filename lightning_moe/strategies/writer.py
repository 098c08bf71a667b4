"""Saving and loading a run: when, where, in which of the formats, and what happens when it fails."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_moe.checkpoint import CheckpointError, directory
from lightning_moe.checkpoint.saving import Snapshot, save

OnSaveError = Literal["raise", "warn"]


@dataclass
class _Pending:
    """A save under way in the background."""

    path: Path
    done: Future[None]


class CheckpointWriter:
    """Writes checkpoints, at once or while training goes on, and removes old ones no sooner than is safe.

    Args:
        in_background: Returns as soon as the state is copied.
        on_error: ``"raise"`` ends the run where a checkpoint cannot be saved, ``"warn"`` lets it go on.
    """

    def __init__(self, in_background: bool, on_error: OnSaveError) -> None:
        self.in_background = in_background
        self._on_error = on_error
        self._executor: ThreadPoolExecutor | None = None
        self._pending: _Pending | None = None
        self._to_remove: list[Path] = []
        self._last_failed = False
        self._group: dist.ProcessGroup | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks, on CPU, apart from the group of training, which is at work at the same time. Collective."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group

    def write(self, snapshot: Callable[[], Snapshot], path: Path) -> None:
        """Writes a checkpoint, once the one before it is written. Collective.

        Args:
            snapshot: Makes what this rank has to write.
            path: Of the checkpoint; the same on all ranks.

        Raises:
            CheckpointError: on every rank, when this one or, in the background, the one before could not be saved.
        """
        self.wait()
        group, made, problem = self.group, None, ""
        try:
            made = snapshot().detached() if self.in_background else snapshot()
        except (RuntimeError, MemoryError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}" if not isinstance(error, CheckpointError) else str(error)
        if not self.in_background:
            self._settle(path, lambda: _save(made, problem, path, group))
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = _Pending(path, self._executor.submit(_save, made, problem, path, group))

    def wait(self) -> None:
        """Returns when nothing is being written any more. On all ranks at the same places of a run.

        Raises:
            CheckpointError: on every rank, when what was being written could not be.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._settle(pending.path, pending.done.result)

    def remove(self, path: Path) -> None:
        """Removes a checkpoint as soon as the one that takes its place is whole; not at all if that one failed."""
        if self._pending is not None:
            self._to_remove.append(path)
        elif self._last_failed:
            rank_zero_info(f"{path}: stays, because the checkpoint that was to take its place could not be saved")
        elif dist.get_rank() == 0:
            directory.remove(path)

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = None
            if self._group is not None:
                self._group = None

    def _settle(self, path: Path, finish: Callable[[], None]) -> None:
        removals, self._to_remove = self._to_remove, []
        try:
            finish()
        except CheckpointError as error:
            self._last_failed = True
            if self._on_error == "raise":
                raise
            rank_zero_warn(f"{error} Training goes on (on_save_error='warn').")
            return
        self._last_failed = False
        for old in removals:
            if old != path:
                self.remove(old)


def _save(snapshot: Snapshot | None, problem: str, path: Path, group: dist.ProcessGroup) -> None:
    """Saves what all ranks have, unless one of them has a problem, which is then raised on all."""
    problems = [""] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    if any(problems):
        found = next(rank for rank, text in enumerate(problems) if text)
        raise CheckpointError(f"{path}: the checkpoint could not be saved (on rank {found}: {problems[found]})")
    assert snapshot is not None
    save(snapshot, path, group)

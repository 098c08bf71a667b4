"""Writing a run's checkpoints: at once or in the background, and what happens when one cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_moe.checkpoint import CheckpointError, directory
from lightning_moe.checkpoint.agreement import agreed
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
        try:
            with agreed(self.group):
                made = snapshot().detached() if self.in_background else snapshot()
        except CheckpointError as error:
            self._failed(CheckpointError(f"{path}: the checkpoint could not be saved ({error})"))
            return
        if not self.in_background:
            self._settle(path, partial(save, made, path, self.group))
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = _Pending(path, self._executor.submit(save, made, path, self.group))

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
        elif self._last_failed and not path.exists():
            return  # it failed itself
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
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = None

    def _settle(self, path: Path, finish: Callable[[], None]) -> None:
        removals, self._to_remove = self._to_remove, []
        try:
            finish()
        except CheckpointError as error:
            self._failed(error)
            return
        self._last_failed = False
        for old in removals:
            if old != path:
                self.remove(old)

    def _failed(self, error: CheckpointError) -> None:
        self._last_failed = True
        if self._on_error == "raise":
            raise error
        rank_zero_warn(f"{error} Training goes on (on_save_error='warn').")

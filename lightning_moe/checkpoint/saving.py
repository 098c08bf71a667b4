"""Writing a checkpoint from all ranks at once."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_moe.checkpoint import directory
from lightning_moe.checkpoint.errors import CheckpointError
from lightning_moe.checkpoint.manifest import FILE_NAME, Manifest, SavedLayout, StoredFile, StoredTensor, describe_file
from lightning_moe.checkpoint.objects import write_objects
from lightning_moe.checkpoint.pieces import Pieces, SavePieces
from lightning_moe.checkpoint.storage import SafetensorsWriter, quiet

RUN_FILE = "run.pt"
RANKS_FILE = "ranks.pt"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint keeps of a run, as far as this rank has it.

    Args:
        pieces: By name of the logical tensor; no range of one is on two ranks.
        scalars: By name of the parameter, what the optimizer keeps of it that is no tensor of its shape. Ranks may
            have different names; what they have of one is the same.
        run: State that all ranks share; the first rank's is written.
        rank: State of this rank alone.
        layout: See :class:`SavedLayout`.
        step: Optimizer steps taken.
        epoch: From 0.
        versions: Of the libraries at work.
    """

    pieces: Pieces
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    rank: dict[str, Any] = field(default_factory=dict)
    layout: SavedLayout = field(default_factory=SavedLayout)
    step: int = 0
    epoch: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def detached(self) -> Snapshot:
        """A copy in host memory that training leaves alone, to be written while it goes on."""
        return replace(
            self,
            pieces={name: piece.on_cpu() for name, piece in self.pieces.items()},
            scalars=deepcopy(self.scalars),
            run=deepcopy(self.run),
            rank=deepcopy(self.rank),
        )


@dataclass(frozen=True)
class _FromRank:
    """What the first rank hears from each before any file is written."""

    shapes: dict[str, tuple[int, ...]]
    scalars: dict[str, dict[str, Any]]
    state: dict[str, Any]


def save(snapshot: Snapshot, path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Writes a checkpoint from all ranks of a group. Collective; on return it is there on every rank.

    Nothing is at ``path``, or what was there before, until everything is on the disk.

    Args:
        snapshot: What this rank has.
        path: Of the checkpoint, a folder; the same on all ranks.
        group: Of the ranks, with a CPU backend; ``None`` for a single process.

    Raises:
        CheckpointError: on every rank, whatever rank could not write; what was at ``path`` before is still there.
    """
    is_first = group is None or dist.get_rank(group) == 0
    writing = None
    try:
        writing = _begin(path, is_first, group)
        _write(snapshot, path, writing, group)
    except (CheckpointException, OSError, RuntimeError) as error:
        if is_first and writing is not None:
            directory.abandon(writing)
        _log.debug("%s: not saved", path, exc_info=error)
        raise CheckpointError(
            f"{path}: the checkpoint could not be saved ({reasons(error)}). What was there before is untouched. "
            f"{_remedy(reasons(error))}, for example by ModelCheckpoint(dirpath=...)."
        ) from None


def _begin(path: Path, is_first: bool, group: dist.ProcessGroup | None) -> Path:
    """The folder to write into, on every rank; raises on every rank when the first one cannot make it."""
    made: Any = None
    if is_first:
        try:
            made = directory.begin(path, replaces=(FILE_NAME, "latest"))  # the second is DeepSpeed's
        except OSError as error:
            made = error
    if group is not None:
        box = [made]
        dist.broadcast_object_list(box, group=group, group_src=0)
        made = box[0]
    if isinstance(made, OSError):
        raise made
    writing: Path = made
    return writing


def _write(snapshot: Snapshot, path: Path, writing: Path, group: dist.ProcessGroup | None) -> None:
    # The piece that begins a tensor is on one rank only.
    shapes = {name: p.shape for name, p in snapshot.pieces.items() if p.start == 0 and p.values_N.numel()}
    ranks = _gather(_FromRank(shapes, snapshot.scalars, snapshot.rank), group)

    def finish(metadata: Metadata, files: dict[str, StoredFile]) -> None:
        shape_of = {name: shape for rank in ranks for name, shape in rank.shapes.items()}
        scalars = {name: entry for rank in ranks for name, entry in rank.scalars.items()}
        run = {**snapshot.run, "scalars": scalars}
        for name, state in ((RUN_FILE, run), (RANKS_FILE, [rank.state for rank in ranks])):
            write_objects(writing / name, state)
            files[name] = describe_file(writing / name)
        tensors = {}
        for name, stored in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(stored, TensorStorageMetadata)
            tensors[name] = StoredTensor(shape_of[name], str(stored.properties.dtype).removeprefix("torch."))
        described = (snapshot.layout, snapshot.step, snapshot.epoch, snapshot.versions)
        directory.sync(Manifest(tensors, dict(sorted(files.items())), *described).write(writing))
        directory.commit(writing, path)

    with quiet():
        dcp.save(
            dict(snapshot.pieces),
            storage_writer=SafetensorsWriter(writing, finish),
            planner=SavePieces(),
            process_group=group,
            no_dist=group is None,
        )


def _remedy(why: str) -> str:
    is_full = any(text in why for text in ("No space left", "quota", "too large"))
    return "Free space, or save elsewhere" if is_full else "Save elsewhere"


def reasons(error: BaseException) -> str:
    """What went wrong, on which ranks, in one line."""
    if isinstance(error, CheckpointException):
        found = {rank: _reason(cause) for rank, (cause, _) in sorted(error.failures.items())}
        ranks = ", ".join(str(rank) for rank in found)
        return f"on rank {ranks}: {'; '.join(dict.fromkeys(found.values()))}"
    return _reason(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error).strip() or type(error).__name__


def _gather(value: _FromRank, group: dist.ProcessGroup | None) -> list[_FromRank]:
    """Of all ranks, on the first; empty on the others."""
    if group is None:
        return [value]
    is_first = dist.get_rank(group) == 0
    gathered: list[Any] | None = [None] * dist.get_world_size(group) if is_first else None
    dist.gather_object(value, gathered, group=group, group_dst=0)
    return gathered or []

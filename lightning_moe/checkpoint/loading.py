"""Reading a checkpoint: into the pieces of any layout, or tensor by tensor."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from typing_extensions import override

from lightning_moe.checkpoint.errors import CheckpointError
from lightning_moe.checkpoint.manifest import Manifest, problems, read_manifest
from lightning_moe.checkpoint.objects import read_objects
from lightning_moe.checkpoint.pieces import LoadPieces, Pieces
from lightning_moe.checkpoint.saving import RANKS_FILE, RUN_FILE, reasons
from lightning_moe.checkpoint.storage import quiet

MODEL = "model/"
OPTIMIZER = "optimizer/"
_SHOWN = 5
_log = logging.getLogger(__name__)


def moment_name(key: str, parameter: str) -> str:
    """The name of the tensor of what an optimizer keeps, such as ``exp_avg``, of a parameter."""
    return f"{OPTIMIZER}{key}/{parameter}"


class Checkpoint:
    """An opened checkpoint.

    Args:
        path: Of its folder.

    Attributes:
        manifest: What is in it.

    Raises:
        CheckpointError: there is no whole checkpoint at ``path``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        self._files: dict[Path, Any] = {}

    def verify(self, group: dist.ProcessGroup | None = None) -> None:
        """Compares every file with its size and checksum; the ranks of a group divide them. Collective.

        Raises:
            CheckpointError: on every rank, naming each file that is damaged or missing.
        """
        rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        found = problems(self.path, dict(list(self.manifest.files.items())[rank::world]))
        if group is not None:
            of_ranks: list[list[str]] = [[] for _ in range(world)]
            dist.all_gather_object(of_ranks, found, group=group)
            found = [problem for of_rank in of_ranks for problem in of_rank]
        if found:
            raise CheckpointError("\n".join(found))

    def check(self, shapes: Mapping[str, tuple[int, ...]], strict: bool = True) -> list[str]:
        """Compares the weights and buffers with a model's.

        Args:
            shapes: Of the model's, by name.
            strict: Refuses names that only one of the two has.

        Returns:
            The names that both have.

        Raises:
            CheckpointError: naming the first tensors that differ.
        """
        stored = {name: self.manifest.tensors[MODEL + name].shape for name in self.names(MODEL)}
        return names_in_both(self.path, stored, shapes, strict)

    def fill(self, pieces: Pieces, group: dist.ProcessGroup | None = None) -> None:
        """Reads pieces, in place, converted to their dtype. Collective in a group, whatever pieces a rank has.

        Raises:
            CheckpointError: on every rank; what was filled before is not undone.
        """
        try:
            with quiet():
                dcp.load(
                    dict(pieces),
                    storage_reader=_Reader(self),
                    planner=LoadPieces(),
                    process_group=group,
                    no_dist=group is None,
                )
        except (CheckpointException, OSError, RuntimeError) as error:
            _log.debug("%s: not read", self.path, exc_info=error)
            raise CheckpointError(f"{self.path}: could not be read ({reasons(error)}).") from None

    def tensor(self, name: str) -> Tensor:
        """A logical tensor, whole, on the CPU.

        Raises:
            KeyError: there is none of that name.
        """
        stored = self.manifest.tensors[name]
        whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        flat_N, filled = whole.view(-1), 0
        for path, start in self._parts[name]:
            part = self._open(path).get_tensor(name)
            flat_N[start : start + part.numel()] = part
            filled += part.numel()
        assert filled == flat_N.numel(), f"{self.path}: {name} has {filled} of {flat_N.numel()} elements"
        return whole

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` of the module takes, with whole tensors."""
        run = self.run()
        state = {name: self.tensor(MODEL + name) for name in self.names(MODEL)}
        tied = {name: state[first] for name, first in run.get("tied", {}).items() if first in state}
        return state | tied | run.get("extra_state", {})

    def names(self, prefix: str) -> list[str]:
        """Names under a prefix, without it."""
        return [name.removeprefix(prefix) for name in self.manifest.tensors if name.startswith(prefix)]

    def moments_of(self, name: str) -> list[str]:
        """What the optimizer kept of every element of a parameter, such as ``exp_avg``."""
        return self._moments.get(name, [])

    @cached_property
    def _moments(self) -> dict[str, list[str]]:
        moments: dict[str, list[str]] = {}
        for full_name in self.names(OPTIMIZER):
            key, _, name = full_name.partition("/")
            moments.setdefault(name, []).append(key)
        return moments

    def run(self) -> dict[str, Any]:
        """State that all ranks share."""
        state: dict[str, Any] = read_objects(self.path / RUN_FILE)
        return state

    def ranks(self) -> list[dict[str, Any]]:
        """State of each rank of the run that saved it."""
        states: list[dict[str, Any]] = read_objects(self.path / RANKS_FILE)
        return states

    def _open(self, path: Path) -> Any:
        """A file of tensors, mapped into memory once."""
        from safetensors import safe_open

        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path]

    @cached_property
    def _parts(self) -> Mapping[str, list[tuple[Path, int]]]:
        """For every name, the files that have a part of it, and where that part begins."""
        parts: dict[str, list[tuple[Path, int]]] = {}
        metadata = _Reader(self).read_metadata()
        for index, where in (metadata.storage_data or {}).items():
            parts.setdefault(index.fqn, []).append((Path(where.relative_path), index.offset[0]))
        return parts


class _Reader(HuggingFaceStorageReader):
    """Reads the files that the manifest names, and no other that has come into the folder."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(str(checkpoint.path))
        self.fs = _Listed(checkpoint.manifest.files)


class _Listed(FileSystem):
    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    @override
    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [str(Path(path) / name) for name in self._names]


def names_in_both(
    path: Path, stored: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], strict: bool
) -> list[str]:
    """The names that both a checkpoint and a model have; see :meth:`Checkpoint.check`."""
    both = [name for name in stored if name in shapes]
    differences = [
        f"{name}: {list(stored[name])} in the checkpoint, {list(shapes[name])} in the model"
        for name in both
        if tuple(stored[name]) != tuple(shapes[name])
    ]
    if strict:
        for name in sorted(stored.keys() ^ shapes.keys()):
            differences.append(f"{name}: only in the {'checkpoint' if name in stored else 'model'}")
    if differences:
        shown = "".join(f"\n  {line}" for line in differences[:_SHOWN])
        more = f"\n  and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise CheckpointError(
            f"{path}: is of another model; {len(differences)} of its tensors differ:{shown}{more}\nBuild the "
            "model that was saved, or pass strict_loading=False for names that only one has."
        )
    return both


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights and buffers of a checkpoint, whole, as ``load_state_dict`` takes them.

    >>> from lightning_moe.checkpoint import read_weights
    >>> model.load_state_dict(read_weights("last.ckpt"))  # doctest: +SKIP

    Args:
        path: Of a checkpoint that a run with ``ExpertParallelStrategy`` saved, in any layout.

    Returns:
        By name, on the CPU; parameters in the precision in which they were optimized.

    Raises:
        CheckpointError: there is no whole checkpoint at ``path``, or a file of it is damaged.
    """
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    return checkpoint.state_dict()

"""``checkpoint.json``: what is in a checkpoint, and a checksum of every file.

It is written last. A folder without it is no checkpoint, whatever else is there.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_moe.checkpoint.directory import earlier
from lightning_moe.checkpoint.errors import CheckpointError

FILE_NAME = "checkpoint.json"
FORMAT_VERSION = 1
"""Raised when an older lightning_moe could misread what is written now. Every version up to it stays readable."""

_BLOCK = 1 << 22

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, and with how many bytes of how many are done."""


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor.

    Args:
        shape: Of the whole.
        dtype: As torch prints it, without ``torch.``.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StoredFile:
    """A file of the checkpoint.

    Args:
        size: In bytes.
        crc32: Of all its bytes.
    """

    size: int
    crc32: int


@dataclass(frozen=True)
class SavedLayout:
    """What the checkpoint was written by; nothing of it matters for reading.

    Args:
        world_size: Ranks.
        expert_parallel_size: Ranks of one EP group.
        stage: ZeRO stage.
        precision: Lightning's name of it.
    """

    world_size: int = 1
    expert_parallel_size: int = 1
    stage: int = 0
    precision: str = "32-true"


@dataclass(frozen=True)
class Manifest:
    """The content of ``checkpoint.json``.

    Args:
        tensors: By name: ``model/<name>`` and ``optimizer/<state>/<name>``.
        files: By name.
        layout: What wrote it.
        step: Optimizer steps taken.
        epoch: Epoch it was taken in, from 0.
        versions: Of the libraries at work.
        format_version: See :data:`FORMAT_VERSION`.
    """

    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]
    layout: SavedLayout = field(default_factory=SavedLayout)
    step: int = 0
    epoch: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> Path:
        """Writes it into a folder and returns its path."""
        content = {"format": "lightning_moe checkpoint", **asdict(self)}
        path = folder / FILE_NAME
        path.write_text(json.dumps({**content, "crc32": _crc32_of(content)}, indent=1) + "\n")
        return path


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a whole checkpoint of this format."""
    return (path / FILE_NAME).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint, of this and every older format version.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of a newer format.
    """
    path = folder / FILE_NAME
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        crc32 = content.pop("crc32")
        version = int(content["format_version"])
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(missing(folder)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(_damaged(path, f"it cannot be read ({type(error).__name__}: {error})")) from error
    if version > FORMAT_VERSION:  # whose checksum may be another kind
        raise CheckpointError(
            f"{folder}: has format version {version}, and this lightning_moe reads up to {FORMAT_VERSION}. "
            f"Install lightning_moe {content.get('versions', {}).get('lightning_moe', 'of that version')} or newer."
        )
    if _crc32_of(content) != crc32:
        raise CheckpointError(_damaged(path, "its checksum is another"))
    return Manifest(
        tensors={name: StoredTensor(tuple(t["shape"]), t["dtype"]) for name, t in content["tensors"].items()},
        files={name: StoredFile(**f) for name, f in content["files"].items()},
        layout=SavedLayout(**content["layout"]),
        step=content["step"],
        epoch=content["epoch"],
        versions=content["versions"],
        format_version=version,
    )


def describe_file(path: Path) -> StoredFile:
    """Size and checksum of a file, read back."""
    crc32 = size = 0
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            crc32 = zlib.crc32(block, crc32)
            size += len(block)
    return StoredFile(size, crc32)


def damage(folder: Path, name: str, stored: StoredFile) -> str | None:
    """What is wrong with a file of a checkpoint, as a message for the user; ``None`` if it is as it was written."""
    path = folder / name
    try:
        found = describe_file(path)
    except FileNotFoundError:
        return _damaged(path, "it is missing")
    except OSError as error:
        return _damaged(path, f"it cannot be read ({error.strerror})")
    if found.size != stored.size:
        return _damaged(path, f"it has {found.size} bytes and was written with {stored.size}")
    if found.crc32 != stored.crc32:
        return _damaged(path, "its checksum is another, so that some bytes have changed")
    return None


def problems(folder: Path, files: Mapping[str, StoredFile], on_progress: OnProgress | None = None) -> list[str]:
    """What is wrong with some files of a checkpoint.

    Args:
        folder: Of the checkpoint.
        files: As they were written.
        on_progress: Called before the first file and after each.

    Returns:
        A message for every file that is missing or that has changed.
    """
    report = on_progress or (lambda what, done, total: None)
    done, total = 0, sum(stored.size for stored in files.values())
    report("verifying", done, total)
    found = []
    for name, stored in files.items():
        problem = damage(folder, name, stored)
        if problem is not None:
            found.append(problem)
        done += stored.size
        report("verifying", done, total)
    return found


def missing(folder: Path) -> str:
    """Why a path is no checkpoint, and which ones beside it are."""
    if folder.is_file():
        return (
            f"{folder}: is a file, and a checkpoint of ExpertParallelStrategy is a folder with a {FILE_NAME}. Give the "
            "path of that folder. A file that Lightning saved can be given to a Trainer as ckpt_path."
        )
    if is_checkpoint(beside_it := earlier(folder)):
        return (
            f"{folder}: is not there: a save was killed while it took the place of the checkpoint before, which is "
            f"whole at {beside_it}. Move that back."
        )
    inside, beside = _checkpoints_in(folder), _checkpoints_in(folder.parent)
    if inside:
        return f"{folder}: is not a checkpoint, but holds some. Give the path of one: {', '.join(inside)}."
    why = f"has no {FILE_NAME}, so that it is none or was never finished" if folder.is_dir() else "does not exist"
    remedy = f"Checkpoints beside it, newest first: {', '.join(beside)}." if beside else "There is none beside it."
    return f"{folder}: is not a checkpoint: it {why}. {remedy}"


def _checkpoints_in(folder: Path) -> list[str]:
    """The newest few."""
    found = [path for path in folder.glob("*") if is_checkpoint(path)]
    found.sort(key=lambda path: (path / FILE_NAME).stat().st_mtime, reverse=True)
    return [str(path) for path in found[:5]]


def _damaged(path: Path, what: str) -> str:
    return f"{path}: {what}. This checkpoint is damaged: copy that file again, or resume from another one."


def _crc32_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())

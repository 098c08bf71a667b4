"""A checkpoint's weights as other tools read them: safetensors files of whole tensors, under the module's own names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_moe.checkpoint import directory
from lightning_moe.checkpoint.directory import sync
from lightning_moe.checkpoint.errors import CheckpointError
from lightning_moe.checkpoint.loading import MODEL, Checkpoint
from lightning_moe.checkpoint.manifest import OnProgress, is_checkpoint, problems
from lightning_moe.checkpoint.saving import reasons
from lightning_moe.checkpoint.stream import NAMES, Source, write_stream

SHARD_BYTES = 5 * 10**9
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Exported:
    """What an export has written.

    Args:
        files: Their paths, the index last where there is one.
        num_tensors: In all of them.
        size: Of the tensors, in bytes.
        left_out: Names in the module's ``state_dict`` that are no tensors, and so cannot be in such files.
    """

    files: list[Path]
    num_tensors: int
    size: int
    left_out: list[str]


def export(
    path: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Exported:
    """Writes the weights and buffers of a checkpoint into safetensors files of whole tensors.

    One file, ``model.safetensors``, if everything fits into it; otherwise ``model-00001-of-0000N.safetensors`` and the
    index that transformers and others find them by. No more than about one tensor is in memory at a time, and no file
    appears under its name before all are on the disk. A parameter that the module has under several names is there
    once, under the first of them.

    >>> from lightning_moe.checkpoint import export
    >>> export("last.ckpt", "exported", dtype=torch.bfloat16)  # doctest: +SKIP

    Args:
        path: Of a checkpoint that a run with ``ExpertParallelStrategy`` saved, in any layout.
        output: Folder for the files; made if it is not there.
        dtype: ``torch.float32`` or ``torch.bfloat16``, for tensors of floating-point numbers; ``None`` leaves them as
            they are stored, parameters in the precision in which they were optimized.
        max_shard_bytes: Of the tensors in one file. A tensor that is larger by itself gets a file of its own.
        overwrite: Replaces an earlier export in ``output``.
        on_progress: Told how far it is, in the phases "verifying" and "writing".

    Returns:
        What was written, and what could not be.

    Raises:
        CheckpointError: there is no whole checkpoint at ``path``, a file of it is damaged, ``output`` is taken, or it
            cannot be written to.
        ValueError: ``dtype`` or ``max_shard_bytes`` is not possible.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"dtype={dtype}: must be torch.float32, torch.bfloat16 or None. Use None to keep what is stored."
        )
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: must be at least 1. Use {SHARD_BYTES}, for example.")
    output = Path(output)
    checkpoint = Checkpoint(path)
    _check_free(output, overwrite)
    if found := problems(checkpoint.path, checkpoint.manifest.files, on_progress):
        raise CheckpointError("\n".join(found))
    sources, left_out = _sources(checkpoint, dtype)
    files = _named(_shards(sources, max_shard_bytes))
    size = sum(source.size for source in sources)
    try:
        writing = directory.begin(output / "export")
        try:
            _write(writing, files, size, on_progress)
            paths = _move(writing, output, files)
        finally:
            directory.abandon(writing)
    except OSError as error:
        raise CheckpointError(
            f"{output}: the export could not be written ({reasons(error)}). Free space, or export to another folder."
        ) from error
    return Exported(paths, len(sources), size, left_out)


def _check_free(output: Path, overwrite: bool) -> None:
    """Refuses a folder in which files would get mixed up."""
    if is_checkpoint(output):
        raise CheckpointError(
            f"output={str(output)!r}: is a checkpoint, and what is in its folder is read as part of it. "
            "Export to another folder."
        )
    taken = sorted(path.name for path in output.glob("model*.safetensors*"))
    if taken and not overwrite:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise CheckpointError(
            f"output={str(output)!r}: has {taken[0]}{more} already. Export to another folder, or replace the model "
            "there with overwrite=True (--overwrite on the command line)."
        )


def _sources(checkpoint: Checkpoint, dtype: torch.dtype | None) -> tuple[list[Source], list[str]]:
    """The tensors of a checkpoint's model, and the names of what is none."""

    def target(stored: torch.dtype) -> torch.dtype:
        return dtype if dtype is not None and stored.is_floating_point else stored

    sources = []
    for name in checkpoint.names(MODEL):
        stored = checkpoint.manifest.tensors[MODEL + name]
        stored_dtype: torch.dtype = getattr(torch, stored.dtype)
        read = partial(checkpoint.tensor, MODEL + name)
        sources.append(Source(name, stored.shape, target(stored_dtype), read))
    left_out = []
    extra: Mapping[str, Any] = checkpoint.run().get("extra_state", {})
    for name, value in extra.items():
        if isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in NAMES:
            sources.append(Source(name, tuple(value.shape), target(value.dtype), partial(value.detach)))
        else:
            left_out.append(name)
    return sources, left_out


def _shards(sources: list[Source], max_bytes: int) -> list[list[Source]]:
    """The tensors of each file, in their order: at least one, and further ones as far as they fit."""
    shards: list[list[Source]] = [[]]
    size = 0
    for source in sources:
        if shards[-1] and size + source.size > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(source)
        size += source.size
    return shards


def _named(shards: list[list[Source]]) -> dict[str, list[Source]]:
    if len(shards) == 1:
        return {_SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _write(folder: Path, files: Mapping[str, list[Source]], size: int, on_progress: OnProgress | None) -> None:
    """Writes the files, and their index if they are several."""
    done = 0

    def advance(written: int) -> None:
        nonlocal done
        done += written
        if on_progress is not None:
            on_progress("writing", done, size)

    advance(0)
    for name, sources in files.items():
        write_stream(folder / name, sources, advance)
    if len(files) > 1:
        weight_map = {source.name: name for name, sources in files.items() for source in sources}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        sync(folder / _INDEX)


def _move(writing: Path, output: Path, files: Mapping[str, list[Source]]) -> list[Path]:
    """Moves the files to their place, the index last, and removes an earlier export's that are left over.

    A reader that comes in between finds the earlier model, the new one, or none, and never a mixture: readers take
    ``model.safetensors`` where there is one, and else what the index names.
    """
    names = [*files, *([_INDEX] if len(files) > 1 else [])]
    if _INDEX in names:
        (output / _INDEX).unlink(missing_ok=True)
    for name in names:
        (writing / name).replace(output / name)
    left_over = [path for path in output.iterdir() if _OURS.fullmatch(path.name) and path.name not in names]
    for path in sorted(left_over, key=lambda path: path.name != _INDEX):
        path.unlink()
    sync(output)
    return [output / name for name in names]

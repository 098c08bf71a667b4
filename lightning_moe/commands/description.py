"""What is in a checkpoint, for people and for scripts: from its manifest and its run's state, no tensor is read."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_moe.checkpoint import Checkpoint, CheckpointError
from lightning_moe.checkpoint.loading import MODEL, OPTIMIZER
from lightning_moe.checkpoint.manifest import FILE_NAME, StoredTensor, damage
from lightning_moe.checkpoint.saving import RUN_FILE

_INDENT = "  "
_WIDTH = 80  # of the column with an optimizer's hyper-parameters
_UNBROKEN = "\0"


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything about a checkpoint, in types that JSON has.

    Raises:
        CheckpointError: the file of the run's state is missing or damaged.
    """
    manifest = checkpoint.manifest
    run = _run(checkpoint)
    weights = [_tensor(name, manifest.tensors[MODEL + name]) for name in checkpoint.names(MODEL)]
    buffers = set(run.get("buffers", ()))
    moments = []
    for full_name in checkpoint.names(OPTIMIZER):
        state, _, name = full_name.partition("/")
        moments.append({"state": state, **_tensor(name, manifest.tensors[OPTIMIZER + full_name])})
    groups = run.get("optimizer_groups", [])
    optimized = {name for group in groups for name in group["names"]}
    files = [{"name": name, "size": stored.size} for name, stored in manifest.files.items()]
    files.insert(0, {"name": FILE_NAME, "size": (checkpoint.path / FILE_NAME).stat().st_size})
    return {
        "path": str(checkpoint.path),
        "format_version": manifest.format_version,
        "versions": manifest.versions,
        "step": manifest.step,
        "epoch": manifest.epoch,
        "layout": {
            "world_size": manifest.layout.world_size,
            "expert_parallel_size": manifest.layout.expert_parallel_size,
            "stage": manifest.layout.stage,
            "precision": manifest.layout.precision,
        },
        "num_parameters": sum(math.prod(weight["shape"]) for weight in weights if weight["name"] not in buffers),
        "num_optimized": sum(math.prod(weight["shape"]) for weight in weights if weight["name"] in optimized),
        "weights": weights,
        "moments": moments,
        "extra_state": sorted(run.get("extra_state", {})),
        "optimizer_groups": [
            {"names": list(group["names"]), "values": {k: _plain(v) for k, v in group["values"].items()}}
            for group in groups
        ],
        "files": files,
        "size": sum(file["size"] for file in files),
    }


def other_sizes(checkpoint: Checkpoint) -> list[Path]:
    """Files that are not there, or not of the size with which they were written; none is read."""
    paths = {checkpoint.path / name: stored.size for name, stored in checkpoint.manifest.files.items()}
    return [path for path, size in paths.items() if not path.is_file() or path.stat().st_size != size]


def as_text(description: Mapping[str, Any], every_tensor: bool = False) -> str:
    """A description to read.

    Args:
        description: From :func:`describe`.
        every_tensor: Lists the optimizer's tensors too, which otherwise have one line for each kind.
    """
    blocks = [_head(description), _weights(description)]
    if description["moments"] or description["optimizer_groups"]:
        blocks.append(_optimizer(description, every_tensor))
    rows = [(file["name"], size_text(file["size"])) for file in description["files"]]
    rows.append(("total", size_text(description["size"])))
    blocks.append(["Files", *_table(rows, "<>")])
    return "\n\n".join("\n".join(lines) for lines in blocks) + "\n"


def size_text(size: int) -> str:
    """Bytes as people write them, in powers of 1000.

    >>> size_text(999), size_text(4096), size_text(5 * 10**9)
    ('999 B', '4.1 kB', '5.0 GB')
    """
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < (1000 if unit == "B" else 999.95):
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def count(number: int, thing: str) -> str:
    """A number of things.

    >>> count(1, "file"), count(2000, "file")
    ('1 file', '2,000 files')
    """
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _run(checkpoint: Checkpoint) -> dict[str, Any]:
    stored = checkpoint.manifest.files.get(RUN_FILE)
    problem = damage(checkpoint.path, RUN_FILE, stored) if stored is not None else None
    if problem is not None:
        raise CheckpointError(problem)
    return checkpoint.run()


def _tensor(name: str, stored: StoredTensor) -> dict[str, Any]:
    size = math.prod(stored.shape) * getattr(torch, stored.dtype).itemsize
    return {"name": name, "shape": list(stored.shape), "dtype": stored.dtype, "size": size}


def _plain(value: Any) -> Any:
    """A hyper-parameter in types that JSON has."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _head(description: Mapping[str, Any]) -> list[str]:
    layout = description["layout"]
    saved_in = [
        count(layout["world_size"], "rank"),
        f"expert_parallel_size {layout['expert_parallel_size']}",
        f"ZeRO stage {layout['stage']}",
        f"precision {layout['precision']}",
    ]
    parameters = f"{description['num_parameters']:,}"
    if description["num_optimized"]:
        parameters += f"; {description['num_optimized']:,} of them optimized"
    rows = [
        ("format", f"version {description['format_version']}"),
        ("saved by", ", ".join(f"{name} {version}" for name, version in description["versions"].items()) or "unknown"),
        ("saved in", ", ".join(saved_in)),
        ("step", f"{description['step']:,}"),
        ("epoch", f"{description['epoch']:,}"),
        ("parameters", parameters),
    ]
    return [description["path"], *_table(rows, "<<")]


def _weights(description: Mapping[str, Any]) -> list[str]:
    lines = ["Weights", *_tensors(description["weights"])]
    if extra := description["extra_state"]:
        lines.append(f"{_INDENT}and in {RUN_FILE}: {', '.join(extra)}")
    return lines


def _optimizer(description: Mapping[str, Any], every_tensor: bool) -> list[str]:
    by_state: dict[str, list[Mapping[str, Any]]] = {}
    for moment in description["moments"]:
        by_state.setdefault(moment["state"], []).append(moment)
    lines = []
    if every_tensor:
        for state, tensors in by_state.items():
            lines += [f"Optimizer {state}", *_tensors(tensors), ""]
    rows = [(state, _sum(tensors)) for state, tensors in by_state.items()]
    for number, group in enumerate(description["optimizer_groups"]):
        # No break within a value.
        values = (f"{key}={_value(value)}".replace(" ", _UNBROKEN) for key, value in group["values"].items())
        text = ", ".join([count(len(group["names"]), "parameter"), *values])
        parts = [part.replace(_UNBROKEN, " ") for part in textwrap.wrap(text, _WIDTH, break_long_words=False)]
        rows += [(f"group {number}" if part is parts[0] else "", part) for part in parts]
    return [*lines, "Optimizer", *_table(rows, "<<")]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(_value(entry) for entry in value)})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _tensors(tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [("name", "shape", "dtype", "size")]
    rows += [(t["name"], str(t["shape"]), t["dtype"], size_text(t["size"])) for t in tensors]
    yield from _table(rows, "<<<>")
    yield _INDENT + _sum(tensors)


def _sum(tensors: Sequence[Mapping[str, Any]]) -> str:
    return f"{count(len(tensors), 'tensor')}, {size_text(sum(tensor['size'] for tensor in tensors))}"


def _table(rows: Iterable[Sequence[str]], alignments: str) -> list[str]:
    """Rows with columns of equal width, each to the left (``<``) or to the right (``>``)."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(alignments))]
    lines = []
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, alignments, widths, strict=True))
        lines.append((_INDENT + "  ".join(cells)).rstrip())
    return lines

"""What is no tensor of the model: written by ``torch.save`` and read with ``weights_only``, which executes nothing."""

from __future__ import annotations

import argparse
import dataclasses
import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from lightning_moe.checkpoint.directory import sync
from lightning_moe.checkpoint.errors import CheckpointError


def plain(value: Any) -> Any:
    """The same in types that can be read back without executing code, as far as there is such a form.

    Dataclasses and argparse's namespaces become dictionaries of their fields, paths text, enumerations their values,
    NumPy's scalars Python's and its arrays tensors, subclasses of dictionaries dictionaries.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(entry) for entry in value)
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, torch.nn.Parameter):
        return value.detach()
    if type(value).__module__ == "numpy":
        if not getattr(value, "ndim", 0):
            return value.item()
        # torch hardly knows unsigned integers of more than a byte.
        wide = value.dtype.kind == "u" and value.dtype.itemsize > 1
        return torch.from_numpy(value.astype("int64") if wide else value.copy())
    return value


def unreadable(value: Any) -> str | None:
    """Why a value could not be read back with ``weights_only``; ``None`` if it can."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        return f"it cannot be pickled ({error})"
    buffer.seek(0)
    names = get_unsafe_globals_in_checkpoint(buffer)
    return f"it holds {', '.join(sorted(names))}" if names else None


def check_readable(state: dict[str, Any], what: str) -> None:
    """Refuses state that a checkpoint could not give back.

    Raises:
        CheckpointError: naming the entry, by its keys, and what is wrong with it.
    """
    if unreadable(state) is None:
        return
    place, value = what, state
    while isinstance(value, dict):
        found = next(((key, entry) for key, entry in value.items() if unreadable(entry)), None)
        if found is None:
            break
        place, value = f"{place}[{found[0]!r}]", found[1]
    raise CheckpointError(
        f"{place}: cannot be saved, because {unreadable(value)}, and reading that back would execute code. Put "
        "numbers, text, tensors, lists and dictionaries in its place, or, for an object of a class of yours, call "
        "torch.serialization.add_safe_globals([...]) with the class."
    )


def without_unreadable(values: Any) -> tuple[Any, list[str]]:
    """A dictionary without what a checkpoint could not give back, and the keys left out; nothing is left of others.

    For what no run needs in order to resume.
    """
    values = plain(values)
    if unreadable(values) is None:
        return values, []
    if not isinstance(values, dict):
        return None, ["everything"]
    left_out = [key for key, value in values.items() if unreadable(value)]
    return {key: value for key, value in values.items() if key not in left_out}, [str(key) for key in left_out]


def write_objects(path: Path, state: Any) -> None:
    """Writes state into a file, through to the disk."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getbuffer())  # torch's own writer hides why it could not write
    sync(path)


def read_objects(path: Path, mapped: bool = False) -> Any:
    """Reads what :func:`write_objects` wrote; executes nothing.

    Args:
        path: Of the file.
        mapped: Leaves tensors in the file until they are used.

    Raises:
        CheckpointError: the file holds something that it may not.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({str(error).splitlines()[0]}). It may be damaged.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: cannot be read without executing code from it, which is not done ({str(error).splitlines()[0]}). "
            "If you made it and it holds a class of yours, call torch.serialization.add_safe_globals([...]) first."
        ) from error

"""Writing a safetensors file one tensor after the other: none is in memory but the one that is being written.

The format: eight bytes with the length of the header, little-endian; the header, JSON, with the place of every tensor;
the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_moe.checkpoint.directory import sync

NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the types that it has."""


@dataclass(frozen=True)
class Source:
    """A tensor that is to be written.

    Args:
        name: In the file.
        shape: Of the tensor.
        dtype: That it is written in, one of :data:`NAMES`.
        read: Gives it, in any dtype; called once, when it is its turn.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes that it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_stream(path: Path, sources: Iterable[Source], on_written: Callable[[int], None]) -> None:
    """Writes a file, through to the disk.

    Args:
        path: Of the file.
        sources: What is to be in it.
        on_written: Called after each tensor with its size in bytes.

    Raises:
        OSError: It cannot be written.
    """
    # The widest first: safetensors reads a tensor only where its place is a multiple of the size of its elements.
    ordered = sorted(sources, key=lambda source: -source.dtype.itemsize)
    with path.open("wb") as stream:
        stream.write(_header(ordered))
        for source in ordered:
            stream.write(_data(source))
            on_written(source.size)
    sync(path)


def _header(sources: list[Source]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in sources:
        start, end = end, end + source.size
        header[source.name] = {
            "dtype": NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _data(source: Source) -> Any:
    """The bytes of a tensor, where they are in memory."""
    tensor = source.read().to(source.dtype)
    assert tensor.shape == source.shape, f"{source.name} is {list(tensor.shape)} and was to be {list(source.shape)}"
    return tensor.reshape(-1).view(torch.uint8).numpy().data

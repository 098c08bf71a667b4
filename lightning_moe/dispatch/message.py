"""Several tensors of different dtypes in the rows of one message, so that one collective carries them all.

Shapes: S rows of a message, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.dispatch.permute import kernels_for

_ROW_ALIGNMENT = 16
"""Bytes to which rows are padded, so that kernels can read any part of one in wide words."""


@dataclass(frozen=True)
class Field:
    """One tensor's part of every row.

    Args:
        width: Numbers in a row.
        dtype: Their type on the wire.
    """

    width: int
    dtype: torch.dtype


def layout(fields: Sequence[Field]) -> tuple[list[int], int]:
    """Where every field begins in a row, and the length of the row, in bytes.

    >>> layout([Field(3, torch.bfloat16), Field(2, torch.float32), Field(2, torch.int32)])
    ([0, 8, 16], 32)
    """
    offsets, end = [], 0
    for field in fields:
        end = _round_up(end, field.dtype.itemsize)
        offsets.append(end)
        end += field.width * field.dtype.itemsize
    return offsets, _round_up(end, _ROW_ALIGNMENT)


def pack(fields: Sequence[Field], tensors: Sequence[Tensor]) -> Tensor:
    """A message whose row s holds row s of every tensor, [S, B] uint8.

    Args:
        fields: What a row consists of; values are converted to the dtype of their field.
        tensors: One for every field, [S, width].
    """
    offsets, row_bytes = layout(fields)
    message_SB = tensors[0].new_empty((len(tensors[0]), row_bytes), dtype=torch.uint8)
    for field, offset, tensor in zip(fields, offsets, tensors, strict=True):
        _part(message_SB, field, offset).copy_(tensor)
    return message_SB


def pack_rows(
    fields: Sequence[Field], x_TD: Tensor, token_S: Tensor, scores: Tensor, ids: Tensor, entry_S: Tensor
) -> Tensor:
    """A message, [S, B] uint8: in row s row ``token_S[s]`` of ``x`` and row ``entry_S[s]`` of scores and ids."""
    if (kernels := kernels_for(x_TD)) and fields[1].dtype == torch.float32:
        message: Tensor = kernels.pack_rows(x_TD, token_S, scores, ids, entry_S, fields[0].dtype)
        return message
    offsets, row_bytes = layout(fields)
    message_SB = x_TD.new_empty((len(token_S), row_bytes), dtype=torch.uint8)
    tables = (x_TD, token_S), (scores, entry_S), (ids, entry_S)
    for field, offset, (table, index_S) in zip(fields, offsets, tables, strict=True):
        part = _part(message_SB, field, offset)
        if table.dtype == field.dtype and len(index_S):
            torch.index_select(table, 0, index_S, out=part)
        else:
            part.copy_(table.index_select(0, index_S))
    return message_SB


def unpack(fields: Sequence[Field], message_SB: Tensor) -> list[Tensor]:
    """The fields of a message, as views of it, [S, width] each."""
    offsets, _ = layout(fields)
    return [_part(message_SB, field, offset) for field, offset in zip(fields, offsets, strict=True)]


def _part(message_SB: Tensor, field: Field, offset: int) -> Tensor:
    size = field.width * field.dtype.itemsize
    return message_SB[:, offset : offset + size].view(field.dtype)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

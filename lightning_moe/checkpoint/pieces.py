"""What a rank holds of a logical tensor, and how ``torch.distributed.checkpoint`` (DCP) saves and fills it.

A logical tensor is one that does not depend on the layout: a parameter with all its experts, or one of its optimizer
moments. It is stored flattened, because whatever ZeRO and expert parallelism make of it, the part of one rank is one
range of that.

Shapes: N elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from typing_extensions import override

_SMALLEST_SHARE = 1 << 16
"""Elements below which replicas do not divide a tensor between them: a file's header has an entry for each part."""


@dataclass(frozen=True, eq=False)
class Piece:
    """One range of a flattened logical tensor, in this rank's memory.

    Args:
        shape: Of the whole tensor.
        start: Where the range begins in the flattened tensor.
        values_N: The range; a view, so that loading fills what it is a view of. It may be empty.
    """

    shape: tuple[int, ...]
    start: int
    values_N: Tensor

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    def share(self, replica: int, replicas: int) -> Piece:
        """The part of this range that one of several ranks writes that all hold the whole of it."""
        length = self.values_N.numel()
        size = max(_SMALLEST_SHARE, -(-length // replicas))
        first = min(length, replica * size)
        part = self.values_N[first : min(length, first + size)]
        return Piece(self.shape, self.start + first, part)

    def on_cpu(self) -> Piece:
        """A copy that later training steps leave alone."""
        return Piece(self.shape, self.start, self.values_N.detach().to("cpu", copy=True))

    @property
    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.values_N.numel()]))


Pieces = Mapping[str, Piece]
"""By name of the logical tensor: at most one piece of each on a rank."""


class SavePieces(DefaultSavePlanner):
    """Plans the saving of pieces; refuses tensors of which ranks hold less than the whole, or parts twice."""

    state_dict: Any

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    @override
    def create_local_plan(self) -> SavePlan:
        pieces: Pieces = self.state_dict
        self.plan = SavePlan([_write_item(name, piece) for name, piece in pieces.items() if piece.values_N.numel()])
        return self.plan

    @override
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        values_N: Tensor = self.state_dict[index.fqn].values_N
        return values_N.detach()


class LoadPieces(DefaultLoadPlanner):
    """Plans the filling of pieces from whatever ranges the files have."""

    state_dict: Any
    metadata: Any

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    @override
    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    @override
    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, piece in self.state_dict.items():
            if piece.values_N.numel():
                stored = self.metadata.state_dict_metadata[name]
                assert isinstance(stored, TensorStorageMetadata)
                items += create_read_items_for_chunk_list(name, stored, [piece._chunk])
        return LoadPlan(items)

    @override
    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        values_N: Tensor = self.state_dict[index.fqn].values_N
        return values_N.detach()


def _write_item(name: str, piece: Piece) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, torch.Size([piece.start])),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=piece._chunk,
            properties=TensorProperties(dtype=piece.values_N.dtype),
            size=torch.Size([piece.numel]),
        ),
    )

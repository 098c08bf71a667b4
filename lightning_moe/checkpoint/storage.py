"""The files of a checkpoint's tensors: safetensors, several a rank, each small enough to be staged in memory.

Readable by DCP's own ``HuggingFaceStorageReader`` and by safetensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from bisect import bisect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from typing_extensions import override

from lightning_moe.checkpoint.directory import sync
from lightning_moe.checkpoint.manifest import StoredFile, describe_file

SUFFIX = ".safetensors"
_FILE_BYTES = 256 << 20
_OFFSETS = "DCP_SHARDING_INFO"  # the key under which DCP's reader looks for where a part belongs


class SafetensorsWriter(StorageWriter):
    """Writes every rank's pieces into files of that rank's own.

    Args:
        folder: An existing one.
        on_written: Called on the coordinating rank with the files of all ranks once every one has written its own.
            What it raises is raised on all ranks.
    """

    def __init__(self, folder: Path, on_written: Callable[[Metadata, dict[str, StoredFile]], None]) -> None:
        super().__init__()
        self._folder = folder
        self._on_written = on_written

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        # While a file is made to reach the disk and read back for its checksum, the next one is written.
        with ThreadPoolExecutor(2) as finishing:
            files = []
            for index, items in enumerate(_files(plan.items)):
                path = self._folder / f"rank{plan.storage_data:05d}-{index:04d}{SUFFIX}"
                write_file(path, items, planner)
                files.append((path.name, items, finishing.submit(sync, path), finishing.submit(describe_file, path)))
            for name, items, synced, described in files:
                synced.result()
                results += [WriteResult(item.index, _bytes(item), (name, described.result())) for item in items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    @override
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [SavePlan(plan.items, rank, plan.planner_data) for rank, plan in enumerate(plans)]

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._on_written(metadata, dict(result.storage_data for of_rank in results for result in of_rank))

    @override
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    @override
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    @override
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in str(checkpoint_id)


def write_file(path: Path, items: list[WriteItem], planner: SavePlanner) -> None:
    """Writes some pieces into one file."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    offsets = {}
    memory: dict[int, list[tuple[int, int]]] = {}
    for item in items:
        assert item.tensor_data is not None
        data = planner.resolve_data(item)
        assert isinstance(data, Tensor)
        data = data.contiguous().cpu()
        # safetensors refuses tensors that overlap, such as a buffer and a view of it.
        tensors[item.index.fqn] = data if _take(memory, data) else data.clone()
        offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
    save_file(tensors, path, metadata={_OFFSETS: json.dumps(offsets), "format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files for its user alone


def _take(memory: dict[int, list[tuple[int, int]]], tensor: Tensor) -> bool:
    """Notes the memory of a tensor, by storage; ``False`` if some of it is taken."""
    begin = tensor.data_ptr()
    end = begin + tensor.nbytes
    taken = memory.setdefault(tensor.untyped_storage().data_ptr(), [])
    place = bisect(taken, (begin, end))
    if (place and taken[place - 1][1] > begin) or (place < len(taken) and taken[place][0] < end):
        return False
    taken.insert(place, (begin, end))
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without DCP's warning that a single process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _files(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    batch: list[WriteItem] = []
    size = 0
    for item in items:
        if batch and size + _bytes(item) > _FILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += _bytes(item)
    if batch:
        yield batch


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return int(item.tensor_data.chunk.sizes.numel()) * item.tensor_data.properties.dtype.itemsize

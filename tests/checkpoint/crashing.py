"""Two ranks that save twice under one name, of which some are killed in the middle of the second save."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch
import torch.distributed as dist

from lightning_moe.checkpoint import CheckpointError, directory, manifest, pieces, saving, storage
from lightning_moe.checkpoint.pieces import Piece
from lightning_moe.checkpoint.saving import Snapshot, save

WORLD = 2
SIZE = 1000


@dataclass(frozen=True)
class Moment:
    """A moment of a save.

    Args:
        where: The object that has the function.
        name: Of the function.
        when: ``"before"`` its ``call``, ``"after"`` it, or ``"half"``: once half of what it writes is written.
        call: From 1.
        rank: Which has such a moment; the first alone puts a checkpoint together.
    """

    where: Any
    name: str
    when: str
    call: int = 1
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.when} {self.name} {self.call}"


MOMENTS = [
    Moment(directory, "begin", "before"),
    Moment(directory, "begin", "after"),
    Moment(saving, "_gather", "before", rank=1),
    Moment(saving, "_gather", "after", rank=1),
    Moment(pieces.SavePieces, "create_local_plan", "before", rank=1),
    Moment(storage.SafetensorsWriter, "prepare_global_plan", "before"),
    Moment(storage, "write_file", "before", rank=1),
    Moment(safetensors.torch, "save_file", "half", rank=1),
    Moment(safetensors.torch, "save_file", "after", rank=1),
    Moment(storage, "describe_file", "before", rank=1),
    Moment(storage, "write_file", "after", rank=1),
    Moment(storage.SafetensorsWriter, "finish", "before"),
    Moment(saving, "write_objects", "before", 1),
    Moment(saving, "write_objects", "half", 1),
    Moment(saving, "write_objects", "before", 2),
    Moment(saving, "write_objects", "after", 2),
    Moment(manifest.Manifest, "write", "before"),
    Moment(manifest.Manifest, "write", "half"),
    Moment(manifest.Manifest, "write", "after"),
    Moment(directory, "commit", "before"),
    Moment(directory, "_exchange", "before"),
    Moment(directory, "_exchange", "after"),
    Moment(directory, "remove", "half", 2),  # of the checkpoint whose place was taken
    Moment(directory, "remove", "after", 2),
    Moment(directory, "commit", "after"),
]


def snapshot(rank: int, value: float) -> Snapshot:
    """All of it full of one number, a half on each rank."""
    half = SIZE // WORLD
    weights = torch.full((half,), value)
    piece = Piece((SIZE,), rank * half, weights)
    scalars = {"w": {"step": torch.tensor(value)}}
    return Snapshot({"model/w": piece, "optimizer/exp_avg/w": piece}, scalars, {"value": value}, {"rank": rank})


def run(folder: Path, moment: Moment | None, kill_all: bool, existing: bool = True) -> list[int | None]:
    """The exit codes of the ranks; 0 where both saves returned, 3 where the second one raised."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(r, folder, moment, kill_all, existing)) for r in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(40)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes


def _rank(rank: int, folder: Path, moment: Moment | None, kill_all: bool, existing: bool) -> None:
    sys.stderr = (folder / f"stderr.{rank}").open("w")
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=20))
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    code = 0
    if existing:
        save(snapshot(rank, 1.0), folder / "last.ckpt", dist.group.WORLD)
    dist.barrier()

    def die() -> None:
        others = [int((folder / f"pid.{r}").read_text()) for r in range(WORLD) if r != rank]
        for pid in [*(others if kill_all else []), os.getpid()]:
            os.kill(pid, signal.SIGKILL)

    try:
        with dying(moment, die) if moment is not None and moment.rank == rank else nothing():
            save(snapshot(rank, 2.0), folder / "last.ckpt", dist.group.WORLD)
    except CheckpointError:
        code = 3
    os._exit(code)


@contextmanager
def nothing() -> Iterator[None]:
    yield


@contextmanager
def dying(moment: Moment, die: Callable[[], None]) -> Iterator[None]:
    """Ends the process when the moment comes."""
    original, calls = getattr(moment.where, moment.name), 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != moment.call:
            return original(*args, **kwargs)
        if moment.when == "before":
            die()
        if moment.name == "remove" and moment.when == "half":
            for path in sorted(args[0].iterdir())[:2]:
                path.unlink()
            die()
        result = original(*args, **kwargs)
        if moment.when == "half":
            _halve(*args)
        die()
        return result

    with patch.object(moment.where, moment.name, replaced):
        yield
    raise AssertionError(f"{moment} never came")


def _halve(*args: Any) -> None:
    """Makes of what a function has just written what stands there when half of it is written."""
    path = next(arg for arg in args if isinstance(arg, Path))
    if isinstance(args[0], manifest.Manifest):
        path = path / manifest.FILE_NAME
    os.truncate(path, path.stat().st_size // 2)

"""Measures checkpoints of this package's format next to DeepSpeed's own: their size, and seconds and memory they take.

    python benchmarks/checkpoints.py                               # three layouts of 100 million parameters
    python benchmarks/checkpoints.py --layouts 4:4:1 2:1:3         # ranks : expert_parallel_size : ZeRO stage
    python benchmarks/checkpoints.py --parameters 5e6 --rounds 2   # a try in a minute; its figures mean little

Ranks are processes of one machine with gloo and one thread each. A run of MoE layers in fp32 takes one step with
AdamW, and then saves and loads in turn, in both formats, from the same engine and onto the same file system. Ours is
``trainer.save_checkpoint`` and ``strategy.load_checkpoint``; DeepSpeed's is what Lightning's own DeepSpeedStrategy
does with ``engine.save_checkpoint`` and ``engine.load_checkpoint``, without the optimizer's ``state_dict`` that it
makes and drops.

A time is that of all ranks, from a barrier to a barrier, on the slowest; a round is one of each in a random order, and
a ratio the median over rounds of that of two times of one round. Each save goes to a new folder, which is removed
afterwards, and the disk is idle before the next. Loads are of files in the page cache, into the layout that saved them.

The two do not do the same. Ours waits for the disk (fsync), reads every file back for its checksum, and compares all
checksums before it loads; DeepSpeed does none of it, so that a loss of power may take its checkpoint and a damaged
file is loaded. It writes weights twice at ZeRO 1 and 2, once as the model and once as the optimizer's. Hence the rows

* "save: ours, no fsync": the same with an os.fsync that does nothing;
* "save: DeepSpeed, then fsync": its save and after it an fsync of all its files, which the ranks divide;

which no limit is held against. An empty cell is something that is not there or not measured. Columns:

* "seconds" is the median and "spread" the distance of the quartiles over it; "of DeepSpeed's" the ratio of the row to
  DeepSpeed's plain save or load.
* "fsync s" and "checksum s": seconds of these that are in a time, medians, on the rank that spends most on it.
  Checksums include reading the file.
* "anonymous MB": the most by which memory of a rank other than mapped files (RssAnon) was above what it was before,
  sampled from outside every few ms, over ranks and two runs that are not timed. Freed memory is given back before.
* "resident MB": the same for all pages, mapped files included, by the kernel's high-water mark (VmHWM).

Exits with 1, and lists where: our files have more than 1.02 times the bytes of the tensors in them; our save or load
takes longer than DeepSpeed's; ours takes more anonymous memory than 512 MB and than the largest part of a tensor on a
rank; or a load does not bring back what was saved. MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from checkpoint_ranks import (
    DEEPSPEED,
    EXPERTS,
    NO_FSYNC,
    OURS,
    Layout,
    fsync_all,
    read_all,
    status,
    survives,
    time_one,
    train,
    watch_one,
)
from timing import Timings, header, progress, report, show, table

from lightning_moe.checkpoint import Checkpoint
from lightning_moe.testing import RankPool

SYNCED = "DeepSpeed, then fsync"
SAVERS, LOADERS = (OURS, NO_FSYNC, DEEPSPEED), (OURS, DEEPSPEED)
COLUMNS = ("seconds", "spread", "of DeepSpeed's", "fsync s", "checksum s", "anonymous MB", "resident MB")
MB = 10**6
LARGER, SLOWER, MEMORY = 1.02, 1.0, 512 * MB
INTERVAL = 0.002
WATCHED = 2


class Sampler(threading.Thread):
    """Samples the anonymous memory of processes: from outside, because a rank that writes a file holds its own lock.

    Args:
        pids: Of the processes.
    """

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self._pids, self._over = pids, threading.Event()
        self._samples: list[tuple[float, list[int]]] = []

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(INTERVAL):
            self._samples.append((time.monotonic(), [status(pid, "RssAnon") for pid in self._pids]))

    def growth(self, rank: int, watched: dict[str, float]) -> float:
        """By how many bytes a rank's memory was above that at the beginning, at most."""
        inside = [sizes[rank] for at, sizes in self._samples if watched["begin"] <= at <= watched["end"]]
        return max(inside, default=watched["anonymous"]) - watched["anonymous"]


class Found:
    """What is measured of one layout.

    Args:
        rounds: Timed ones of each kind.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.saves = Timings({name: [] for name in (*SAVERS, SYNCED)})
        self.loads = Timings({name: [] for name in LOADERS})
        self.parts: dict[tuple[str, str, str], list[float]] = {}
        self.memory: dict[tuple[str, str, str], float] = {}

    def round(self, number: int) -> str:
        """What to call it."""
        return f"round {number} of {self.rounds}" if number else "warm-up"

    def note(self, timings: Timings, action: str, name: str, by_rank: list[dict[str, float]]) -> float:
        """Keeps a time, that of the slowest rank, and what of it went where."""
        seconds = max(rank["seconds"] for rank in by_rank)
        timings.seconds[name].append(seconds)
        for what in ("fsync", "checksum"):
            self.parts.setdefault((action, name, what), []).append(max(rank[what] for rank in by_rank))
        return seconds

    def rows(self) -> list[list[str]]:
        """The table's."""
        rows = []
        for action, timings in (("save", self.saves), ("load", self.loads)):
            for name in timings.seconds:
                cells = [f"{action}: {name}", f"{timings.median(name):.2f}", f"{timings.spread(name):.1%}"]
                cells.append(f"{timings.ratio(name, DEEPSPEED):.3f}")
                for what in ("fsync", "checksum"):
                    values = self.parts.get((action, name, what), [0.0])
                    cells.append(f"{statistics.median(values):.2f}" if any(values) else "")
                for what in ("anonymous", "resident"):
                    value = self.memory.get((action, name, what), -1)
                    cells.append(f"{value / MB:.0f}" if value >= 0 else "")
                rows.append(cells)
        return rows


def folder_bytes(path: Path) -> int:
    """Of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def tensor_bytes(path: Path) -> int:
    """Of the logical tensors in a checkpoint of ours."""
    tensors = Checkpoint(path).manifest.tensors.values()
    return sum(math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize for tensor in tensors)


def file_system(path: Path) -> str:
    """The kind of file system that a folder is on."""
    mounts, best = Path("/proc/self/mounts"), ("", "")
    if mounts.exists():
        for line in mounts.read_text().splitlines():
            _, place, kind, *_ = line.split()
            if path.resolve().is_relative_to(place) and len(place) >= len(best[0]):
                best = (place, kind)
    return best[1] or "an unknown file system"


def discard(path: Path) -> None:
    """Removes a folder and leaves the disk idle."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()


def time_saves(pool: RankPool, found: Found, folder: Path, where: str) -> None:
    """Saves in all ways in turn, after a round that does not count."""
    for number in range(found.rounds + 1):
        for name in random.Random(number).sample(SAVERS, len(SAVERS)):
            progress(
                f"{where}: saving, " + (f"round {number} of {found.rounds}" if number else "warm-up") + f": {name}"
            )
            path = folder / f"save-{number}-{SAVERS.index(name)}"
            os.sync()
            by_rank = pool.run(time_one, "save", name, str(path))
            synced = max(pool.run(fsync_all, str(path))) if name == DEEPSPEED else 0.0
            discard(path)
            if not number:
                continue
            seconds = found.note(found.saves, "save", name, by_rank)
            if name == DEEPSPEED:
                found.saves.seconds[SYNCED].append(seconds + synced)
                found.parts.setdefault(("save", SYNCED, "fsync"), []).append(synced)


def time_loads(pool: RankPool, found: Found, paths: dict[str, Path], where: str) -> None:
    """Loads both in turn, from the page cache, after a round that does not count."""
    for path in paths.values():
        pool.run(read_all, str(path))
    for number in range(found.rounds + 1):
        for name in random.Random(number).sample(LOADERS, len(LOADERS)):
            progress(f"{where}: loading, {found.round(number)}: {name}")
            by_rank = pool.run(time_one, "load", name, str(paths[name]))
            if number:
                found.note(found.loads, "load", name, by_rank)


def watch(pool: RankPool, found: Found, paths: dict[str, Path], folder: Path, where: str) -> None:
    """Measures the memory of both actions in both formats."""
    for number in range(WATCHED):
        for name, kept in paths.items():
            for action in ("save", "load"):
                progress(f"{where}: memory, run {number + 1} of {WATCHED}: {action}, {name}")
                path = folder / "watched" if action == "save" else kept
                with Sampler(pool.pids) as sampler:
                    by_rank = pool.run(watch_one, action, name, str(path))
                grown = {
                    "anonymous": max(sampler.growth(rank, watched) for rank, watched in enumerate(by_rank)),
                    "resident": max(watched["resident"] for watched in by_rank),
                }
                for what, value in grown.items():
                    key = (action, name, what)
                    found.memory[key] = max(value, found.memory.get(key, value))
                if action == "save":
                    discard(path)


def measure(pool: RankPool, layout: Layout, parameters: int, rounds: int, folder: Path) -> list[str]:
    """All figures of one layout; shows them and returns what is missed."""
    where, found, problems = str(layout), Found(rounds), []
    progress(f"{where}: training a step")
    ranks = pool.run(train, layout, parameters)
    time_saves(pool, found, folder, where)
    paths = {name: folder / f"kept-{place}" for place, name in enumerate(LOADERS)}
    for name, path in paths.items():
        progress(f"{where}: checking that {name} loads what it saved")
        pool.run(time_one, "save", name, str(path))
        os.sync()
        if not all(pool.run(survives, name, str(path))):
            problems.append(f"{where}: {name}: a load does not bring back what was saved")
    time_loads(pool, found, paths, where)
    watch(pool, found, paths, folder, where)

    tensors = tensor_bytes(paths[OURS])
    sizes = {name: folder_bytes(path) for name, path in paths.items()}
    for path in paths.values():
        discard(path)
    largest = max(rank["largest"] for rank in ranks)
    show(
        f"\n{where}; {ranks[0]['threads']} thread each, gloo; medians of {rounds} rounds. Logical tensors "
        f"{tensors / MB:.1f} MB, the largest part on a rank {largest / MB:.1f} MB. On disk ours is "
        f"{sizes[OURS] / tensors:.4f} of the tensors, DeepSpeed's {sizes[DEEPSPEED] / tensors:.4f}.\n\n"
        + table((f"on {file_system(folder)}", *COLUMNS), found.rows())
    )
    if found.memory["save", OURS, "resident"] < 0:
        show("No resident MB: the kernel's high-water mark cannot be set back here.")
    return problems + check(found, where, sizes[OURS] / tensors, max(largest, MEMORY))


def check(found: Found, where: str, size: float, memory: float) -> list[str]:
    """Which limits are exceeded."""
    problems = [f"{where}: files have {size:.4f} of the tensors' bytes, limit {LARGER}"] if size > LARGER else []
    for action, timings in (("save", found.saves), ("load", found.loads)):
        ratio, grown = timings.ratio(OURS, DEEPSPEED), found.memory[action, OURS, "anonymous"]
        if ratio > SLOWER:
            problems.append(f"{where}: a {action} takes {ratio:.3f} of DeepSpeed's time, limit {SLOWER:.3f}")
        if grown > memory:
            problems.append(f"{where}: a {action} takes {grown / MB:.0f} MB, limit {memory / MB:.0f}")
    return problems


def layout_of(text: str) -> Layout:
    """What an argument says.

    Raises:
        argparse.ArgumentTypeError: it is not three numbers that go together.
    """
    try:
        world, ep_size, stage = (int(part) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ranks:expert_parallel_size:stage, as 4:2:1 is") from None
    if min(world, ep_size) < 1 or world % ep_size or EXPERTS % ep_size or stage not in (1, 2, 3):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expert_parallel_size must divide the ranks and {EXPERTS} experts, and the stage be 1, 2 or 3"
        )
    return Layout(world, ep_size, stage)


def main() -> int:
    """Measures every layout and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layouts",
        nargs="+",
        type=layout_of,
        default=[Layout(2, 2, 1), Layout(2, 2, 3), Layout(4, 2, 2)],
        metavar="R:E:Z",
        help="ranks, expert_parallel_size and ZeRO stage (2:2:1 2:2:3 4:2:2)",
    )
    parser.add_argument("--parameters", type=float, default=100e6, help="of all experts together, about (1e8)")
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 for a result to quote (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (where the system has temporary files)")
    args = parser.parse_args()
    show(header(torch.device("cpu")))
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=args.folder) as folder:
        for layout in args.layouts:
            with RankPool(layout.world, timeout=600) as pool:
                problems += measure(pool, layout, int(args.parameters), args.rounds, Path(folder))
    return report(problems)


if __name__ == "__main__":
    sys.exit(main())

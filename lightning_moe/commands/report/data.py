"""What a run has written: scalars, loads of the experts, the config. Reads what is whole, also of a running run."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

METRICS_FILE = "metrics.csv"  # of Lightning's CSVLogger
EVENTS_FILE = "events.out.tfevents"  # how the names of TensorBoard's files begin
_EXPERTS_FOLDERS = "experts", "experts-v*"  # of ExpertHeatmap; another where a run was in the same place before
LOAD_FILE = "load.jsonl"
CLASSES_FILE = "classes.jsonl"

_NOT_METRICS = ("step", "epoch", "hp_metric")
# val_loss, val_moe/load_imbalance, valid/loss; ThroughputMonitor's validate/time
_VALIDATION = re.compile(r"(?:val(?:id(?:at(?:e|ion))?)?|sanity_check)(?:[/_.-]|$)", re.I)
_TEST = re.compile(r"(?:test|predict)(?:[/_.-]|$)", re.I)
_Line = TypeVar("_Line", "Load", "Classes")


@dataclass(frozen=True)
class Series:
    """One metric.

    Args:
        steps: In rising order.
        values: One for each step; not finite where the run's was not.
    """

    steps: list[int]
    values: list[float]


Scalars = Mapping[str, Series]


@dataclass(frozen=True)
class Load:
    """The experts' load at one step.

    Args:
        step: Optimizer step.
        layers: Names of the layers.
        tokens_per_expert: Assignments, for each layer and expert.
        first_step: From which on they are counted, if it is known.
    """

    step: int
    layers: list[str]
    tokens_per_expert: list[list[int]]
    first_step: int | None = None

    @property
    def span(self) -> str:
        """Its steps in words."""
        if self.first_step is None or self.first_step == self.step:
            return f"step {self.step:,}"
        return f"steps {self.first_step:,} to {self.step:,}"


@dataclass(frozen=True)
class Classes:
    """Which classes of tokens the experts got at one step.

    Args:
        step: Optimizer step.
        layers: Names of the layers.
        classes: Names of the classes.
        assignments: For each layer, class and expert.
    """

    step: int
    layers: list[str]
    classes: list[str]
    assignments: list[list[list[int]]]


def has_tensorboard() -> bool:
    """Whether event files can be read here."""
    return importlib.util.find_spec("tensorboard") is not None


def event_files(folder: Path) -> list[Path]:
    """TensorBoard's files of a folder, in the order of their names, which is that of their start."""
    return sorted(path for path in folder.glob(f"{EVENTS_FILE}*") if path.is_file())


def last_written(folder: Path) -> float:
    """When a run last wrote into its folder, in seconds since the epoch; 0 where it has written nothing."""
    files = [folder / METRICS_FILE, *event_files(folder)]
    files += [path for name in (LOAD_FILE, CLASSES_FILE) if (path := newest_of_experts(folder, name))]
    return max((path.stat().st_mtime for path in files if path.is_file()), default=0.0)


def newest_of_experts(folder: Path, name: str) -> Path | None:
    """ExpertHeatmap's file of this name under a folder, that of its last run."""
    paths = [path for pattern in _EXPERTS_FOLDERS for path in folder.glob(f"{pattern}/{name}") if path.is_file()]
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def is_of_validation(metric: str) -> bool:
    """By the name."""
    return _VALIDATION.match(metric) is not None


def is_of_test(metric: str) -> bool:
    """By the name."""
    return _TEST.match(metric) is not None


def read_scalars(folder: Path) -> dict[str, Series]:
    """All metrics of a folder. Of a value that both sources have, that of the CSV file, which is not rounded."""
    scalars = read_events(folder) if event_files(folder) and has_tensorboard() else {}
    if (folder / METRICS_FILE).is_file():
        scalars = united(scalars, read_csv(folder / METRICS_FILE))
    return scalars


def read_csv(path: Path) -> dict[str, Series]:
    """The metrics of a file of CSVLogger.

    A line without an end is still being written, and left out.
    """
    whole_lines = _settled_text(path).replace("\0", "").rpartition("\n")[0].splitlines()
    most = csv.field_size_limit()
    rows = csv.reader(line for line in whole_lines if len(line) <= most or max(map(len, line.split(","))) <= most)
    names = next(rows, [])
    points: dict[str, list[tuple[int, float]]] = {}
    if "step" not in names:
        return {}
    for row in rows:
        cells = dict(zip(names, row, strict=False))
        step = _number(cells["step"]) if len(row) == len(names) else None
        if step is None or not math.isfinite(step):
            continue
        for name, cell in cells.items():
            value = None if name in _NOT_METRICS else _number(cell)
            if value is not None:
                points.setdefault(name, []).append((int(step), value))
    return {name: _series(of_name) for name, of_name in points.items()}


def read_events(folder: Path) -> dict[str, Series]:
    """The scalars of all event files of a folder, which are several where a run was resumed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = logging.getLogger("tensorboard")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a record that is cut off is no news here
    try:
        everything = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        everything.Reload()
    finally:
        logger.setLevel(level)
    names = [name for name in everything.Tags()["scalars"] if name not in _NOT_METRICS]
    return {name: _series((event.step, event.value) for event in everything.Scalars(name)) for name in names}


def united(scalars: Scalars, others: Scalars) -> dict[str, Series]:
    """The points of both; where both have a step of a metric, that of ``others``."""
    result = dict(scalars)
    for name, series in others.items():
        points = dict(zip(series.steps, series.values, strict=True))
        if name in result:
            points = dict(zip(result[name].steps, result[name].values, strict=True)) | points
        steps = sorted(points)
        result[name] = Series(steps, [points[step] for step in steps])
    return result


def read_loads(path: Path) -> list[Load]:
    """The lines of ``load.jsonl``, but those that are cut off."""
    return list(_lines(path, _load))


def read_classes(path: Path) -> list[Classes]:
    """The lines of ``classes.jsonl``, but those that are cut off."""
    return list(_lines(path, _classes))


def _series(points: Iterable[tuple[int, float]]) -> Series:
    kept = list(_latest(points, lambda point: point[0]))
    return Series([step for step, _ in kept], [value for _, value in kept])


_Item = TypeVar("_Item")


def _latest(items: Iterable[_Item], step_of: Callable[[_Item], int]) -> list[_Item]:
    """Leaves out what a resumed run went back behind: all earlier items from its step on."""
    kept: list[_Item] = []
    for item in items:
        while kept and step_of(kept[-1]) >= step_of(item):
            kept.pop()
        kept.append(item)
    return kept


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _settled_text(path: Path) -> str:
    """A file's text. CSVLogger writes the whole file anew for a new column: waits for that, but not for long."""
    for _ in range(5):
        before = path.stat()
        text = path.read_text(encoding="utf-8", errors="replace")
        after = path.stat()
        if text and (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
            break
        time.sleep(0.05)
    return text


def _lines(path: Path, parse: Callable[[Any], _Line]) -> Iterator[_Line]:
    parsed = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            parsed.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, IndexError, OverflowError):
            continue
    yield from _latest(parsed, lambda entry: entry.step)


def _load(entry: Any) -> Load:
    layers = [str(name) for name in entry["layers"]]
    counts = [[int(tokens) for tokens in of_layer] for of_layer in entry["tokens_per_expert"]]
    if not layers or len(layers) != len(counts) or not all(counts):
        raise ValueError("not one list of experts for each layer")
    first = entry.get("first_step")
    return Load(int(entry["step"]), layers, counts, None if first is None else int(first))


def _classes(entry: Any) -> Classes:
    layers, classes = ([str(name) for name in entry[key]] for key in ("layers", "classes"))
    counts = [[[int(n) for n in of_class] for of_class in of_layer] for of_layer in entry["assignments"]]
    if not layers or not classes or len(layers) != len(counts):
        raise ValueError("not one table for each layer")
    for of_layer in counts:
        if len(of_layer) != len(classes) or len({len(of_class) for of_class in of_layer}) != 1 or not of_layer[0]:
            raise ValueError("not one list of experts for each class")
    return Classes(int(entry["step"]), layers, classes, counts)

"""Which files under a folder are of one run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_moe.commands.report.data import (
    CLASSES_FILE,
    EVENTS_FILE,
    LOAD_FILE,
    METRICS_FILE,
    Classes,
    Load,
    Scalars,
    Series,
    event_files,
    has_tensorboard,
    is_of_test,
    is_of_validation,
    last_written,
    newest_of_experts,
    read_classes,
    read_loads,
    read_scalars,
    united,
)

_TOGETHER = 600.0  # seconds: what the loggers of one run wrote last may be as far apart
_VERSION = re.compile(r"version_\d+")  # how Lightning's loggers name the folders of runs
_TOLERANCE = 1e-4  # event files have 32 bits of a number


class ReportError(Exception):
    """There is nothing that a report could be made of, or it cannot be made."""


@dataclass
class Run:
    """All that is known of a run.

    Attributes:
        given: Folder that was asked for.
        folders: What the run was read from, the newest first.
        others: Folders of other runs under the one that was asked for, the newest first.
        scalars: Every metric.
        loads: The experts' load over the steps.
        classes: Token classes over the steps.
        config: Text of the config, and the path that it comes from.
        written: When the run last wrote something, in seconds since the epoch.
        notes: What a reader should know about where all this comes from.
    """

    given: Path
    folders: list[Path]
    others: list[Path]
    scalars: Scalars
    written: float
    loads: list[Load] = field(default_factory=list)
    classes: list[Classes] = field(default_factory=list)
    config: tuple[Path, str] | None = None
    notes: list[str] = field(default_factory=list)


def read_run(given: Path) -> Run:
    """Reads the newest run under a folder, of those that trained if any did, or the run that the folder itself is.

    A run is a folder with ``metrics.csv`` or event files. Those that several loggers made for it have one name, such
    as ``csv/version_1`` and ``tensorboard/version_1``, or were written at about the same time, and are read together
    where both have the same values.

    Raises:
        ReportError: there is no such folder, no run, or nothing in it yet.
    """
    if not given.is_dir():
        what = "is a file" if given.exists() else "there is no such folder"
        raise ReportError(f"{given}: {what}. Give the folder of a run, such as the logger's save_dir.")
    folders = sorted(_run_folders(given), key=_age, reverse=True)
    if not folders:
        raise ReportError(
            f"{given}: no metrics found, that is no {METRICS_FILE} and no {EVENTS_FILE}.* in it or below. Add "
            "lightning.pytorch.loggers.CSVLogger or TensorBoardLogger to trainer.logger, beside the logger in use, "
            "and run again."
        )
    readable = [folder for folder in folders if (folder / METRICS_FILE).is_file() or has_tensorboard()]
    if not readable:
        raise ReportError(
            f"{folders[0]}: it has TensorBoard's event files only, and tensorboard, which reads them, is not "
            'installed. Run: pip install "lightning_moe[logging]"'
        )
    newest, scalars = _newest_that_trained([given] if given in readable else readable)
    run = Run(given, [newest], [], scalars, last_written(newest))
    newer = readable[: readable.index(newest)] if newest != given else []
    if empty := [folder for folder in newer if folder.name != newest.name and not read_scalars(folder)]:
        run.notes.append(f"Newer, but without any value yet: {', '.join(map(str, empty))}.")
    if readable != folders:
        run.notes.append(
            "TensorBoard's event files were left out, because tensorboard is not installed. To read them, run: "
            'pip install "lightning_moe[logging]"'
        )
    _join_same_run(run, [folder for folder in (*folders, *_namesakes(given)) if folder != newest])
    if not run.scalars:
        raise ReportError(
            f"{newest}: no values yet. Wait for the first ones: CSVLogger writes every flush_logs_every_n_steps "
            "steps, and TensorBoardLogger every two minutes, or set theirs lower."
        )
    _add_what_lies_around(run)
    if run.others and run.folders[0] != given:
        run.notes.append(
            f"There are several runs, and shown is the newest that trained: {', '.join(map(str, run.folders))}. For "
            f"another, give its folder, such as: lightning-moe report {run.others[0]}"
        )
    return run


def _newest_that_trained(newest_first: Sequence[Path]) -> tuple[Path, Scalars]:
    """The first folder that has more than what evaluation logs, and its metrics; else one that has anything."""
    others: list[tuple[Path, Scalars]] = []
    for folder in newest_first:
        scalars = read_scalars(folder)
        if not all(is_of_validation(name) or is_of_test(name) for name in scalars):
            return folder, scalars
        others.append((folder, scalars))
    return next((other for other in others if other[1]), others[0])


def _run_folders(root: Path) -> Iterator[Path]:
    """Folders with metrics. Others in them are their own, but for versions."""
    for folder, below, files in os.walk(root):
        here = Path(folder)
        below[:] = sorted(name for name in below if not (name.startswith(".") or name.endswith(".ckpt")))
        if any(name == METRICS_FILE or name.startswith(EVENTS_FILE) for name in files):
            yield here
            if here != root:
                below[:] = [name for name in below if _VERSION.fullmatch(name)]


def _age(folder: Path) -> tuple[float, list[int], str]:
    return last_written(folder), [int(number) for number in re.findall(r"\d+", folder.name)], str(folder)


def _namesakes(given: Path) -> list[Path]:
    """Of ``.../csv/version_1``, ``.../tensorboard/version_1``, and other versions of about the same time."""
    here = given.resolve()
    if not _VERSION.fullmatch(here.name) or not _has_metrics(here):
        return []
    beside = [
        path
        for path in sorted(here.parent.parent.glob("*/version_*"), key=_age, reverse=True)
        if path.parent != here.parent
        and _has_metrics(path)
        and (path.name == here.name or abs(last_written(path) - last_written(here)) < _TOGETHER)
    ]
    return [Path(os.path.relpath(path)) if not given.is_absolute() else path for path in beside]


def _has_metrics(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or bool(event_files(folder))


def _join_same_run(run: Run, candidates: Sequence[Path]) -> None:
    newest = run.folders[0]
    chosen = newest == run.given  # by the user
    for folder in candidates:
        same_name = folder.name == newest.name
        if same_name or chosen or _may_be_of(run, folder):
            scalars = read_scalars(folder)
            agrees = _agree(run.scalars, scalars)
            if agrees or (same_name and not scalars):
                # What is newer wins; of the same values, those that are not rounded.
                exact_first = (folder / METRICS_FILE).is_file() and not (newest / METRICS_FILE).is_file()
                pair = (run.scalars, scalars) if exact_first else (scalars, run.scalars)
                run.scalars = united(*pair)
                run.folders.append(folder)
                run.written = max(run.written, last_written(folder))
                continue
        if run.given in (folder, *folder.parents):
            run.others.append(folder)


def _may_be_of(run: Run, folder: Path) -> bool:
    """By another logger, whose versions are counted by themselves, and which wrote at about the same time."""
    is_near = abs(last_written(folder) - last_written(run.folders[0])) < _TOGETHER
    return is_near and folder.parent not in {other.parent for other in run.folders}


def _agree(scalars: Scalars, others: Scalars) -> bool | None:
    """Whether metrics are of one run; ``None`` where no step of a metric is in both."""
    shared = False
    for name in set(scalars) & set(others):
        same, different = _compare(scalars[name], others[name])
        if different > same:
            return False
        shared = shared or same > 0
    return shared or None


def _compare(one: Series, other: Series) -> tuple[int, int]:
    """Number of steps at which both have the same value, and at which they have not."""
    values = dict(zip(other.steps, other.values, strict=True))
    same = different = 0
    for step, value in zip(one.steps, one.values, strict=True):
        if step in values:
            near = abs(value - values[step]) <= _TOLERANCE * max(abs(value), 1e-9) or value == values[step]
            both_nan = value != value and values[step] != values[step]
            same, different = (same + 1, different) if near or both_nan else (same, different + 1)
    return same, different


def _add_what_lies_around(run: Run) -> None:
    """What callbacks wrote: into a folder of the run, or above, where the first logger has no folder of its own."""
    places = list(dict.fromkeys(place for folder in run.folders for place in _upwards(folder, run.given)))
    loads = next((path for place in places if (path := newest_of_experts(place, LOAD_FILE))), None)
    classes = next((path for place in places if (path := newest_of_experts(place, CLASSES_FILE))), None)
    run.loads = read_loads(loads) if loads else []
    run.classes = read_classes(classes) if classes else []
    run.written = max(run.written, *(last_written(path.parent.parent) for path in (loads, classes) if path), 0.0)
    for name in ("config.yaml", "hparams.yaml"):
        for place in places:
            if run.config is None and (place / name).is_file():
                text = (place / name).read_text(encoding="utf-8", errors="replace")
                if text.strip() not in ("", "{}"):
                    run.config = (place / name, text)


def _upwards(folder: Path, given: Path) -> Iterator[Path]:
    yield folder
    if given in folder.parents:
        for parent in folder.parents:
            yield parent
            if parent == given:
                return

"""Runs on disk as loggers and callbacks write them, and what ``lightning-moe report`` makes of them."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_moe.commands.report.command import main

Points = Mapping[str, Mapping[int, float]]
LOSS: Points = {"train_loss": {9: 4.0, 19: 3.0, 29: 2.5}}


def write_csv(folder: Path, metrics: Points = LOSS) -> Path:
    """A file as CSVLogger writes it, with a row for each step."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = sorted({step for points in metrics.values() for step in points})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", *sorted(metrics), "step"])
        writer.writeheader()
        for step in steps:
            row = {name: points[step] for name, points in metrics.items() if step in points}
            writer.writerow({"epoch": 0, "step": step, **row})
    return folder


def write_events(folder: Path, metrics: Points = LOSS) -> Path:
    """One more event file, as TensorBoardLogger writes it."""
    number = len(list(folder.glob("events*")))
    writer = SummaryWriter(str(folder))
    for name, points in metrics.items():
        for step, value in points.items():
            writer.add_scalar(name, value, step)
    writer.close()
    (path,) = folder.glob("events.out.tfevents.*.*.*")
    path.rename(folder / f"events.out.tfevents.{1_700_000_000 + number}.here")  # as if one had started after the other
    return folder


def write_loads(
    folder: Path,
    loads: Mapping[int, Sequence[Sequence[int]]],
    layer: str = "blocks.{}.moe",
    of: str = "experts",
    last_step: int = 0,
) -> Path:
    """``load.jsonl`` as ExpertHeatmap writes it, from the step after the last one on."""
    lines = []
    for step, counts in loads.items():
        layers = [layer.format(i) for i in range(len(counts))]
        line = {"first_step": last_step + 1, "step": step, "layers": layers, "tokens_per_expert": counts}
        lines.append(json.dumps(line))
        last_step = step
    (folder / of).mkdir(parents=True, exist_ok=True)
    (folder / of / "load.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_classes(folder: Path, step: int, classes: Sequence[str], assignments: Any) -> None:
    layers = [f"blocks.{i}.moe" for i in range(len(assignments))]
    line = json.dumps({"step": step, "layers": layers, "classes": list(classes), "assignments": assignments})
    (folder / "experts").mkdir(parents=True, exist_ok=True)
    (folder / "experts" / "classes.jsonl").write_text(line + "\n")


def written_at(folder: Path, moment: float) -> Path:
    """Sets when everything in a folder was written."""
    for path in folder.rglob("*"):
        os.utime(path, (moment, moment))
    return folder


def report(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[str, str]:
    """The page and stderr of a command that succeeds."""
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert code == 0, err
    found = re.fullmatch(r"report: (.+) \([\d.]+ \w?B\)\n", out)
    assert found, out
    return Path(found[1]).read_text(encoding="utf-8"), err


def failure(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """The one message of a command that fails."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def words(page: str) -> str:
    """The text of a page, without its markup, styles and figures."""
    bare = re.sub(r"<(style|script|svg).*?</\1>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", bare)))


def rows(page: str) -> dict[str, list[str]]:
    """Of all tables: metric -> first, last, lowest, highest."""
    found = re.findall(r'<tr><th scope="row"><code>(.*?)</code>.*?</th>(.*?)</tr>', page)
    cells = {unescape(name): re.findall(r"<td>(.*?)</td>", rest) for name, rest in found}
    return {name: [re.sub(r"<[^>]+>", "", cell) for cell in of_name] for name, of_name in cells.items()}


def tiles(page: str) -> dict[str, tuple[str, str]]:
    """Label -> value and state."""
    pattern = r'<div class="tile (\w*)"><span>(.*?)</span><b>(.*?)</b>'
    return {label: (value, state) for state, label, value in re.findall(pattern, page)}

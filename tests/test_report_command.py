"""The command ``lightning-moe report``: what its page says, and its errors."""

from __future__ import annotations

import csv
import re
import shutil
import sys
from html import unescape
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_moe import AuxLossCallback, ExpertLoadMonitor
from lightning_moe.commands.report.command import main
from lightning_moe.commands.report.figures import heatmap_png
from lightning_moe.commands.report.find import read_run
from lightning_moe.metrics.figures import load_figure
from tests.reported import (
    failure,
    report,
    rows,
    tiles,
    words,
    write_classes,
    write_csv,
    write_events,
    write_loads,
    written_at,
)
from tests.toy import Toy, ToyData, loader


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a Trainer with both loggers, with a hand-written load.jsonl."""
    root = tmp_path_factory.mktemp("real")
    logger = [CSVLogger(str(root), "csv"), TensorBoardLogger(str(root), "tensorboard")]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=12,
        log_every_n_steps=2,
        logger=logger,
        callbacks=[AuxLossCallback(load_balancing=0.01, router_z=0.001), ExpertLoadMonitor(prog_bar=False)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Toy(), loader(ToyData(16)), loader(ToyData(8, seed=2)))
    (root / "csv" / "version_0" / "config.yaml").write_text("trainer:\n  max_steps: 12\n")
    write_loads(root / "csv" / "version_0", {2: [[5, 3, 0, 4], [3, 3, 3, 3]], 4: [[1, 1, 1, 9], [0, 6, 3, 3]]})
    return root


def test_a_real_run_is_on_the_page_as_it_was_logged(real_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, err = report(capsys, real_run)
    assert err == ""
    with (real_run / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        logged = list(csv.DictReader(file))
    names = set(logged[0]) - {"step", "epoch"}
    assert {"train_loss", "val_loss", "moe/load_imbalance", "moe/load_balancing_loss", "moe/router_z_loss"} <= names
    shown = rows(page)
    for name in names:
        points = [(int(row["step"]), float(row[name])) for row in logged if row[name]]
        ends = [points[0], points[-1]]
        extremes = [min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])]
        for cell, (step, value) in zip(shown[name], [*ends, *extremes], strict=True):
            number, at = cell.rsplit(" at ", 1)
            assert int(at.replace(",", "")) == step
            assert _number(number) == pytest.approx(value, rel=5e-3, abs=1e-9), name
    assert (
        f"{float(next(r['train_loss'] for r in reversed(logged) if r['train_loss'])):.4g}" in tiles(page)["train_loss"]
    )
    assert "11, counted from 0; max_steps is 12" in words(page)
    assert "All steps are done." in words(page)
    for section in ("Loss", "Balance", "Drops", "Experts", "Communication", "Config"):
        assert f"<h2>{section}</h2>" in page


def _number(text: str) -> float:
    """Of what the page writes."""
    number, _, unit = text.replace(",", "").partition(" ")
    return float(number) * {"": 1, "%": 1e-2, "ms": 1e-3, "s": 1, "B": 1, "kB": 1e3, "MB": 1e6}[unit]


def test_both_sources_give_the_same(real_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = read_run(real_run).scalars
    tables = []
    for source in ("csv", "tensorboard"):
        shutil.copytree(real_run / source / "version_0", tmp_path / source)
        scalars = read_run(tmp_path / source).scalars
        assert set(scalars) == set(both)
        for name, series in scalars.items():
            assert series.steps == both[name].steps
            assert series.values == pytest.approx(both[name].values, rel=1e-6)
        shown = rows(report(capsys, tmp_path / source)[0])
        # Of almost equal values, the lowest may be another by rounding: without the steps of the extremes.
        tables.append({name: [*cells[:2], *(c.split(" at ")[0] for c in cells[2:])] for name, cells in shown.items()})
    assert tables[0] == tables[1]


def test_the_heatmaps_are_those_of_the_loads(real_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, _ = report(capsys, real_run)
    layers = ["blocks.0.moe", "blocks.1.moe"]
    for step, span, counts, hidden in (
        (2, "steps 1 to 2", [[5, 3, 0, 4], [3, 3, 3, 3]], " hidden"),
        (4, "steps 3 to 4", [[1, 1, 1, 9], [0, 6, 3, 3]], ""),
    ):
        figure = load_figure(
            [torch.tensor(of, dtype=torch.float64) for of in counts], layers, f"Load of the experts, {span}"
        )
        label = f"Load of every expert of 2 layers, {span}"
        assert heatmap_png(figure, label, f' data-step="{step}"{hidden}') in page
    text = words(page)
    assert (
        "In steps 3 to 4 the busiest is expert 3 of layer_00, with 3.00 times the mean. 1 expert got no token: " in text
    )
    assert "layer_01 (blocks.1.moe): 0" in text
    assert tiles(page)["Dead experts"] == ("1 of 8", "bad")


def test_the_curve_goes_through_the_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {step: float(5 * (step % 7) - step) for step in range(5, 100, 5)}
    page, _ = report(capsys, write_csv(tmp_path / "run", {"train_loss": values}))
    paths = re.findall(r'<path d="([^"]*)"', page)
    drawn = [[tuple(map(float, p)) for p in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]
    (curve,) = [points for points in drawn if len(points) == len(values)]
    (x0, y0), (x1, y1) = curve[0], curve[4]
    (s0, v0), (s1, v1), *_ = list(values.items())[::4]
    assert y1 > y0 and v1 < v0  # SVG counts downward  # noqa: PT018
    for (x, y), (step, value) in zip(curve, values.items(), strict=True):
        assert x == pytest.approx(x0 + (step - s0) / (s1 - s0) * (x1 - x0), abs=0.1)
        assert y == pytest.approx(y0 + (value - v0) / (v1 - v0) * (y1 - y0), abs=0.4)


def test_everything_from_files_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">\'&amp;$x^'
    name = 'a<b onclick="x">&c'
    folder = write_csv(tmp_path / name, {f"train/loss{evil}": {1: 1.0}, f"{evil}/loss": {1: 2.0}, "_x$y$": {1: 1.0}})
    write_loads(folder, {1: [[1, 2], [3, 0]]}, layer=f"{evil}.{{}}")
    write_classes(folder, 1, [evil, "b"], [[[1, 2], [3, 4]]])
    (folder / "config.yaml").write_text(f"a: {evil}\n</pre><script>alert(3)</script>")
    page, _ = report(capsys, folder)
    body = page[page.index("<body>") :]
    assert body.count("<script") == 1
    assert "<img src=x" not in body
    assert "<b onclick" not in body
    assert f"a: {evil}" in unescape(page)
    assert all(src.startswith("data:image/png;base64,") for src in re.findall(r'<img[^>]* src="([^"]*)"', page))


def test_what_was_not_logged_says_how_to_log_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, _ = report(capsys, write_csv(tmp_path / "run"))
    text = words(page)
    for said in (
        "No validation loss: where the run validates, log one in validation_step",
        "No balance: add lightning_moe.ExpertLoadMonitor to trainer.callbacks",
        "No drops: add lightning_moe.ExpertLoadMonitor",
        "No communication: add lightning_moe.ExpertLoadMonitor",
        "No heatmaps: add lightning_moe.ExpertHeatmap to trainer.callbacks.",
        "No token classes: set token_classes of ExpertHeatmap, to bytes for example.",
        "No config: the command writes config.yaml",
    ):
        assert said in text
    page, _ = report(capsys, write_csv(tmp_path / "run", {"moe/load_imbalance": {1: 1.5}}))
    assert "No training loss: log one in training_step" in words(page)
    assert "Not logged: moe/router_entropy, moe/dead_experts, moe/load_balancing_loss" in words(page)
    assert "No communication: nothing travels where each rank has all experts" in words(page)


@pytest.mark.parametrize(
    ("metric", "label", "cases"),
    [
        ("load_imbalance", "Load imbalance", {1.5: ("1.5", "good"), 2.5: ("2.5", "watch"), 7.0: ("7", "bad")}),
        ("router_entropy", "Router entropy", {0.9: ("0.9", "good"), 0.1: ("0.1", "watch"), 0.01: ("0.01", "bad")}),
        ("dead_experts", "Dead experts a layer", {0.0: ("0", "good"), 0.5: ("0.5", "bad")}),
        ("dropped_fraction", "Dropped", {0.0: ("0 %", "good"), 0.05: ("5 %", "watch"), 0.2: ("20 %", "bad")}),
        ("dispatch_share", "Communication", {0.1: ("10 %", "good"), 0.3: ("30 %", "watch"), 0.6: ("60 %", "bad")}),
        ("load_imbalance", "Load imbalance", {float("nan"): ("nan", "bad")}),
    ],
)
def test_tiles_say_what_is_healthy(
    metric: str, label: str, cases: dict[float, tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value, expected in cases.items():
        folder = write_csv(tmp_path, {f"moe/{metric}": {2: value}})
        assert tiles(report(capsys, folder)[0])[label] == expected


def test_tiles_judge_several_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the median of the last nine, of which one that is far out makes no verdict; but the last must be a number."""
    shares = dict.fromkeys(range(10), 0.9) | dict(enumerate([0.9, 0.1, 0.1, 0.2, 0.1, 0.3, 0.1, 0.1, 0.1], 10))
    page, _ = report(capsys, write_csv(tmp_path, {"moe/dispatch_share": shares}))
    assert tiles(page)["Communication"] == ("10 %", "good")
    assert "median of steps 10 to 18" in words(page)
    page, _ = report(capsys, write_csv(tmp_path, {"moe/dispatch_share": {**shares, 18: float("nan")}}))
    assert tiles(page)["Communication"] == ("nan", "bad")


def test_tiles_judge_by_the_worst_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mean over layers hides one that has collapsed; validation's layers are not in it."""
    names = ["load_imbalance", "layer_00/load_imbalance", "layer_01/load_imbalance", "router_entropy"]
    names += ["layer_00/router_entropy", "layer_01/router_entropy"]
    values = [1.9, 1.1, 2.7, 0.45, 0.9, 0.001]
    metrics = {f"moe/{name}": {9: value} for name, value in zip(names, values, strict=True)}
    page, _ = report(capsys, write_csv(tmp_path, {**metrics, "val_moe/layer_00/load_imbalance": {9: 7.0}}))
    assert tiles(page)["Load imbalance"] == ("1.9", "watch")
    assert tiles(page)["Router entropy"] == ("0.45", "bad")
    assert "watch: uneven in layer_01, 2.7" in words(page)
    assert "bad: certain in layer_01, 0.001" in words(page)


def test_dead_experts_are_those_of_as_many_steps_as_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last figure of a run may be of one step."""
    loads = {100: [[9, 9, 9, 0]], 200: [[9, 9, 0, 0]], 201: [[1, 0, 1, 0]]}
    page, _ = report(capsys, write_loads(write_csv(tmp_path), loads))
    assert tiles(page)["Dead experts"] == ("1 of 4", "bad")
    assert "in steps 101 to 201" in words(page)
    assert "In steps 101 to 201 the busiest is expert 0" in words(page)
    assert "1 expert got no token: layer_00 (blocks.0.moe): 3" in words(page)
    gap = {100: [[9, 9, 9, 0]], 150: [[9, 9, 0, 9]]}
    folder = write_loads(tmp_path, gap)
    jsonl = folder / "experts" / "load.jsonl"
    jsonl.write_text(jsonl.read_text().replace('"first_step": 101', '"first_step": 141'))
    page, _ = report(capsys, folder)
    assert tiles(page)["Dead experts"] == ("1 of 4", "bad")
    assert "in steps 141 to 150" in words(page), "what is between is not known"
    page, _ = report(capsys, write_loads(write_csv(tmp_path), {**loads, 202: [[1, 1]]}))
    assert tiles(page)["Dead experts"] == ("0 of 2", "good"), "they are not those of before"
    page, _ = report(capsys, write_loads(write_csv(tmp_path), {1: [[0, 0]]}))
    assert "Dead experts" not in tiles(page)


def test_what_the_guard_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"moe/collapsed_layers": {9: 0.0, 19: 0.0}, "moe/load_balancing_weight": {9: 0.01, 19: 0.02}}
    page, _ = report(capsys, write_csv(tmp_path, metrics))
    assert tiles(page)["Collapsed layers"] == ("0", "good")
    assert rows(page)["moe/load_balancing_weight"][1] == "0.02 at 19"
    page, _ = report(capsys, write_csv(tmp_path, {"moe/collapsed_layers": {9: 0.0, 19: 3.0}}))
    assert tiles(page)["Collapsed layers"] == ("3", "bad")


def test_a_loss_that_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"train_loss": {1: 3.0, 2: float("nan"), 3: float("inf")}, "val_loss": {1: 2.0, 2: 3.0}}
    page, _ = report(capsys, write_csv(tmp_path, metrics))
    assert tiles(page)["train_loss"] == ("inf", "bad")
    assert tiles(page)["val_loss"] == ("3", "watch")
    assert "train_loss 2 values not finite" in words(page)
    assert rows(page)["train_loss"] == ["3 at 1", "inf at 3", "3 at 1", "3 at 1"]


def test_per_layer_metrics_have_charts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {f"moe/layer_{i:02d}/load_imbalance": {1: 1.0 + i, 2: 2.0} for i in range(12)}
    metrics |= {f"moe/layer_{i:02d}/dropped_fraction": {1: 0.1, 2: 0.2} for i in range(2)}
    metrics["moe/layer_00/something_new"] = {1: 5.0}
    page, _ = report(capsys, write_csv(tmp_path, metrics))
    assert "Load imbalance by layer, training" in words(page)
    assert "Dropped fraction by layer, training" in words(page)
    assert set(rows(page)) == {"moe/layer_00/something_new"}


def test_it_says_whether_the_run_may_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_csv(tmp_path / "run")
    assert "May still be running: run the command again" in words(report(capsys, folder)[0])
    write_csv(folder, {"train_loss": {29: 2.5}, "validate/time": {126: 1.0}})  # by its own batches
    (folder / "config.yaml").write_text("trainer:\n  max_steps: 100\n")
    assert "29, counted from 0; max_steps is 100" in words(report(capsys, folder)[0])
    assert "May still be running" in words(report(capsys, folder)[0])
    write_csv(folder)
    (folder / "config.yaml").write_text("trainer:\n  max_steps: 35\n")
    write_loads(folder, {33: [[1, 2]]})
    assert "May still be running" in words(report(capsys, folder)[0])
    write_loads(folder, {33: [[1, 2]], 35: [[1, 2]]})
    assert "All steps are done." in words(report(capsys, folder)[0])
    written_at(write_loads(folder, {33: [[1, 2]]}), 1_700_000_000)
    assert "It ended before its last step, or writes nothing." in words(report(capsys, folder)[0])


def test_losses_by_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("loss", "train/loss_step", "valid/loss", "val_loss_epoch", "test_loss", "glossy", "lr")
    page, _ = report(capsys, write_csv(tmp_path, {name: {1: 1.0, 2: 0.5} for name in names}))
    assert 'aria-label="All losses: loss, train/loss_step, val_loss_epoch, valid/loss, test_loss"' in page
    assert "No training loss" not in page
    assert "No validation loss" not in page
    assert 'aria-label="glossy: glossy"' in page


def test_at_most_twenty_heatmaps_spread_over_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_loads(write_csv(tmp_path), {step: [[step, 1]] for step in range(1, 101)})
    page, _ = report(capsys, folder)
    steps = [int(step) for step in re.findall(r'data-step="(\d+)"', page)]
    assert len(steps) == 20
    assert (steps[0], steps[-1]) == (1, 100)
    gaps = {after - before for before, after in zip(steps[:-1], steps[1:], strict=True)}  # noqa: RUF007
    assert gaps <= {5, 6}


def test_layers_that_change_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_loads(write_csv(tmp_path), {1: [[1, 2]], 2: [[1, 2, 3], [0, 0, 0]], 3: [[1, 2, 0], [0, 0, 0]]})
    page, _ = report(capsys, folder)
    assert "1 expert got no token: layer_00 (blocks.0.moe): 2" in words(page)


def test_it_is_whole_or_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_csv(tmp_path / "run")
    (folder / "report.html").write_text("old")
    with monkeypatch.context() as patch:

        def refuse(path: Path, content: bytes) -> None:
            path.touch()
            raise PermissionError(13, "Permission denied", str(path))

        patch.setattr(Path, "write_bytes", refuse)
        assert "report.html: cannot be written: Permission denied. Give another" in failure(capsys, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "report.html"]
    assert (folder / "report.html").read_text() == "old"
    with (folder / "report.html").open() as reader:
        assert "<h2>Loss</h2>" in report(capsys, folder)[0]
        assert reader.read() == "old"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "report.html"]


def test_errors_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such folder. Give the folder of a run" in failure(capsys, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    said = failure(capsys, tmp_path / "empty")
    assert "no metrics found" in said
    assert "Add lightning.pytorch.loggers.CSVLogger or TensorBoardLogger to trainer.logger, beside" in said
    folder = write_csv(tmp_path / "run")
    assert "is a file" in failure(capsys, folder / "metrics.csv")
    assert "is a folder. Give a file" in failure(capsys, folder, "--output", tmp_path / "empty")
    assert "there is no folder" in failure(capsys, folder, "--output", tmp_path / "no" / "page.html")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "one HTML page of a finished or running run" in " ".join(capsys.readouterr().out.split())


def test_missing_packages(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    events = write_events(tmp_path / "tensorboard" / "version_0", {"train_loss": {9: 1.0}})
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert 'pip install "lightning_moe[logging]"' in failure(capsys, events)
    write_csv(tmp_path / "csv" / "version_0")
    _, err = report(capsys, tmp_path)
    assert "TensorBoard's event files were left out, because tensorboard is not installed" in err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "lightning_moe[plots]"' in failure(capsys, tmp_path)

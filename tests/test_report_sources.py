"""What ``lightning-moe report`` reads: which run of several, and files that are cut off or being written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lightning_moe.commands.report.data import Series, read_csv, read_events, read_loads
from lightning_moe.commands.report.find import read_run
from tests.reported import LOSS, failure, report, rows, words, write_csv, write_events, write_loads, written_at


def test_of_several_runs_the_newest_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs"
    for source, write in (("csv", write_csv), ("tensorboard", write_events)):
        for version, (loss, moment) in enumerate([(9.0, 1000), (7.0, 3000), (8.0, 2000)]):
            folder = root / source / f"version_{version}"
            written_at(write(folder, {"train_loss": {9: loss}, "other": {9: 0.5}}), moment)
    written_at(write_loads(root / "tensorboard" / "version_1", {10: [[1, 2]]}), 3000)
    (root / "tensorboard" / "version_1" / "config.yaml").write_text("about: the first\n")
    page, err = report(capsys, root)
    assert rows(page)["train_loss"][0] == "7 at 9"
    assert "about: the first" in page
    assert "In steps 1 to 10 the busiest is expert 1" in words(page)
    taken = {str(root / source / "version_1") for source in ("csv", "tensorboard")}
    assert "There are several runs, and shown is the newest that trained" in err
    assert "For another, give its folder, such as: lightning-moe report " in err
    assert all(folder in err and folder in words(page) for folder in taken)
    assert str(root / "csv" / "version_2") in words(page)
    # Another by its folder: with what the other logger has of it.
    page, err = report(capsys, root / "csv" / "version_2", "--output", tmp_path / "page.html")
    assert err == ""
    assert rows(page)["train_loss"][0] == "8 at 9"
    assert str(root / "tensorboard" / "version_2") in words(page)


def test_validation_alone_is_no_newer_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder with nothing else it is shown all the same."""
    validated = {"val_loss": {600: 2.0}, "val_moe/load_imbalance": {600: 1.5}, "test/loss": {600: 2.5}}
    validated |= {f"{stage}/time": {700: 1.5} for stage in ("validate", "test", "predict", "sanity_check")}
    root = tmp_path / "runs" / "tensorboard"
    written_at(write_events(root / "version_0"), 1000)
    written_at(write_events(root / "version_1", {**validated, "train_loss": {9: 4.0}}), 2000)
    written_at(write_events(root / "version_2", validated), 3000)
    run = read_run(root)
    assert run.folders == [root / "version_1"]
    assert run.others == [root / "version_2", root / "version_0"]
    _, err = report(capsys, root)
    assert "shown is the newest that trained" in err
    assert read_run(root / "version_2").folders == [root / "version_2"]
    for version in ("version_0", "version_1"):
        shutil.rmtree(root / version)
    assert set(read_run(root).scalars) == set(validated)


def test_folders_without_values_are_no_newer_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As predict leaves them, and a run that failed at once."""
    root = tmp_path / "runs" / "tensorboard"
    written_at(write_events(root / "version_0"), 1000)
    written_at(write_events(root / "version_1", {"val_loss": {600: 2.0}}), 2000)
    written_at(write_events(root / "version_2", {}), 3000)
    written_at(write_events(root / "version_3", {}), 4000)
    page, err = report(capsys, root)
    assert rows(page)["train_loss"][0] == "4 at 9"
    assert f"Newer, but without any value yet: {root / 'version_3'}, {root / 'version_2'}." in err
    assert "version_2: no values yet" in failure(capsys, root / "version_2")
    shutil.rmtree(root / "version_0")
    assert read_run(root).folders == [root / "version_1"]
    shutil.rmtree(root / "version_1")
    assert "version_3: no values yet" in failure(capsys, root)


def test_loggers_that_count_their_versions_by_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second was added after the first run; the same values at about the same time are the same run."""
    root = tmp_path / "runs"
    first, second = {"train_loss": {9: 5.0, 19: 4.5}}, {"train_loss": {9: 4.0, 19: 3.5}}
    written_at(write_loads(write_events(root / "tb" / "version_0", first), {20: [[9, 9]]}), 1000)
    written_at(write_loads(write_events(root / "tb" / "version_1", second), {20: [[1, 2]]}), 9000)
    written_at(write_csv(root / "csv" / "version_0", second), 9100)
    for given in (root, root / "csv" / "version_0"):
        page, err = report(capsys, given, "--output", tmp_path / "page.html")
        assert "In steps 1 to 20 the busiest is expert 1" in words(page)
        assert "tb/version_1" not in err.partition("For another")[2]
    # A run that was repeated later, with the same values.
    written_at(write_events(root / "tb" / "version_2", second), 99_000)
    run = read_run(root)
    assert run.folders == [root / "tb" / "version_2"]
    assert len(run.others) == 3


def test_of_several_heatmaps_in_one_place_the_newest_are_taken(tmp_path: Path) -> None:
    written_at(write_loads(write_csv(tmp_path), {5: [[1, 2]]}), 1000)
    written_at(write_loads(tmp_path, {7: [[1, 2]]}, of="experts-v1").joinpath("experts-v1"), 3000)
    written_at(write_loads(tmp_path, {9: [[1, 2]]}, of="experts-v2").joinpath("experts-v2"), 2000)
    run = read_run(tmp_path)
    assert [load.step for load in run.loads] == [7]
    assert run.written == 3000


def test_folders_of_one_name_with_other_values_are_other_runs(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    written_at(write_csv(root / "a" / "version_0", {"train_loss": {1: 3.0, 2: 2.0}, "lr": {1: 0.1, 2: 0.1}}), 1000)
    written_at(write_csv(root / "b" / "version_0", {"train_loss": {1: 5.0, 2: 4.0}, "lr": {1: 0.1, 2: 0.1}}), 2000)
    run = read_run(root)
    assert run.scalars["train_loss"] == Series([1, 2], [5.0, 4.0])
    assert run.folders == [root / "b" / "version_0"]
    assert run.others == [root / "a" / "version_0"]
    beside = read_run(root / "a" / "version_0")
    assert beside.scalars["train_loss"] == Series([1, 2], [3.0, 2.0])
    assert beside.folders == [root / "a" / "version_0"]


def test_folders_of_one_name_are_one_run_where_they_share_values(tmp_path: Path) -> None:
    write_csv(tmp_path / "csv" / "version_3")
    write_events(tmp_path / "tensorboard" / "version_3", {**LOSS, "moe/load_imbalance": {10: 1.5}})
    assert set(read_run(tmp_path).scalars) == {"train_loss", "moe/load_imbalance"}


def test_folders_of_one_name_without_common_steps_are_other_runs(tmp_path: Path) -> None:
    """They contradict nowhere, since they logged at other steps, or other metrics."""
    written_at(write_csv(tmp_path / "a" / "version_0", {"train_loss": {3: 3.0, 7: 2.0}}), 1000)
    written_at(write_csv(tmp_path / "b" / "version_0", {"train_loss": {8: 9.0, 17: 99.0}}), 1010)
    written_at(write_csv(tmp_path / "validate" / "version_0", {"val_loss": {0: 2.5}}), 1020)
    written_at(write_csv(tmp_path / "empty" / "version_0", {}), 1030)
    run = read_run(tmp_path)
    assert run.scalars == {"train_loss": Series([8, 17], [9.0, 99.0])}
    assert run.others == [tmp_path / "validate" / "version_0", tmp_path / "a" / "version_0"]
    assert any(note.startswith("There are several runs") for note in run.notes)


def test_figures_and_config_above_the_loggers_folder_are_found(tmp_path: Path) -> None:
    write_loads(tmp_path, {5: [[1, 2]]})
    (tmp_path / "config.yaml").write_text("a: 1\n")
    write_csv(tmp_path / "logs" / "csv" / "version_0")
    run = read_run(tmp_path)
    assert [load.step for load in run.loads] == [5]
    assert run.config == (tmp_path / "config.yaml", "a: 1\n")


def test_a_resumed_run_goes_on_where_it_was_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_events(folder, {"loss": {10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0}})
    write_events(folder, {"loss": {20: 2.5, 30: 3.5}})
    assert len(list(folder.iterdir())) == 2
    assert read_events(folder)["loss"] == Series([10, 20, 30], [1.0, 2.5, 3.5])
    (folder / "metrics.csv").write_text("loss,step\n1,10\n2,20\n3,30\n2.25,20\n")
    assert read_csv(folder / "metrics.csv")["loss"] == Series([10, 20], [1.0, 2.25])
    loads = [{"step": s, "layers": ["a"], "tokens_per_expert": [[s, n]]} for s, n in ((1, 1), (2, 2), (3, 3), (2, 4))]
    (folder / "load.jsonl").write_text("".join(json.dumps(load) + "\n" for load in loads))
    assert [(load.step, load.tokens_per_expert) for load in read_loads(folder / "load.jsonl")] == [
        (1, [[1, 1]]),
        (2, [[2, 4]]),
    ]


def test_what_is_being_written_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_loads(write_csv(tmp_path / "run"), {10: [[1, 2]], 20: [[3, 1]]})
    whole = (folder / "metrics.csv").read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole)):
        (folder / "metrics.csv").write_bytes(whole[:size])
        number = sum(len(b"".join(lines[: i + 1]).rstrip(b"\n")) <= size for i in range(1, len(lines)))
        series = read_csv(folder / "metrics.csv").get("train_loss", Series([], []))
        assert series == Series(list(LOSS["train_loss"])[:number], list(LOSS["train_loss"].values())[:number])
        if size == 0:
            assert "no values yet" in failure(capsys, folder)
    (folder / "metrics.csv").write_bytes(whole)
    jsonl = folder / "experts" / "load.jsonl"
    text = jsonl.read_text()
    for size in range(len(text)):
        jsonl.write_text(text[:size])
        assert [load.step for load in read_loads(jsonl)] == [10, 20][: text[:size].count("]]}")]
    # A line after one that a kill has cut off, and lines of something else.
    jsonl.write_text(text[:60] + text + '[1]\n{"step": 3}\n{"step": 4, "layers": ["a"], "tokens_per_expert": [[]]}\n')
    assert [load.step for load in read_loads(jsonl)] == [20]
    report(capsys, folder)


def test_lines_that_are_damaged_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_loads(tmp_path, {10: [[1, 2]]})
    (folder / "metrics.csv").write_text(f"loss,step\n1,10\n2,nan\n3,inf\n{'9' * 200_000},15\n2.5,20\n")
    with (folder / "experts" / "load.jsonl").open("a") as file:
        file.write('{"step": Infinity, "layers": ["a"], "tokens_per_expert": [[1]]}\n')
        file.write('{"step": 20, "layers": ["a"], "tokens_per_expert": [[NaN]]}\n')
    assert read_csv(folder / "metrics.csv")["loss"] == Series([10, 20], [1.0, 2.5])
    assert [load.step for load in read_loads(folder / "experts" / "load.jsonl")] == [10]
    report(capsys, folder)


def test_event_files_that_are_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_events(tmp_path / "run", {"loss": {step: float(step) for step in range(1, 6)}})
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    found = set()
    for size in range(0, len(whole) + 1, 3):
        path.write_bytes(whole[:size])
        series = read_events(folder).get("loss", Series([], []))
        assert series.values == [1.0, 2.0, 3.0, 4.0, 5.0][: len(series.values)]
        found.add(len(series.values))
    assert {0, 1, 4} <= found
    assert capsys.readouterr().err == ""


def test_a_column_that_comes_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train_loss\r\n0,3.5\r\n1,3.25\r\n")
    assert set(read_csv(path)) == {"train_loss"}
    path.write_text("step,train_loss,val_loss\r\n0,3.5,\r\n1,3.25,\r\n1,,4.5\r\n")
    assert read_csv(path) == {"train_loss": Series([0, 1], [3.5, 3.25]), "val_loss": Series([1], [4.5])}

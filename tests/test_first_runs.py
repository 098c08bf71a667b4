"""The README's quickstart and the scripts in examples/, run as their users run them, by Lightning's own launcher."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Finished, run_command, script_of_environment, side_by_side, write_text

PATIENCE = 10.0  # seconds: the second rank takes two to end by itself, and more where the other command takes its core
CHANCE = math.log(8)  # of Classifier's eight classes, in nats
FirstRuns = dict[str, Callable[[], Finished]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("first_runs")


@pytest.fixture(scope="module")
def first_runs(project_root: Path, folder: Path) -> FirstRuns:
    text = write_text(folder / "text")
    quickstart = [
        script_of_environment("lightning-moe"),
        "fit",
        "--config",
        project_root / "configs" / "quickstart.yaml",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=2",
        f"--data.path={text}",
    ]
    plain_trainer = [sys.executable, project_root / "examples" / "plain_trainer.py"]
    return side_by_side(
        {
            "quickstart": lambda: run_command(quickstart, folder, timeout=100, patience=PATIENCE),
            "plain_trainer": lambda: run_command(plain_trainer, folder, timeout=100, patience=PATIENCE),
        }
    )


@pytest.mark.timeout(110)
def test_quickstart_command(first_runs: FirstRuns, folder: Path) -> None:
    ended = first_runs["quickstart"]()
    assert ended.code == 0, ended.output
    assert not ended.left
    assert "Traceback" not in ended.output
    assert "is deprecated" not in ended.output  # calls that others make: see lightning_moe.cli
    # Once, not once per rank.
    places = re.findall(r"^(logs \(\w+\)|config|checkpoint): (.+)$", ended.output, re.M)
    assert [name for name, _ in places] == ["logs (TensorBoardLogger)", "logs (CSVLogger)", "config", "checkpoint"]
    for name, place in places:
        assert (folder / place).exists(), f"{name}: {place}"
    assert ended.output.count("A sample, continuing 'def ':\ndef ") == 1
    # The progress bar shows the loss, and how evenly the experts are used.
    assert re.search(r"train_loss=\d", ended.output)


def test_plain_trainer_is_short(project_root: Path) -> None:
    lines = (project_root / "examples" / "plain_trainer.py").read_text().splitlines()
    assert len(lines) <= 60


@pytest.mark.timeout(110)
def test_plain_trainer_learns(first_runs: FirstRuns) -> None:
    ended = first_runs["plain_trainer"]()
    assert ended.code == 0, ended.output
    assert not ended.left
    assert "Traceback" not in ended.output
    losses = [float(loss) for loss in re.findall(r"loss after training: ([\d.]+)", ended.output)]
    assert losses, ended.output
    assert max(losses) < CHANCE / 2


def test_every_example_is_run(project_root: Path) -> None:
    examples = sorted(path.name for path in (project_root / "examples").iterdir() if path.suffix == ".py")
    assert examples == ["plain_trainer.py"], "Add a test that runs the new example."

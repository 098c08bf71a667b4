"""The scripts in examples/, run as their users run them."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest

from tests.commands import run_command

CHANCE = math.log(8)  # of Classifier's eight classes, in nats


def test_plain_trainer_is_short(project_root: Path) -> None:
    lines = (project_root / "examples" / "plain_trainer.py").read_text().splitlines()
    assert len(lines) <= 60


@pytest.mark.timeout(110)
def test_plain_trainer_learns(project_root: Path, tmp_path: Path) -> None:
    script = project_root / "examples" / "plain_trainer.py"
    ended = run_command([sys.executable, script], tmp_path, timeout=100)
    assert ended.code == 0, ended.output
    assert not ended.left
    assert "Traceback" not in ended.output
    losses = [float(loss) for loss in re.findall(r"loss after training: ([\d.]+)", ended.output)]
    assert losses, ended.output
    assert max(losses) < CHANCE / 2


def test_every_example_is_run(project_root: Path) -> None:
    examples = sorted(path.name for path in (project_root / "examples").iterdir() if path.suffix == ".py")
    assert examples == ["plain_trainer.py"], "Add a test that runs the new example."

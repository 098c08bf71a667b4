"""What reaches the loggers that people have, read back from what they wrote."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lightning_moe import AuxLossCallback, ExpertLoadMonitor
from tests.callbacks.logging_run import KINDS
from tests.callbacks.runs import Side, in_order, quiet, uneven
from tests.commands import run_command

ALWAYS = ("tensorboard", "csv")


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory, project_root: Path) -> Any:
    """What a run logged, and what each of its loggers wrote."""
    folder = tmp_path_factory.mktemp("loggers")
    for kind in (installed := [kind for kind in KINDS if kind in ALWAYS or find_spec(kind)]):
        (folder / kind).mkdir()
    command = [sys.executable, "-m", "tests.callbacks.logging_run", folder, *installed]
    finished = run_command(command, folder, 100, patience=10, environment={"PYTHONPATH": str(project_root)})
    assert finished.code == 0, finished.output
    return json.loads(next(line for line in finished.output.splitlines() if line.startswith('{"logged"')))


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_read_back(kind: str, answer: Any) -> None:
    if kind not in answer["found"]:
        pytest.skip(f"{kind} is not installed")
    logged, found = answer["logged"], answer["found"][kind]
    names = {name for values in logged.values() for name in values}
    assert {"moe/load_imbalance", "moe/aux_loss", "moe/layer_01/router_entropy", "val_moe/load_imbalance"} <= names
    assert found.keys() == logged.keys()
    for step, values in logged.items():
        read_back = {name: found[step][name] for name in values}
        assert read_back == pytest.approx(values, rel=1e-6)
        assert all(math.isfinite(value) for value in values.values())


def test_without_a_logger_all_is_in_the_progress_bar_and_the_callback_metrics(tmp_path: Path, recwarn: Any) -> None:
    trainer = quiet(
        callbacks=[AuxLossCallback(), ExpertLoadMonitor()], max_steps=2, log_every_n_steps=1, default_root_dir=tmp_path
    )
    trainer.fit(Side(), in_order(uneven(0, 2)))
    assert trainer.progress_bar_metrics.keys() >= {"moe/load_imbalance", "moe/dropped_fraction"}
    assert trainer.callback_metrics.keys() >= {"moe/load_imbalance", "moe/router_entropy", "moe/aux_loss"}
    assert not list(tmp_path.iterdir())
    assert not [warning for warning in recwarn if "moe" in str(warning.message).lower()]

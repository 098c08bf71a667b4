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
from tests.callbacks.runs import Side, in_order, quiet, uneven
from tests.commands import run_command


@pytest.mark.parametrize("kind", ["tensorboard", "csv", "wandb", "mlflow"])
def test_values_are_read_back(kind: str, tmp_path: Path, project_root: Path) -> None:
    if kind in ("wandb", "mlflow") and find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    command = [sys.executable, "-m", "tests.callbacks.logging_run", kind, tmp_path]
    finished = run_command(command, tmp_path, 100, patience=10, environment={"PYTHONPATH": str(project_root)})
    assert finished.code == 0, finished.output
    answer = json.loads(next(line for line in finished.output.splitlines() if line.startswith('{"logged"')))
    logged, found = answer["logged"], answer["found"]
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

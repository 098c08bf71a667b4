"""A short run that logs to several kinds of loggers, and what those wrote.

A process of its own, as W&B leaves one behind:

    python -m tests.callbacks.logging_run FOLDER KIND...

Prints what the callbacks logged, {"logged": {step: {name: value}}, and what is read back, "found": {kind: ...}}.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_moe import AuxLossCallback, ExpertLoadMonitor
from tests.callbacks.runs import Memory, Side, in_order, quiet, uneven
from tests.callbacks.wandb_file import history

Values = dict[int, dict[str, float]]
"""By step and name."""


class Steps(Memory):
    """Keeps everything by step."""

    def __init__(self) -> None:
        super().__init__()
        self.values: Values = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.values.setdefault(step, {}).update(metrics)


def tensorboard(folder: Path) -> tuple[Logger, Callable[[], Values]]:
    logger = TensorBoardLogger(folder)

    def read() -> Values:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events, found = EventAccumulator(logger.log_dir), {}
        events.Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                found.setdefault(event.step, {})[name] = event.value
        return found

    return logger, read


def comma_separated(folder: Path) -> tuple[Logger, Callable[[], Values]]:
    logger = CSVLogger(folder)

    def read() -> Values:
        found: Values = {}
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                values = {name: float(value) for name, value in row.items() if value and name != "step"}
                found.setdefault(int(row["step"]), {}).update(values)
        return found

    return logger, read


def wandb(folder: Path) -> tuple[Logger, Callable[[], Values]]:
    logger = WandbLogger(save_dir=folder, offline=True)

    def read() -> Values:
        from wandb import finish, teardown

        finish()
        teardown()  # until then the file may be without what was written last
        (path,) = folder.glob("wandb/offline-run-*/*.wandb")
        found: Values = {}
        for entry in history(path):
            if "trainer/global_step" in entry:
                values = {name: value for name, value in entry.items() if not name.startswith(("_", "trainer/"))}
                found.setdefault(entry["trainer/global_step"], {}).update(values)
        return found

    return logger, read


def mlflow(folder: Path) -> tuple[Logger, Callable[[], Values]]:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # newer releases want to be asked for one
    logger = MLFlowLogger(tracking_uri=f"file:{folder / 'mlruns'}")

    def read() -> Values:
        found: Values = {}
        (metrics,) = folder.glob(f"mlruns/*/{logger.run_id}/metrics")
        for path in metrics.rglob("*"):
            for line in path.read_text().splitlines() if path.is_file() else ():
                _, value, step = line.split()[:3]
                found.setdefault(int(step), {})[str(path.relative_to(metrics))] = float(value)
        return found

    return logger, read


KINDS: dict[str, Any] = {"tensorboard": tensorboard, "csv": comma_separated, "wandb": wandb, "mlflow": mlflow}


def main(folder: Path, kinds: list[str]) -> None:
    loggers, readers = zip(*(KINDS[kind](folder / kind) for kind in kinds), strict=True)
    steps = Steps()
    trainer = quiet(
        callbacks=[AuxLossCallback(0.01, 0.001), ExpertLoadMonitor(per_layer=True)],
        logger=[steps, *loggers],
        log_every_n_steps=2,
        max_steps=6,
        val_check_interval=3,
        default_root_dir=folder,
    )
    trainer.fit(Side(), in_order(uneven(0, 6)), in_order(uneven(1, 2)))
    found = {kind: read() for kind, read in zip(kinds, readers, strict=True)}
    print(json.dumps({"logged": steps.values, "found": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

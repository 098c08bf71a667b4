"""What watching the experts costs: the quickstart with callbacks against without, in pairs within one run.

One training of the quickstart's model on its data, 2 CPU ranks, with its loggers. In turn, for as many steps each, it
is watched by nobody, by `ExpertLoadMonitor` at its defaults, by one with `per_layer=True` and `ExpertHeatmap` every
50 steps, and by all callbacks that watch. A pair is a block and the unwatched one right before it. Some minutes:

    python benchmarks/monitoring.py
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from timing import header, progress, report, show, table

from lightning_moe import ExpertHeatmap, ExpertLoadMonitor, RouterCollapseGuard
from lightning_moe.cli import MoECLI
from lightning_moe.testing import RankPool

ROOT = Path(__file__).resolve().parent.parent
ALONE, DEFAULTS, LAYERS, ALL = "nobody", "ExpertLoadMonitor", "per layer, ExpertHeatmap every 50 steps", "all"
LIMITS = {DEFAULTS: 0.02, LAYERS: 0.05}


def watchers() -> dict[str, list[L.Callback]]:
    return {
        DEFAULTS: [ExpertLoadMonitor()],
        LAYERS: [ExpertLoadMonitor(per_layer=True), ExpertHeatmap(every_n_steps=50)],
        ALL: [
            ExpertLoadMonitor(per_layer=True),
            ExpertHeatmap(every_n_steps=50, token_classes="bytes"),
            RouterCollapseGuard(),
        ],
    }


class Blocks(L.Callback):
    """Lets the callbacks watch block by block, and takes the time of each.

    Attributes:
        seconds: Of every block of each set of callbacks.
        before: Of the unwatched block before it.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.sets = watchers()
        self.seconds: dict[str, list[float]] = {name: [] for name in self.sets}
        self.before: dict[str, list[float]] = {name: [] for name in self.sets}
        self._order = [block for name in self.sets for block in (ALONE, name)]
        self._alone = self._start = 0.0

    def _block(self, step: int) -> tuple[str, list[L.Callback]]:
        name = self._order[step // self.steps % len(self._order)]
        return name, self.sets.get(name, [])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for callbacks in self.sets.values():
            for callback in callbacks:
                callback.setup(trainer, pl_module, stage)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        _, callbacks = self._block(step)
        if step % self.steps == 0:
            self._start = time.perf_counter()
            for callback in callbacks:
                callback.on_fit_start(trainer, pl_module)
                callback.on_train_start(trainer, pl_module)
        for callback in callbacks:
            callback.on_train_batch_start(trainer, pl_module, *args)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        name, callbacks = self._block(step - 1)
        for callback in callbacks:
            callback.on_train_batch_end(trainer, pl_module, *args)
        if step % self.steps:
            return
        for callback in callbacks:
            callback.on_train_end(trainer, pl_module)
            callback.on_fit_end(trainer, pl_module)
        seconds = time.perf_counter() - self._start
        if name == ALONE:
            self._alone = seconds
        elif step > 2 * self.steps * len(self.sets):  # the first round warms up
            self.seconds[name].append(seconds)
            self.before[name].append(self._alone)


def train(steps: int, rounds: int, folder: str) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    blocks = Blocks(steps)
    cli = MoECLI(
        args=[
            f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
            "--trainer.callbacks=null",
            f"--trainer.max_steps={2 * len(blocks.sets) * steps * (rounds + 1)}",
            "--trainer.limit_val_batches=0",
            "--trainer.val_check_interval=null",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            f"--trainer.logger=[{','.join(_loggers(folder))}]",
            f"--trainer.default_root_dir={folder}",
        ],
        run=False,
        save_config_callback=None,
    )
    cli.trainer.callbacks.append(blocks)
    cli.trainer.fit(cli.model, cli.datamodule)
    return blocks.seconds, blocks.before


def _loggers(folder: str) -> list[str]:
    names = {"TensorBoardLogger": "tensorboard", "CSVLogger": "csv"}
    return [
        f"{{class_path: lightning.pytorch.loggers.{name}, init_args: {{save_dir: {folder}, name: {sub}}}}}"
        for name, sub in names.items()
    ]


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of a block (50)")
    parser.add_argument("--rounds", type=int, default=11, help="blocks of each, beside one to warm up (11)")
    options = parser.parse_args(args)
    if options.steps % 50:
        parser.error(f"--steps {options.steps}: must be a multiple of 50, for as many figures in every block. Use 50.")
    show(header(torch.device("cpu")))
    progress("training, some minutes")
    with tempfile.TemporaryDirectory() as folder, RankPool(2) as pool:
        watched, before = pool.run(train, options.steps, options.rounds, folder, timeout=3600)[0]
    rows, problems = [], []
    for name, seconds in watched.items():
        ratios = [mine / alone for mine, alone in zip(seconds, before[name], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        steps = statistics.median(before[name]), statistics.median(seconds)
        limit = LIMITS.get(name)
        rows.append(
            [
                name,
                *(f"{1e3 * block / options.steps:.2f}" for block in steps),
                f"{100 * (median - 1):+.1f} %",
                f"{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} %",
                "" if limit is None else f"{100 * limit:.0f} %",
            ]
        )
        if limit is not None and median - 1 > limit:
            problems.append(f"{name}: {100 * (median - 1):.1f} % of the step time, more than {100 * limit:.0f} %")
    show(table(["watched by", "ms a step alone", "watched", "overhead", "quartiles", "limit"], rows))
    show(f"Medians of {options.rounds} pairs of blocks of {options.steps} steps; 2 ranks, one thread each.")
    return report(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

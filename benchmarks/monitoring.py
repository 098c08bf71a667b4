"""What watching the experts costs: the quickstart with callbacks against without, in pairs within one run.

One training of the quickstart's model on its data, 2 CPU ranks, with its loggers. It is watched by `ExpertLoadMonitor`
at its defaults, by one with `per_layer=True` and `ExpertHeatmap` every 50 steps, by all callbacks that watch, and, to
see the noise, by nobody: block by block, in each of which watched and unwatched steps take turns. Twenty minutes:

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
NOBODY, DEFAULTS, LAYERS, ALL = "nobody", "ExpertLoadMonitor", "per layer, ExpertHeatmap every 50 steps", "all"
LIMITS = {DEFAULTS: 0.02, LAYERS: 0.05}
LOG_EVERY = 10
PATTERN = (0, 1, 1, 0, 0, 1, 1, 0, 0, 1)
"""Which slices of a block are watched, each from one logging step to the next. The last: a block has one figure."""


def watchers() -> dict[str, list[L.Callback]]:
    return {
        NOBODY: [],
        DEFAULTS: [ExpertLoadMonitor()],
        LAYERS: [ExpertLoadMonitor(per_layer=True), ExpertHeatmap(every_n_steps=50)],
        ALL: [
            ExpertLoadMonitor(per_layer=True),
            ExpertHeatmap(every_n_steps=50, token_classes="bytes"),
            RouterCollapseGuard(),
        ],
    }


class Blocks(L.Callback):
    """Lets the callbacks watch slice by slice, and takes the time of each slice, loggers included.

    A block is of one set of callbacks: slices without and with them in the order of `PATTERN`, so that neither a slow
    spell of the machine nor a drift falls on one side. In a block each has as many steps and as many logging steps.

    Attributes:
        pairs: Seconds of each block of each set, without and with its callbacks; those of the first round are left out.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.sets = watchers()
        self.pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in self.sets}
        self._watching: list[L.Callback] = []
        self._seconds = [0.0, 0.0]
        self._start = 0.0

    @property
    def steps_of_a_round(self) -> int:
        return len(self.sets) * len(PATTERN) * self.every_n_steps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for callbacks in self.sets.values():
            for callback in callbacks:
                callback.setup(trainer, pl_module, stage)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._next_slice(trainer, pl_module)
        for callback in self._watching:
            callback.on_train_batch_start(trainer, pl_module, *args)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        for callback in self._watching:
            callback.on_train_batch_end(trainer, pl_module, *args)

    def _next_slice(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()
        index = trainer.global_step // self.every_n_steps
        self._seconds[PATTERN[index % len(PATTERN) - 1]] += time.perf_counter() - self._start
        for callback in self._watching:
            callback.on_fit_end(trainer, pl_module)
        names = list(self.sets)
        number, place = divmod(index, len(PATTERN))
        if place == 0:
            if number > len(names):  # the first round warms up
                self.pairs[names[(number - 1) % len(names)]].append((self._seconds[0], self._seconds[1]))
            self._seconds = [0.0, 0.0]
        self._watching = self.sets[names[number % len(names)]] if PATTERN[place] else []
        for callback in self._watching:
            callback.on_fit_start(trainer, pl_module)
            callback.on_train_start(trainer, pl_module)
        trainer.strategy.barrier()
        self._start = time.perf_counter()


def train(rounds: int, folder: str) -> dict[str, list[tuple[float, float]]]:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    blocks = Blocks(LOG_EVERY)
    cli = MoECLI(
        args=[
            f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
            "--trainer.callbacks=null",
            f"--trainer.log_every_n_steps={LOG_EVERY}",
            f"--trainer.max_steps={blocks.steps_of_a_round * (rounds + 1) + 1}",  # the last begins a slice: it ends one
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
    return blocks.pairs


def _loggers(folder: str) -> list[str]:
    names = {"TensorBoardLogger": "tensorboard", "CSVLogger": "csv"}
    return [
        f"{{class_path: lightning.pytorch.loggers.{name}, init_args: {{save_dir: {folder}, name: {sub}}}}}"
        for name, sub in names.items()
    ]


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="blocks of each set, beside one to warm up (30)")
    options = parser.parse_args(args)
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: must be at least 2, for quartiles. Use 30.")
    show(header(torch.device("cpu")))
    progress(f"training, {(options.rounds + 1) * 0.65:.0f} minutes where a step takes 0.1 s")
    with tempfile.TemporaryDirectory() as folder, RankPool(2) as pool:
        pairs = pool.run(train, options.rounds, folder, timeout=600 * options.rounds)[0]
    rows, problems = [], []
    steps = sum(PATTERN) * LOG_EVERY
    for name, seconds in pairs.items():
        ratios = [watched / alone for alone, watched in seconds]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        limit = LIMITS.get(name)
        rows.append(
            [
                name,
                *(f"{1e3 * statistics.median(side) / steps:.2f}" for side in zip(*seconds, strict=True)),
                f"{100 * (median - 1):+.1f} %",
                f"{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} %",
                "" if limit is None else f"{100 * limit:.0f} %",
            ]
        )
        if limit is not None and median - 1 > limit:
            problems.append(f"{name}: {100 * (median - 1):.1f} % of the step time, more than {100 * limit:.0f} %")
    show(table(["watched by", "ms a step alone", "watched", "overhead", "quartiles", "limit"], rows))
    show(
        f"Medians of {options.rounds} blocks with {steps} steps of each kind, in turn by {LOG_EVERY}; 2 ranks, one "
        "thread each. What nobody seems to cost is the noise."
    )
    return report(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

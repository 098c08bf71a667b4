"""Names, CLI keys and metric names that users depend on: a change of them is a decision."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import lightning_moe
from lightning_moe import AuxLossCallback, ExpertLoadMonitor, ExpertParallelStrategy, RouterCollapseGuard
from tests.test_cli import flat, printed
from tests.toy import CONFIG, Toy, ToyData, loader

SNAPSHOT = Path(__file__).parent / "public_surface.txt"
KEYS = (
    "model.moe.",
    "model.experts_by_layer",
    "aux_loss.",
    "trainer.strategy.expert_parallel_size",
    "trainer.strategy.stage",
)


def public_names() -> list[str]:
    packages = [
        f"lightning_moe.{module.name}" for module in pkgutil.iter_modules(lightning_moe.__path__) if module.ispkg
    ]
    lines = []
    for name in ["lightning_moe", *sorted(packages)]:
        package = importlib.import_module(name)
        for public in sorted(getattr(package, "__all__", [])):
            assert hasattr(package, public), f"{name}.__all__ has {public!r}, which is not there."
            lines.append(f"name {name}.{public}")
    return lines


def cli_keys(capsys: pytest.CaptureFixture[str]) -> list[str]:
    config = {key.replace(".init_args.", "."): value for key, value in flat(printed(capsys)).items()}
    return [f"key --{key}={value}" for key, value in sorted(config.items()) if key.startswith(KEYS)]


def logged_names() -> list[str]:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ExpertParallelStrategy(2),
        callbacks=[
            AuxLossCallback(0.01, 0.001, importance=0.01, load=0.01),
            ExpertLoadMonitor(per_layer=True),
            RouterCollapseGuard(),
        ],
        max_steps=2,
        val_check_interval=2,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = loader(ToyData(32), 2, trainer.global_rank)
    trainer.fit(Toy(replace(CONFIG, router="noisy_topk")), data, data)
    return sorted(set(trainer.callback_metrics) - {"train_loss", "val_loss"})


def test_public_surface(get_pool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = [f"metric {name}" for name in get_pool(2).run(logged_names)[0]]
    now = "\n".join([*public_names(), *cli_keys(capsys), *metrics]) + "\n"
    if os.environ.get("UPDATE_SNAPSHOT") == "1":
        SNAPSHOT.write_text(now)
    stored = SNAPSHOT.read_text() if SNAPSHOT.exists() else ""
    diff = difflib.unified_diff(stored.splitlines(), now.splitlines(), "stored", "now", n=0, lineterm="")
    assert now == stored, (
        "What users depend on has changed:\n"
        + "\n".join(diff)
        + f"\nIf that is meant, say it in CHANGELOG.md and rewrite {SNAPSHOT.name}: "
        "UPDATE_SNAPSHOT=1 python -m pytest tests/test_public_surface.py"
    )

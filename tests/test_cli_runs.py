"""Real runs of the command lightning-moe, and of the quickstart with what follows it."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn

from lightning_moe import AuxLossCallback, ExpertParallelStrategy, MoE, MoEConfig
from lightning_moe.cli import MoECLI
from tests.commands import write_text
from tests.test_cli import ABOUT, CONFIGS, MOE, ON_CPU, QUICKSTART, STRATEGY, lookup, printed

# ------------------------------------------------------------------------------------ real runs


@dataclass
class Ran:
    """What a run of the command leaves in a rank."""

    steps: int
    metrics: dict[str, float]
    stage: int
    ep_size: int
    moe: dict[str, Any]
    dispatcher: str
    aux_loss: list[tuple[float, float]]
    predictions: list[Tensor]


def run_cli(folder: str, args: Sequence[str]) -> Ran:
    os.chdir(folder)
    cli = MoECLI(list(args))
    trainer, strategy = cli.trainer, cli.trainer.strategy
    assert isinstance(strategy, ExpertParallelStrategy)
    assert strategy.expert_groups is not None
    layer = next(module for module in cli.model.modules() if isinstance(module, MoE))
    aux = [callback for callback in trainer.callbacks if isinstance(callback, AuxLossCallback)]  # type: ignore[attr-defined]
    predicted = trainer.predict_loop.predictions if args[0] == "predict" else []
    return Ran(
        steps=trainer.global_step,
        metrics={name: float(value) for name, value in trainer.callback_metrics.items()},
        stage=strategy._stage,
        ep_size=strategy.expert_groups.ep_size,
        moe=asdict(layer.config),
        dispatcher=type(layer.dispatcher).__name__,
        aux_loss=[(callback.load_balancing, callback.router_z) for callback in aux],
        predictions=[row for row in predicted if isinstance(row, Tensor)],
    )


SHORT = ["--trainer.max_steps=2", "--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("data") / "text"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The quickstart without the sample that it writes at the end, which takes longer than two steps."""
    path = tmp_path_factory.mktemp("quick") / "quick.yaml"
    path.write_text("trainer: {callbacks: [{class_path: lightning_moe.ExpertLoadMonitor}]}\n")
    return ["--config", QUICKSTART, "--config", str(path)]


def starts_at_chance(ran: Ran) -> bool:
    return abs(ran.metrics["train_loss"] - math.log(256)) < 0.5


@pytest.mark.parametrize(
    ("name", "below"),
    [  # every second by default: those with a capacity together with the monitor that counts what is dropped
        pytest.param(name, below, marks=[pytest.mark.grid] * ((i + below) % 2 == 0), id=f"{name}-{where}")
        for i, name in enumerate(sorted(set(ON_CPU) - {"quickstart.yaml"}))
        for below, where in ((False, "alone"), (True, "quickstart"))
    ],
)
def test_config_trains(name: str, below: bool, text: str, quick: list[str], get_pool: Any, tmp_path: Path) -> None:
    args = ["fit", *(quick if below else []), "--config", str(CONFIGS / name), *SHORT, f"--data.path={text}"]
    for ran in get_pool(2).run(run_cli, str(tmp_path), args):
        assert ran.steps == 2
        assert ran.ep_size == 2
        assert ran.stage == ABOUT[name].get(STRATEGY + "stage", 1)
        about = {key.removeprefix(MOE): value for key, value in ABOUT[name].items() if key.startswith(MOE)}
        assert {key: ran.moe[key] for key in about} == about
        assert starts_at_chance(ran)
        # An untrained router is uneven by more than 1.25, and only the quickstart has the monitor that counts.
        has_capacity = ran.moe["capacity_factor"] is not None
        assert (ran.metrics.get("moe/dropped_fraction", 0.0) > 0) == (below and has_capacity)


def test_strategy_alone_on_the_command_line(text: str, get_pool: Any, tmp_path: Path) -> None:
    args = ["fit", "--trainer.strategy.expert_parallel_size", "2", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    for ran in get_pool(2).run(run_cli, str(tmp_path), [*args, *SHORT, f"--data.path={text}"]):
        assert (ran.steps, ran.ep_size, ran.stage) == (2, 2, 1)
        assert ran.moe == asdict(MoEConfig(num_experts=8).resolved())
        assert ran.aux_loss == [(0.01, 0.0)]


def test_keys_reach_the_run(text: str, quick: list[str], get_pool: Any, tmp_path: Path) -> None:
    keys = [
        "--trainer.strategy.expert_parallel_size=1",
        "--trainer.strategy.stage=2",
        "--model.moe.num_experts=4",
        "--model.moe.top_k=1",
        "--model.moe.capacity_factor=1.5",
        "--aux_loss.load_balancing=0.5",
        "--aux_loss.router_z=0.25",
    ]
    args = ["fit", *quick, *keys, *SHORT, f"--data.path={text}"]
    for ran in get_pool(2).run(run_cli, str(tmp_path), args):
        assert (ran.ep_size, ran.stage, ran.dispatcher) == (1, 2, "LocalDispatcher")
        assert (ran.moe["num_experts"], ran.moe["top_k"], ran.moe["capacity_factor"]) == (4, 1, 1.5)
        assert ran.aux_loss == [(0.5, 0.25)]
        assert ran.metrics["moe/aux_loss"] == pytest.approx(
            0.5 * ran.metrics["moe/load_balancing_loss"] + 0.25 * ran.metrics["moe/router_z_loss"], rel=1e-5
        )


def test_settings_of_layers_and_losses_reach_the_run(
    text: str, quick: list[str], get_pool: Any, tmp_path: Path
) -> None:
    keys = [
        "--model.experts_by_layer=[4,16]",
        "--model.moe.expert_bias=true",
        "--model.moe.score_function=sigmoid",
        "--model.moe.route_scale=2",
        "--model.moe.capacity_factor=1.25",
        "--model.moe.overflow=next_expert",
        "--aux_loss.load_balancing=0.01",
        "--aux_loss.scope=sequence",
        "--aux_loss.decay=cosine",
        "--trainer.callbacks+=lightning_moe.ExpertBiasUpdate",
        "--trainer.callbacks.rate=0.01",
        "--trainer.callbacks+=lightning_moe.TopKSchedule",
        "--trainer.callbacks.top_k={1: 3}",
    ]
    for ran in get_pool(2).run(run_cli, str(tmp_path), ["fit", *quick, *keys, *SHORT, f"--data.path={text}"]):
        assert (ran.steps, ran.moe["num_experts"], ran.moe["top_k"]) == (2, 4, 3)  # of the first layer
        assert (ran.moe["expert_bias"], ran.moe["score_function"], ran.moe["route_scale"]) == (True, "sigmoid", 2.0)
        assert starts_at_chance(ran)
        assert ran.metrics["moe/rerouted_fraction"] > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", "FusedDispatcher"), ("allgather", "AllGatherDispatcher"), ("alltoall", "AllToAllDispatcher")],
)
def test_dispatcher_key_chooses(
    name: str, expected: str, text: str, quick: list[str], get_pool: Any, tmp_path: Path
) -> None:
    args = ["fit", *quick, f"--model.moe.dispatcher={name}", *SHORT, f"--data.path={text}"]
    assert [ran.dispatcher for ran in get_pool(2).run(run_cli, str(tmp_path), args)] == [expected] * 2


class OwnModel(L.LightningModule):
    """A user's: bytes to bytes through one MoE layer, with no more than a Trainer needs."""

    def __init__(self, moe: MoEConfig, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.moe = MoE(width, moe)
        self.out = nn.Linear(width, 256)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.out(self.moe(self.embedding(batch[:, :-1])))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_own_model_in_place_of_the_default(text: str, get_pool: Any, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "trainer: {accelerator: cpu, devices: 2}\n"
        "model:\n  class_path: tests.test_cli_runs.OwnModel\n  init_args: {width: 16, moe: {num_experts: 6}}\n"
    )
    args = ["fit", "--config", "own.yaml", "--model.moe.top_k=3", *SHORT, f"--data.path={text}"]
    for ran in get_pool(2).run(run_cli, str(tmp_path), args):
        assert (ran.steps, ran.ep_size) == (2, 2)
        assert (ran.moe["num_experts"], ran.moe["top_k"]) == (6, 3)
        assert starts_at_chance(ran)
        assert math.isfinite(ran.metrics["moe/aux_loss"])


# ------------------------------------------------------------- the quickstart, and what follows it


@dataclass
class Quickstart:
    """The folder of a run of two steps, what it printed on each rank, and what it left in rank 0."""

    folder: Path
    output: str
    output_of_rank_1: str
    ran: Ran

    def place(self, name: str) -> Path:
        (place,) = re.findall(rf"^{re.escape(name)}: (.+)$", self.output, re.M)
        return self.folder / place


@pytest.fixture(scope="module")
def quickstart(get_pool: Any, text: str, tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    folder = tmp_path_factory.mktemp("quickstart")
    pool = get_pool(2)
    args = ["fit", "--config", QUICKSTART, *SHORT, "--trainer.val_check_interval=2", f"--data.path={text}"]
    ran, _ = pool.run(run_cli, str(folder), args)
    return Quickstart(folder, pool.output(0), pool.output(1), ran)


def test_quickstart_trains(quickstart: Quickstart) -> None:
    assert (quickstart.ran.steps, quickstart.ran.ep_size, quickstart.ran.stage) == (2, 2, 1)
    assert starts_at_chance(quickstart.ran)
    assert quickstart.ran.metrics["val_loss"] < math.log(256) + 0.5


def test_quickstart_writes_and_says_where(quickstart: Quickstart) -> None:
    tensorboard, in_csv = quickstart.place("logs (TensorBoardLogger)"), quickstart.place("logs (CSVLogger)")
    assert list(tensorboard.glob("events.out.tfevents.*"))
    with (in_csv / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = {"train_loss", "val_loss", "moe/load_balancing_loss", "moe/router_z_loss", "moe/aux_loss"}
    expected |= {"moe/load_imbalance", "moe/dropped_fraction", "moe/rerouted_fraction", "lr-AdamW/pg1", "step"}
    assert expected <= set(rows[0])
    for name in expected:
        assert any(math.isfinite(float(row[name] or "nan")) for row in rows), name
    assert (quickstart.place("checkpoint") / "checkpoint.json").is_file()
    assert "config: " not in quickstart.output_of_rank_1


def test_quickstart_saves_its_config(quickstart: Quickstart, capsys: pytest.CaptureFixture[str]) -> None:
    """The saved file has all that was asked for, and starts the same run again."""
    path = quickstart.place("config")
    saved = yaml.safe_load(path.read_text())
    expected = {**ABOUT["quickstart.yaml"], "trainer.max_steps": 2, "trainer.val_check_interval": 2}
    del expected["data.init_args.path"]
    assert {key: lookup(saved, key) for key in expected} == expected
    assert printed(capsys, "--config", str(path)) == saved


def test_quickstart_shows_a_sample_once(quickstart: Quickstart) -> None:
    assert quickstart.output.count("A sample, continuing 'def ':\ndef ") == 1
    assert "A sample" not in quickstart.output_of_rank_1
    assert len(quickstart.output.partition("A sample, continuing 'def ':\n")[2]) > 200


def test_quickstart_resumes(quickstart: Quickstart, text: str, quick: list[str], get_pool: Any, tmp_path: Path) -> None:
    args = ["fit", *quick, *SHORT, "--trainer.max_steps=4", f"--data.path={text}"]
    ran = get_pool(2).run(run_cli, str(tmp_path), [*args, f"--ckpt_path={quickstart.place('checkpoint')}"])[0]
    assert ran.steps == 4
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        trained = [row["step"] for row in csv.DictReader(file) if row["train_loss"]]
    assert len(trained) == 2, "not the two steps that were left"


def test_checkpoint_is_validated_tested_and_predicted(
    quickstart: Quickstart, text: str, get_pool: Any, tmp_path: Path
) -> None:
    """All of them on the same batches, so that the three losses are those that training saw at that checkpoint."""
    expected = quickstart.ran.metrics["val_loss"]
    common = ["--config", QUICKSTART, f"--data.path={text}", f"--ckpt_path={quickstart.place('checkpoint')}"]

    def run(command: str, limit: str) -> list[Ran]:
        return get_pool(2).run(run_cli, str(tmp_path), [command, *common, f"--trainer.limit_{limit}_batches=2"])

    for ran in run("validate", "val"):
        assert ran.metrics["val_loss"] == pytest.approx(expected, rel=1e-6)
    for ran in run("test", "test"):
        assert ran.metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
    predicted = [row for ran in run("predict", "predict") for row in ran.predictions]
    assert [len(row) for row in predicted] == [16] * 4
    assert float(torch.cat(predicted).mean()) == pytest.approx(expected, rel=1e-5)

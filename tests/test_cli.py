"""The command ``lightning-moe``: its configs, its keys, its messages, and what it writes."""

from __future__ import annotations

import csv
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn

from lightning_moe import AuxLossCallback, ExpertParallelStrategy, MoE, MoEConfig
from lightning_moe.cli import MoECLI
from tests.commands import write_text

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")

STRATEGY = "trainer.strategy.init_args."
MOE = "model.init_args.moe."
# What each file is about.
ABOUT: dict[str, dict[str, Any]] = {
    "quickstart.yaml": {
        "seed_everything": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.strategy.class_path": "lightning_moe.ExpertParallelStrategy",
        STRATEGY + "expert_parallel_size": 2,
        STRATEGY + "stage": 1,
        "model.class_path": "lightning_moe.models.MoELanguageModel",
        MOE + "num_experts": 8,
        MOE + "top_k": 2,
        MOE + "capacity_factor": None,
        MOE + "dispatcher": "auto",
        "data.init_args.path": "stdlib",
        "data.init_args.max_val_bytes": 131072,
        "aux_loss.load_balancing": 0.01,
        "aux_loss.router_z": 0.001,
    },
    "zero3.yaml": {
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        STRATEGY + "expert_parallel_size": 2,
        STRATEGY + "stage": 3,
    },
    "capacity.yaml": {
        "trainer.accelerator": "cpu",
        STRATEGY + "expert_parallel_size": 2,
        MOE + "capacity_factor": 1.25,
        MOE + "eval_capacity_factor": None,
        MOE + "overflow": "drop",
        MOE + "drop_priority": "score",
    },
    "switch.yaml": {
        "trainer.accelerator": "cpu",
        STRATEGY + "expert_parallel_size": 2,
        MOE + "top_k": 1,
        MOE + "normalize_topk": False,
        MOE + "capacity_factor": 1.25,
        MOE + "eval_capacity_factor": 2.0,
        "aux_loss.load_balancing": 0.01,
    },
    "gpu_8.yaml": {
        "trainer.accelerator": "gpu",
        "trainer.devices": 8,
        "trainer.precision": "bf16-mixed",
        STRATEGY + "expert_parallel_size": 8,
        STRATEGY + "stage": 1,
        MOE + "num_experts": 64,
        MOE + "top_k": 8,
        MOE + "dispatcher": "alltoall",
    },
}
ON_CPU = sorted(set(ABOUT) - {"gpu_8.yaml"})
# Of the quickstart, what no file on top of it changes, except the one for GPUs.
KEPT_BELOW = (
    "seed_everything",
    "trainer.val_check_interval",
    "model.init_args.hidden_size",
    MOE + "num_experts",
    MOE + "intermediate_size",
    "data.init_args.max_val_bytes",
    "aux_loss.router_z",
)


def lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


@contextmanager
def from_a_shell() -> Iterator[None]:
    """As if no command line but the one in the arguments was there; what the command sets is undone."""
    with mock.patch.object(sys, "argv", ["lightning-moe"]), mock.patch.dict(os.environ):
        yield


def printed(capsys: pytest.CaptureFixture[str], *args: str, command: str = "fit") -> dict[str, Any]:
    """What --print_config prints for these arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended, from_a_shell():
        MoECLI([command, *args, "--print_config"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    loaded = yaml.safe_load(out)
    assert isinstance(loaded, dict)
    return loaded


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What is printed to stderr about arguments with which the command does not start."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended, from_a_shell():
        MoECLI(["fit", *args])
    assert ended.value.code == 2
    return capsys.readouterr().err


# ------------------------------------------------------------------------------- configs that parse


def test_every_config_is_known() -> None:
    assert sorted(path.name for path in CONFIGS.iterdir()) == sorted(ABOUT), "Say in ABOUT what the new file is about."


@pytest.mark.parametrize("name", ABOUT)
def test_config_alone(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "--config", str(CONFIGS / name))
    assert {key: lookup(config, key) for key in ABOUT[name]} == ABOUT[name]


@pytest.mark.parametrize("name", sorted(set(ABOUT) - {"quickstart.yaml"}))
def test_config_on_top_of_the_quickstart(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "--config", QUICKSTART, "--config", str(CONFIGS / name))
    below = printed(capsys, "--config", QUICKSTART)
    kept = {} if name == "gpu_8.yaml" else {key: lookup(below, key) for key in KEPT_BELOW}
    expected = {**kept, **ABOUT[name]}
    assert {key: lookup(config, key) for key in expected} == expected
    loggers = [logger["class_path"].rpartition(".")[2] for logger in config["trainer"]["logger"]]
    assert loggers == ["TensorBoardLogger", "CSVLogger"]


@pytest.mark.parametrize("name", ABOUT)
def test_command_in_the_head_of_a_config(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    (command,) = re.findall(r"^#   (lightning-moe .+)$", (CONFIGS / name).read_text(), re.M)
    program, subcommand, *args = shlex.split(command)
    assert (program, subcommand) == ("lightning-moe", "fit")
    config = printed(capsys, *args)
    assert {key: lookup(config, key) for key in ABOUT[name] if key != "data.init_args.path"} == {
        key: value for key, value in ABOUT[name].items() if key != "data.init_args.path"
    }


# ---------------------------------------------------------------------------------------- keys

ON_THE_COMMAND_LINE: list[tuple[list[str], dict[str, Any]]] = [
    (
        ["--trainer.strategy.expert_parallel_size", "4"],
        {"trainer.strategy.class_path": "lightning_moe.ExpertParallelStrategy", STRATEGY + "expert_parallel_size": 4},
    ),
    (["--trainer.strategy.stage=3"], {STRATEGY + "stage": 3}),
    (["--model.moe.num_experts", "16"], {MOE + "num_experts": 16}),
    (["--model.moe.top_k=1"], {MOE + "top_k": 1}),
    (["--model.moe.capacity_factor=1.5"], {MOE + "capacity_factor": 1.5}),
    (["--model.moe.dispatcher=allgather"], {MOE + "dispatcher": "allgather"}),
    (["--aux_loss.load_balancing=0.5"], {"aux_loss.load_balancing": 0.5, "aux_loss.warmup_steps": 0}),
    (["--aux_loss.router_z=0.25"], {"aux_loss.router_z": 0.25}),
]


@pytest.mark.parametrize(("args", "expected"), ON_THE_COMMAND_LINE, ids=lambda x: x[0] if isinstance(x, list) else "")
@pytest.mark.parametrize("config", [[], ["--config", QUICKSTART]], ids=["alone", "quickstart"])
def test_key_on_the_command_line(
    args: list[str], expected: dict[str, Any], config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = printed(capsys, *config), printed(capsys, *config, *args)
    assert {key: lookup(after, key) for key in expected} == expected
    # And it changes nothing else.
    assert {key for key, value in flat(before).items() if flat(after)[key] != value} <= set(expected)
    assert flat(before).keys() == flat(after).keys()


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.mark.parametrize("null", [["--model.moe.capacity_factor=null"], ["--model.moe.capacity_factor", "null"]])
def test_null_on_the_command_line(null: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The remedy that the message about a wrong capacity_factor names."""
    files = ["--config", QUICKSTART, "--config", str(CONFIGS / "capacity.yaml")]
    before, after = printed(capsys, *files), printed(capsys, *files, *null, "--model.moe.top_k=1")
    assert lookup(before, MOE + "capacity_factor") == 1.25
    changed = {key: value for key, value in flat(after).items() if flat(before)[key] != value}
    assert changed == {MOE + "capacity_factor": None, MOE + "top_k": 1}
    # What comes later wins, as everywhere.
    assert lookup(printed(capsys, *files, *null, "--model.moe.capacity_factor=2"), MOE + "capacity_factor") == 2.0


def test_automatic_size_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert lookup(printed(capsys), STRATEGY + "expert_parallel_size") == "auto"


def test_several_configs_on_top_of_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last that says something wins, a short file is enough, and the command line is on top of all."""
    (tmp_path / "short.yaml").write_text("model: {moe: {top_k: 1}}\n")
    (tmp_path / "shorter.yaml").write_text("model: {moe: {capacity_factor: 2.0}}\naux_loss: {router_z: 0.5}\n")
    files = [QUICKSTART, str(CONFIGS / "zero3.yaml"), "short.yaml", "shorter.yaml"]
    args = [part for file in files for part in ("--config", file)]
    config = printed(capsys, *args, "--model.moe.dispatcher=alltoall", "--aux_loss.router_z=0.75")
    expected = {
        **ABOUT["quickstart.yaml"],
        STRATEGY + "stage": 3,
        MOE + "top_k": 1,
        MOE + "capacity_factor": 2.0,
        MOE + "dispatcher": "alltoall",
        "aux_loss.router_z": 0.75,
    }
    assert {key: lookup(config, key) for key in expected} == expected


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_subcommands_take_the_same_configs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "--config", QUICKSTART, "--model.moe.top_k=1", command=command)
    assert lookup(config, MOE + "top_k") == 1


# ------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.moe.top_k=9"], "top_k=9: must be from 1 to num_experts=8. Lower top_k or add experts."),
        (
            ["--trainer.strategy.expert_parallel_size=0"],
            (
                "expert_parallel_size=0: must be 'auto' or a whole number of at least 1. "
                "Use 1 to keep every expert on every rank."
            ),
        ),
        (
            ["--aux_loss.load_balancing=-1"],
            "load_balancing=-1.0: must be a finite number of at least 0. Use 0 to leave it out.",
        ),
        (
            ["--model.moe.capacity_factor=0"],
            "capacity_factor=0.0: must be a finite number above 0. Use 1.25, or null to drop nothing.",
        ),
        (["--data.batch_size=0"], "batch_size=0: must be at least 1. Use 16, for example."),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
@pytest.mark.parametrize("config", [[], ["--config", QUICKSTART]], ids=["alone", "quickstart"])
def test_wrong_value(args: list[str], message: str, config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *config, *args).endswith(f"\nerror: {message}\n")


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        (
            (
                "trainer: {strategy: {class_path: lightning_moe.ExpertParallelStrategy, "
                "init_args: {expert_parallel_sise: 2}}}"
            ),
            "trainer.strategy",
            "Option 'expert_parallel_sise' is not accepted",
        ),
        ("model: {init_args: {moe: {topk: 1}}}", "model", "Group 'moe' does not accept option 'topk'"),
        ("aux_loss: {load_balancin: 1}", None, "Subcommand 'fit' does not accept option 'aux_loss.load_balancin'"),
        ("trainer: {max_step: 1}", None, "Subcommand 'fit' does not accept option 'trainer.max_step'"),
    ],
    ids=["strategy", "moe", "aux_loss", "trainer"],
)
def test_misspelt_key(
    text: str, key: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "misspelt.yaml").write_text(text + "\n")
    _, _, said = refused(capsys, "--config", QUICKSTART, "--config", "misspelt.yaml").rpartition("\nerror: ")
    lines = [line.strip() for line in said.splitlines()]
    assert lines[0] == (message if key is None else f'Parser key "{key}":')
    assert message in lines


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


@pytest.mark.parametrize("below", [False, True], ids=["alone", "quickstart"])
@pytest.mark.parametrize("name", sorted(set(ON_CPU) - {"quickstart.yaml"}))
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
        assert (ran.metrics.get("moe/dropped_fraction", 0.0) > 0) == (below and name != "zero3.yaml")


def test_strategy_alone_on_the_command_line(text: str, get_pool: Any, tmp_path: Path) -> None:
    args = ["fit", "--trainer.strategy.expert_parallel_size", "2", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    for ran in get_pool(2).run(run_cli, str(tmp_path), [*args, *SHORT, f"--data.path={text}"]):
        assert (ran.steps, ran.ep_size, ran.stage) == (2, 2, 1)
        assert ran.moe == asdict(MoEConfig(num_experts=8))
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", "AllGatherDispatcher"), ("allgather", "AllGatherDispatcher"), ("alltoall", "AllToAllDispatcher")],
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
        "model:\n  class_path: tests.test_cli.OwnModel\n  init_args: {width: 16, moe: {num_experts: 6}}\n"
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
    expected |= {"moe/load_imbalance", "moe/dropped_fraction", "lr-AdamW/pg1", "step"}
    assert expected <= set(rows[0])
    for name in expected:
        assert any(math.isfinite(float(row[name] or "nan")) for row in rows), name
    assert (quickstart.place("checkpoint") / "checkpoint").is_dir()
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

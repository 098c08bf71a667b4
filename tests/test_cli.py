"""The command ``lightning-moe``: its configs, its keys, its messages, and what it writes."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml  # type: ignore[import-untyped]

from lightning_moe.cli import MoECLI

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
        MOE + "router": "switch",
        MOE + "top_k": 1,
        MOE + "capacity_factor": 1.25,
        MOE + "eval_capacity_factor": 2.0,
        "aux_loss.load_balancing": 0.01,
    },
    "deepseek.yaml": {
        "trainer.accelerator": "cpu",
        STRATEGY + "expert_parallel_size": 2,
        MOE + "router": "group_limited",
        MOE + "num_experts": 16,
        MOE + "top_k": 4,
        MOE + "intermediate_size": 32,
        MOE + "num_groups": 4,
        MOE + "topk_groups": 2,
        MOE + "num_shared_experts": 1,
        "aux_loss.load_balancing": 0.0001,
        "aux_loss.scope": "sequence",
    },
    "gpu_8.yaml": {
        "trainer.accelerator": "gpu",
        "trainer.devices": 8,
        "trainer.precision": "bf16-mixed",
        STRATEGY + "expert_parallel_size": 8,
        STRATEGY + "stage": 1,
        MOE + "num_experts": 64,
        MOE + "top_k": 8,
        MOE + "dispatcher": "fused",
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


_BEFORE: dict[tuple[str, ...], dict[str, Any]] = {}


def without(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """As `printed`, for the project's own configs that many tests start from: each is parsed once."""
    if args not in _BEFORE:
        _BEFORE[args] = printed(capsys, *args)
    return deepcopy(_BEFORE[args])


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
    config = without(capsys, "--config", str(CONFIGS / name))
    assert {key: lookup(config, key) for key in ABOUT[name]} == ABOUT[name]


@pytest.mark.parametrize("name", sorted(set(ABOUT) - {"quickstart.yaml"}))
def test_config_on_top_of_the_quickstart(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "--config", QUICKSTART, "--config", str(CONFIGS / name))
    below = without(capsys, "--config", QUICKSTART)
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
    (["--model.experts_by_layer=[4,8]"], {"model.init_args.experts_by_layer": [4, 8]}),
]


@pytest.mark.parametrize(("args", "expected"), ON_THE_COMMAND_LINE, ids=lambda x: x[0] if isinstance(x, list) else "")
@pytest.mark.parametrize("config", [[], ["--config", QUICKSTART]], ids=["alone", "quickstart"])
def test_key_on_the_command_line(
    args: list[str], expected: dict[str, Any], config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = without(capsys, *config), printed(capsys, *config, *args)
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
    before, after = without(capsys, *files), printed(capsys, *files, *null, "--model.moe.top_k=1")
    assert lookup(before, MOE + "capacity_factor") == 1.25
    changed = {key: value for key, value in flat(after).items() if flat(before)[key] != value}
    assert changed == {MOE + "capacity_factor": None, MOE + "top_k": 1}
    # What comes later wins, as everywhere.
    assert lookup(printed(capsys, *files, *null, "--model.moe.capacity_factor=2"), MOE + "capacity_factor") == 2.0


def test_automatic_size_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert lookup(without(capsys), STRATEGY + "expert_parallel_size") == "auto"


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

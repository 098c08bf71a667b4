"""What the pages under docs/ show: code runs, settings exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ThroughputMonitor

from lightning_moe import (
    CapacitySchedule,
    ExpertBiasUpdate,
    ExpertHeatmap,
    ExpertLoadMonitor,
    MoESummary,
    RouterCollapseGuard,
)
from lightning_moe.cli import MoECLI
from lightning_moe.config import BUILT_IN_ROUTERS
from lightning_moe.nn import ROUTERS
from tests.test_cli import from_a_shell

DOCS = Path(__file__).parent.parent / "docs"
ROUTING = (DOCS / "routing.md").read_text()
MONITORING = (DOCS / "monitoring.md").read_text()

WATCHING = {ExpertHeatmap, ExpertLoadMonitor, MoESummary, RouterCollapseGuard}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def block(text: str, language: str) -> str:
    (found,) = blocks(text, language)
    return str(found)


def test_routing_has_every_router() -> None:
    described = re.findall(r"^\| `(\w+)` \|", ROUTING, re.M)
    assert sorted(described) == sorted(BUILT_IN_ROUTERS)


@pytest.mark.filterwarnings("ignore:MoE layers are trained with no AuxLossCallback")
def test_routing_example_runs() -> None:
    names: dict[str, Any] = {"__name__": "routing"}
    exec(compile(block(ROUTING, "python"), "routing.md", "exec"), names)
    assert names["y"].shape == (4, 16, 64)
    assert ROUTERS.pop("argmax") is names["ArgmaxRouter"]


def test_routing_config_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "routing.yaml"
    path.write_text(block(ROUTING, "yaml"))
    with from_a_shell():
        cli = MoECLI(["--config", str(path), "--trainer.accelerator=cpu", "--trainer.logger=false"], run=False)
    kinds = {type(callback) for callback in cli.trainer.callbacks}
    assert {ExpertBiasUpdate, CapacitySchedule} <= kinds
    assert cli.model.experts_by_layer == [8, 16]


def test_monitoring_explains_every_metric() -> None:
    surface = (Path(__file__).parent / "public_surface.txt").read_text()
    logged = set(re.findall(r"^metric (moe/\w+)$", surface, re.M)) - {"moe/importance_loss", "moe/load_loss"}
    assert logged == set(re.findall(r"^\| `(moe/\w+)` \|", MONITORING, re.M))
    metrics = re.findall(r"^name lightning_moe\.metrics\.([A-Z]\w+)", surface, re.M)
    assert metrics
    assert all(f"`{name}`" in MONITORING for name in metrics)


def test_monitoring_examples_run() -> None:
    names: dict[str, Any] = {"__name__": "monitoring"}
    for example in blocks(MONITORING, "python"):
        exec(compile(example, "monitoring.md", "exec"), names)
    assert {type(callback) for callback in names["trainer"].callbacks} >= WATCHING
    assert 1 <= names["imbalance"] <= 4


def test_monitoring_config_is_taken(tmp_path: Path) -> None:
    """The second block, too, on top of the first."""
    args = ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    for number, text in enumerate(blocks(MONITORING, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        args += ["--config", str(path)]
    with from_a_shell():
        cli = MoECLI(args, run=False)
    assert {type(callback) for callback in cli.trainer.callbacks} >= {*WATCHING, ThroughputMonitor}


def test_files_exist(project_root: Path) -> None:
    for page in DOCS.glob("*.md"):
        named = set(re.findall(r"(?:configs|examples|benchmarks)/[\w.]+", page.read_text()))
        assert all((project_root / name).is_file() for name in named), (page.name, named)

"""What the README tells people to type."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from lightning_moe.cli import MoECLI
from lightning_moe.commands.checkpoint import checkpoint_parser

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = [line for line in README.splitlines() if line.startswith("lightning-moe ")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.split()[1] == "checkpoint"])
def test_commands_on_checkpoints_parse(command: str) -> None:
    assert checkpoint_parser().parse_args(shlex.split(command)[2:]).action in command


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.split()[1] != "checkpoint"])
def test_commands_parse(
    command: str, project_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project_root)
    with pytest.raises(SystemExit) as done:
        MoECLI([*shlex.split(command)[1:], "--print_config"])
    assert done.value.code == 0
    assert "expert_parallel_size" in capsys.readouterr().out


def test_make_targets_exist(project_root: Path) -> None:
    makefile = (project_root / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_python_compiles() -> None:
    assert len(blocks("python")) == 2
    for block in blocks("python"):
        ast.parse(block)


def test_files_exist(project_root: Path) -> None:
    named = set(re.findall(r"(?:configs|examples)/[\w.]+", README))
    assert named
    assert all((project_root / name).is_file() for name in named), named

"""The rules of the layout, read from the source of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lightning_moe"
FILES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
MAX_LINES = 400

# Imports point to a lower level only. `__init__.py`, the public names, is above all but the command.
LEVELS = [
    {"config"},
    {"parallel"},
    {"dispatch"},
    {"nn"},
    {"checkpoint", "engine", "metrics"},
    {"models", "data", "strategies", "callbacks", "interop"},
    {"__init__"},
    {"commands"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    at_import_time: bool
    only_for_types: bool


def imports(path: Path, source: str | None = None) -> list[Import]:
    """All imports of a file, also those in functions. ``from a import b`` is both ``a`` and ``a.b``."""
    tree = ast.parse((ROOT / path).read_text() if source is None else source)
    package = path.with_suffix("").parts[:-1]
    return list(_imports(tree, package, at_import_time=True, only_for_types=False))


def _imports(node: ast.AST, package: tuple[str, ...], at_import_time: bool, only_for_types: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, at_import_time, only_for_types)
    elif isinstance(node, ast.ImportFrom):
        parts = package[: len(package) - node.level + 1] if node.level else ()
        module = ".".join((*parts, *(node.module or "").split("."))).strip(".")
        for name in (module, *(f"{module}.{alias.name}" for alias in node.names)):
            yield Import(name, node.lineno, at_import_time, only_for_types)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
        names = [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        yield from (Import(name, node.lineno, at_import_time, only_for_types) for name in names)
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for statement in node.body:
            yield from _imports(statement, package, at_import_time, only_for_types=True)
        for statement in node.orelse:
            yield from _imports(statement, package, at_import_time, only_for_types)
        return
    in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, package, at_import_time and not in_function, only_for_types)


def part(module: str) -> str | None:
    """The part of the package that a module belongs to: ``lightning_moe.nn.layer`` -> ``nn``."""
    names = module.split(".")
    if names[0] != "lightning_moe":
        return None
    # `from lightning_moe import X` imports a public name unless X is a part.
    return names[1] if len(names) > 1 and (names[1] in LEVEL or names[1] == "testing") else "__init__"


def part_of_file(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


def wrong_direction(path: Path, found: list[Import]) -> list[str]:
    own = part_of_file(path)
    problems = []
    for item in found:
        other = part(item.module)
        if other is None or other == own:
            continue
        if other == "__init__" and any(
            part(i.module) != "__init__" for i in found if i.line == item.line and i.module.startswith(item.module)
        ):
            continue  # `from lightning_moe import nn` is an import of nn
        if own == "testing":
            allowed = True
        elif other == "testing":
            allowed = False
        else:
            allowed = LEVEL[other] < LEVEL[own]
        if not allowed:
            problems.append(f"{path}:{item.line}: {own} imports {other} ({item.module})")
    return problems


def test_there_are_files() -> None:
    assert Path("lightning_moe/config.py") in FILES


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downward(path: Path) -> None:
    own = part_of_file(path)
    assert own in LEVEL or own == "testing", f"{path}: {own} has no level in the layout; give it one in LEVELS."
    problems = wrong_direction(path, imports(path))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_only_one_file_touches_deepspeed_and_lazily(path: Path) -> None:
    found = [item for item in imports(path) if item.module.split(".")[0] == "deepspeed"]
    if path != Path("lightning_moe/engine/deepspeed.py"):
        assert not found, f"{path}:{found[0].line}: only engine/deepspeed.py may import DeepSpeed."
    early = [item for item in found if item.at_import_time and not item.only_for_types]
    assert not early, f"{path}:{early[0].line}: import DeepSpeed inside the function that needs it."


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short(path: Path) -> None:
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines: split it by concern."


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if ast.unparse(call.func) in ("print", "builtins.print")]
    assert not lines, f"{path}:{lines[0]}: log or write to a stream that the caller chose."


def test_importing_the_package_does_not_import_deepspeed() -> None:
    modules = "lightning_moe.testing, lightning_moe.cli, lightning_moe.commands.checkpoint"
    code = f"import sys, {modules}; print([m for m in sys.modules if m.split('.')[0] == 'deepspeed'])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("nn/layer.py", "from lightning_moe.strategies import X", "nn imports strategies"),
        ("nn/layer.py", "from lightning_moe import strategies", "nn imports strategies"),
        ("nn/layer.py", "from ..strategies.expert_parallel import X", "nn imports strategies"),
        ("nn/layer.py", "def f():\n    import lightning_moe.cli", "nn imports cli"),
        ("nn/layer.py", "import importlib\nimportlib.import_module('lightning_moe.cli')", "nn imports cli"),
        ("nn/layer.py", "from lightning_moe import MoE", "nn imports __init__"),
        ("callbacks/aux_loss.py", "import lightning_moe.strategies", "callbacks imports strategies"),
        ("cli.py", "from lightning_moe.testing import RankPool", "cli imports testing"),
        ("nn/layer.py", "from lightning_moe.dispatch import X", None),
        ("nn/layer.py", "from lightning_moe import config", None),
        ("nn/layer.py", "from .router import X", None),
        ("cli.py", "from lightning_moe import MoE", None),
    ],
)
def test_the_rules_find_a_wrong_import(file: str, source: str, problem: str | None) -> None:
    path = Path("lightning_moe", file)
    found = wrong_direction(path, imports(path, source))
    assert bool(found) == (problem is not None), found
    assert problem is None or any(problem in text for text in found)


def test_lazy_imports_are_told_apart() -> None:
    source = (
        "if TYPE_CHECKING:\n    import deepspeed.a\nelse:\n    import deepspeed.b\n"
        "def f():\n    import deepspeed.c\nclass A:\n    import deepspeed.d\n"
    )
    found = imports(Path("lightning_moe/engine/deepspeed.py"), source)
    early = [item.module for item in found if item.at_import_time and not item.only_for_types]
    assert early == ["deepspeed.b", "deepspeed.d"]

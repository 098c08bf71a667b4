"""What happens to a tile between its products, by torch and in C, against float64."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_moe.config import Activation
from lightning_moe.nn import tile_operations
from lightning_moe.nn.tile_operations import (
    CompiledOperations,
    TileOperations,
    compiled_library,
    load_library,
    operations_for,
)

EXTREMES = [-math.inf, -1e30, -200.0, -88.5, -87.0, -1e-30, -0.0, 0.0, 1e-30, 87.0, 88.5, 200.0, 1e30, math.inf]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PROJECT = Path(__file__).parents[2]
BESIDE = 64
COMPILED = {
    "C": None,  # as installed: for the newest instructions that this processor has
    "C, AVX2": 'strcmp(x, "avx2") == 0 || strcmp(x, "fma") == 0',
    "C, plain": "0",
}
"""Which instructions the library takes the processor to have."""

kinds = pytest.mark.parametrize("kind", ["torch", *COMPILED])
compiled = pytest.mark.parametrize("kind", COMPILED)


def operations(kind: str, dtype: torch.dtype) -> TileOperations:
    if kind == "torch":
        return TileOperations("swiglu")
    library = compiled_library()
    if library is None:
        pytest.skip("no compiler was found when the package was installed")
    if (has_instructions := COMPILED[kind]) is not None:
        if "avx2" in has_instructions and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            pytest.skip("this processor has no AVX2")
        library = compiled_for(has_instructions)
    return CompiledOperations(library, dtype)


@cache
def compiled_for(has_instructions: str) -> ctypes.CDLL:
    """The library for an older processor than this one."""
    if not can_compile():
        pytest.skip("no compiler here")
    flags = re.findall(r'"(-[^"]+)"', (PROJECT / "setup.py").read_text())
    assert "-O3" in flags
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tile_kernels.so")
        define = f"-D__builtin_cpu_supports(x)=({has_instructions})"
        source = PROJECT / "lightning_moe/nn/csrc/tile_kernels.c"
        subprocess.run([*compiler(), *flags, "-shared", "-fPIC", define, source, "-o", path], check=True)
        library = load_library(str(path))
    assert library is not None
    return library


def compiler() -> list[str]:
    """As setuptools chooses it."""
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")


@cache
def can_compile() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "any.c").write_text("#include <string.h>\n#include <stdint.h>\nint32_t any;\n")
        arguments = ["-shared", "-fPIC", "any.c", "-o", "any.so"]
        return (
            bool(shutil.which(compiler()[0]))
            and not subprocess.run([*compiler(), *arguments], cwd=folder, check=False).returncode
        )


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    """To be written; :func:`assert_nothing_beside` tells whether what lies beside it was."""
    size, beside = math.prod(shape), torch.full((BESIDE,), 7.0, dtype=dtype)
    return torch.cat([beside, torch.full((size,), math.nan, dtype=dtype), beside])[BESIDE:-BESIDE].view(shape)


def assert_nothing_beside(*written: Tensor) -> None:
    for tensor in written:
        whole = tensor.new_empty(0).set_(tensor.untyped_storage())
        assert bool((whole[:BESIDE] == 7).all())
        assert bool((whole[-BESIDE:] == 7).all())


def test_they_are_compiled_where_the_package_is_installed() -> None:
    if not can_compile():
        pytest.skip("no compiler here")
    assert compiled_library() is not None, "install the package again: pip install -e ."


@kinds
@dtypes
@pytest.mark.parametrize("width", [1, 3, 64, 130])
def test_gather(kind: str, dtype: torch.dtype, width: int) -> None:
    table, index = torch.randn(50, width).to(dtype), torch.randint(50, (21,))
    out = unwritten(24, width, dtype=dtype)
    operations(kind, dtype).gather(table, index, out_nD=out)
    assert torch.equal(out[:21], table[index])
    assert not out[21:].any()
    assert_nothing_beside(out)


@kinds
@dtypes
@pytest.mark.parametrize("width", [1, 7, 16, 33, 600])
def test_activate(kind: str, dtype: torch.dtype, width: int) -> None:
    h = torch.randn(2, 19, width).mul_(4).to(dtype)
    act = unwritten(19, width, dtype=dtype)
    operations(kind, dtype).activate(h, act_nF=act)
    gate, up = h.double()
    wanted = gate / (1 + (-gate).exp()) * up
    assert_nothing_beside(act)
    # In bf16 torch rounds twice, C once.
    assert relative(act, wanted) < (1e-7 if dtype == torch.float32 else 3e-3)


@compiled
@dtypes
def test_every_gate_in_c(kind: str, dtype: torch.dtype) -> None:
    """All of bf16 that is finite, as far as the result is no denormal number; in fp32 the same to 2^-22."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    gate = bits.view(torch.bfloat16)
    gate = gate[gate.isfinite() & (gate.abs() < 80)].to(dtype)
    act = unwritten(1, len(gate), dtype=dtype)
    operations(kind, dtype).activate(torch.stack([gate, torch.ones_like(gate)]).unsqueeze(1), act_nF=act)
    wanted = gate.double().sigmoid() * gate.double()
    off = (act[0].double() - wanted).abs()
    assert bool((off <= wanted.abs() * (2**-22 if dtype == torch.float32 else 2**-8) + 2e-38).all())


@kinds
@dtypes
def test_extreme_gates(kind: str, dtype: torch.dtype) -> None:
    gate = torch.tensor(EXTREMES).to(dtype)
    act = unwritten(1, len(gate), dtype=dtype)
    operations(kind, dtype).activate(torch.stack([gate, torch.ones_like(gate)]).unsqueeze(1), act_nF=act)
    assert not act[0, 1:].isnan().any()  # of minus infinity torch makes NaN
    wanted = torch.where(gate > 0, gate, 0.0)
    small = gate.abs() <= 88.5
    wanted = torch.where(small, gate.double() * gate.double().sigmoid(), wanted)
    off = (act[0].double() - wanted.double()).abs()[1:]
    # Far below 0 the result is 0, or lost in what the gate is multiplied by there: less than 1e-37 of it.
    assert bool((off <= (wanted.abs() * 2**-7 + gate.abs().double() * 1e-37)[1:])[wanted[1:].isfinite()].all())
    assert act[0, -1] == math.inf


@kinds
@dtypes
def test_nan_is_passed_on_and_stays_where_it_is(kind: str, dtype: torch.dtype) -> None:
    for part in range(2):
        h = torch.randn(2, 3, 40).to(dtype)
        h[part, 1, 17] = math.nan
        act = torch.zeros(3, 40, dtype=dtype)
        operations(kind, dtype).activate(h, act_nF=act)
        assert act.isnan().nonzero().tolist() == [[1, 17]]


@kinds
@dtypes
@pytest.mark.parametrize("size", [0, 1, 13, 16])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 600])
def test_activate_backward(kind: str, dtype: torch.dtype, size: int, width: int) -> None:
    h, grad = torch.randn(2, 16, width).mul_(3).to(dtype), torch.randn(16, width).to(dtype)
    h[:, size:], grad[size:] = math.nan, math.nan  # padding may hold anything
    weights = torch.rand(size)
    act, grad_h = unwritten(16, width, dtype=dtype), unwritten(16, 2 * width, dtype=dtype)
    grad_weights = unwritten(size, dtype=torch.float32)
    leaves = [h[:, :size].double().requires_grad_(), weights.double().requires_grad_()]
    gate, up = leaves[0]
    product = leaves[1].unsqueeze(1) * (gate * gate.sigmoid() * up)
    product.backward(grad[:size].double())
    terms = (gate * gate.sigmoid() * up * grad[:size]).detach()  # of the weights' gradients, which may cancel out
    operations(kind, dtype).activate_backward(
        h,
        grad,
        weights,
        act_nF=act,
        grad_h_nG=grad_h,
        grad_weights_m=grad_weights,
        memory_nF=unwritten(16, width, dtype=dtype),
    )
    assert_nothing_beside(act, grad_h, grad_weights)
    assert not act[size:].any()
    assert not grad_h[size:].any()
    if size:
        assert leaves[0].grad is not None
        tolerance = 3e-7 if dtype == torch.float32 else 1.5e-2
        assert relative(act[:size], product.detach()) < tolerance
        assert relative(grad_h[:size], torch.cat([*leaves[0].grad], 1)) < tolerance
        assert leaves[1].grad is not None
        off = (grad_weights.double() - leaves[1].grad).abs()
        assert bool((off <= tolerance * terms.abs().sum(1)).all())


@kinds
@dtypes
@pytest.mark.parametrize(
    ("where", "act", "grad_gate", "grad_up"),
    [("gate", True, True, True), ("up", True, True, False), ("grad", False, True, True), ("weights", True, True, True)],
)
def test_nan_in_backward(kind: str, dtype: torch.dtype, where: str, act: bool, grad_gate: bool, grad_up: bool) -> None:
    F, values = 40, {"gate": (4, 40), "up": (4, 40), "grad": (4, 40), "weights": (3,)}
    drawn = {
        name: torch.randn(shape).to(torch.float32 if name == "weights" else dtype) for name, shape in values.items()
    }
    at = (1,) if where == "weights" else (1, 17)
    drawn[where][at] = math.nan
    got = {name: unwritten(4, width, dtype=dtype) for name, width in (("act", F), ("grad_h", 2 * F))}
    grad_weights = unwritten(3, dtype=torch.float32)
    operations(kind, dtype).activate_backward(
        torch.stack([drawn["gate"], drawn["up"]]),
        drawn["grad"],
        drawn["weights"],
        act_nF=got["act"],
        grad_h_nG=got["grad_h"],
        grad_weights_m=grad_weights,
        memory_nF=torch.empty(4, F, dtype=dtype),
    )
    columns = range(F) if where == "weights" else [17]
    for tensor, expected in zip([got["act"], *got["grad_h"].chunk(2, 1)], [act, grad_gate, grad_up], strict=True):
        assert tensor.isnan().nonzero().tolist() == ([[1, column] for column in columns] if expected else [])
    assert grad_weights.isnan().tolist() == [False, where != "weights", False]


@compiled
def test_c_rounds_bf16_once(kind: str) -> None:
    """Every result is the nearest to that of float64, or its neighbour where two are about as near."""
    h, grad, weights = torch.randn(2, 64, 512).bfloat16(), torch.randn(64, 512).bfloat16(), torch.rand(64)
    act, grad_h, grad_weights = unwritten(64, 512, dtype=h.dtype), unwritten(64, 1024, dtype=h.dtype), torch.empty(64)
    do = operations(kind, torch.bfloat16)
    do.activate_backward(
        h, grad, weights, act_nF=act, grad_h_nG=grad_h, grad_weights_m=grad_weights, memory_nF=torch.empty(0)
    )
    gate, up = h.double()
    silu, w, g = gate * gate.sigmoid(), weights.double().unsqueeze(1), grad.double()
    slope = gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))
    for got, wanted in ((act, w * silu * up), (grad_h, torch.cat([w * g * up * slope, w * g * silu], 1))):
        nearest = wanted.bfloat16()
        assert float((got != nearest).double().mean()) < 1e-3
        assert relative(got, wanted) < 1.001 * relative(nearest, wanted)


@pytest.mark.parametrize(
    ("dtype", "weights_dtype", "activation", "num_threads", "expected"),
    [
        (torch.float32, torch.float32, "swiglu", 1, CompiledOperations),
        (torch.bfloat16, torch.float32, "swiglu", 2, CompiledOperations),
        (torch.bfloat16, torch.float32, "swiglu", 3, TileOperations),
        (torch.bfloat16, torch.float32, "gelu", 1, TileOperations),
        (torch.float64, torch.float64, "swiglu", 1, TileOperations),
        (torch.float16, torch.float32, "swiglu", 1, TileOperations),
        (torch.float32, torch.float64, "swiglu", 1, TileOperations),
    ],
)
def test_which(
    dtype: torch.dtype, weights_dtype: torch.dtype, activation: Activation, num_threads: int, expected: type
) -> None:
    operations("C", torch.float32)  # skips where there is none
    x, weights = torch.empty(1, dtype=dtype), torch.empty(1, dtype=weights_dtype)
    assert type(operations_for(x, weights, activation, num_threads)) is expected
    with FlopCounterMode(display=False):  # would not see what C does
        assert type(operations_for(x, weights, activation, num_threads)) is TileOperations
    wrapped = TwoTensor(x, x)
    assert type(operations_for(wrapped, weights, activation, num_threads)) is TileOperations


@pytest.fixture
def looked_up_anew() -> Iterator[None]:
    compiled_library.cache_clear()
    yield
    compiled_library.cache_clear()


@pytest.fixture
def library_folder(looked_up_anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's folder for the library, empty."""
    monkeypatch.setattr(tile_operations, "__file__", str(tmp_path / "tile_operations.py"))
    (tmp_path / "csrc").mkdir()
    return tmp_path / "csrc"


def test_a_library_is_optional(library_folder: Path) -> None:
    assert compiled_library() is None
    assert type(operations_for(torch.empty(1), torch.empty(1), "swiglu", 1)) is TileOperations
    library_folder.rmdir()
    compiled_library.cache_clear()
    assert compiled_library() is None


def test_a_library_for_another_system_is_none(library_folder: Path) -> None:
    (library_folder / "tile_kernels.so").write_text("foreign")
    assert compiled_library() is None


def test_a_library_for_other_code_is_none(looked_up_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    operations("C", torch.float32)  # skips where there is none
    monkeypatch.setattr(tile_operations, "_VERSION", 0)
    compiled_library.cache_clear()
    assert compiled_library() is None


@pytest.mark.parametrize("library", ["_ctypes", "math"])
def test_a_library_without_the_functions_is_none(library: str, library_folder: Path) -> None:
    found = importlib.util.find_spec(library)
    if found is None or found.origin is None or not Path(found.origin).exists():
        pytest.skip(f"{library} is no file here")
    shutil.copy(found.origin, library_folder / "tile_kernels.so")
    assert compiled_library() is None

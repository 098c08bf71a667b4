"""What happens to a tile between its products, by torch and in C, against float64."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
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
COMPILED = {
    "C": None,  # as installed: for the newest instructions that this processor has
    "C, AVX-512 without bf16": ("AVX512", 'strcmp(x, "avx512bf16") != 0'),
    "C, AVX2": ("AVX2", 'strcmp(x, "avx2") == 0 || strcmp(x, "fma") == 0'),
    "C, plain": ("DEFAULT", "0"),
}
"""What torch calls the processor that is needed at least, and which instructions the library takes it to have."""

kinds = pytest.mark.parametrize("kind", ["torch", *COMPILED])
compiled = pytest.mark.parametrize("kind", COMPILED)


def operations(kind: str, dtype: torch.dtype) -> TileOperations:
    if kind == "torch":
        return TileOperations("swiglu")
    library = compiled_library()
    if library is None:
        pytest.skip("no compiler was found when the package was installed")
    if (instructions := COMPILED[kind]) is not None:
        library = compiled_for(*instructions)
    return CompiledOperations(library, dtype)


@cache
def compiled_for(processor: str, has_instructions: str) -> ctypes.CDLL:
    """The library for an older processor than this one."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    if torch.backends.cpu.get_cpu_capability() not in order[order.index(processor) :]:
        pytest.skip(f"this processor has no {processor}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tile_kernels.so")
        define = f"-D__builtin_cpu_supports(x)=({has_instructions})"
        source = Path(tile_operations.__file__).with_name("csrc") / "tile_kernels.c"
        subprocess.run([compiler(), "-O3", "-fopenmp-simd", "-shared", "-fPIC", define, source, "-o", path], check=True)
        library = load_library(str(path))
    assert library is not None
    return library


def compiler() -> str:
    """As setuptools chooses it."""
    return str(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def test_they_are_compiled_where_the_package_is_installed(tmp_path: Path) -> None:
    (tmp_path / "any.c").write_text("#include <string.h>\n#include <stdint.h>\nint32_t any;\n")
    arguments = ["-shared", "-fPIC", "any.c", "-o", "any.so"]
    if (
        shutil.which(compiler()) is None
        or subprocess.run([compiler(), *arguments], cwd=tmp_path, check=False).returncode
    ):
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


@kinds
@dtypes
@pytest.mark.parametrize("width", [1, 7, 16, 33, 600])
def test_activate(kind: str, dtype: torch.dtype, width: int) -> None:
    h = torch.randn(2, 19, width).mul_(4).to(dtype)
    act = unwritten(19, width, dtype=dtype)
    operations(kind, dtype).activate(h, act_nF=act)
    gate, up = h.double()
    wanted = gate / (1 + (-gate).exp()) * up
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

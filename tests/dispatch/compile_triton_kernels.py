"""Compiles every Triton kernel for the GPU generation in argv; prints what became of them as JSON (Triton 3.9).

Ends with 77 where Triton knows no such GPU.

A process of its own, since ``test_triton_kernels.py`` turns Triton's interpreter on for good.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_moe.dispatch import triton_kernels

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass
class Compiled:
    """Takes a kernel's place: compiles it for the arguments with which it is launched, and launches nothing."""

    kernel: Any
    capability: int
    assembly: list[str] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | constants
        is_constant = {name: value is None or name in constants for name, value in values.items()}
        types = {
            name: "constexpr" if is_constant[name] else TYPES[value.dtype] if torch.is_tensor(value) else "i32"
            for name, value in values.items()
        }
        places = {name: (names.index(name),) for name in values}
        whole = {  # addresses and numbers that are multiples of 16, as the launcher finds out
            places[name]: [["tt.divisibility", 16]]
            for name, value in values.items()
            if not is_constant[name] and (torch.is_tensor(value) or value % 16 == 0)
        }
        source = ASTSource(self.kernel, types, {places[n]: values[n] for n in values if is_constant[n]}, whole)
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        made = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        assert made.asm["cubin"]
        self.assembly.append(made.asm["ptx"])


def stores(dtype: torch.dtype, width: int, capability: int) -> dict[str, list[list[str]]]:
    """The instructions by which each version of each kernel writes, for rows of this width."""
    kernels = {name: value for name, value in vars(triton_kernels).items() if name.endswith("_kernel")}
    compiled = {name: Compiled(kernel, capability) for name, kernel in kernels.items()}
    vars(triton_kernels).update(compiled)
    x, y, weights = torch.empty(64, width, dtype=dtype), torch.empty(512, width, dtype=dtype), torch.empty(64, 8)
    index, rows = torch.zeros(128, dtype=torch.int64), torch.zeros(64, 8, dtype=torch.int64)
    triton_kernels.gather_rows(x, index)
    triton_kernels.sum_rows(y, rows, weights)
    triton_kernels.sum_rows(y, rows)
    triton_kernels.unpermute_backward(x, y, weights, rows.flatten())
    triton_kernels.pack_rows(x, index, weights, rows, index, torch.bfloat16)
    triton_kernels.pack_rows(x, index, weights, None, index, dtype)
    vars(triton_kernels).update(kernels)
    return {
        name: [re.findall(r"st\.global[^\s;]*", text) for text in kernel.assembly] for name, kernel in compiled.items()
    }


if __name__ == "__main__":
    if "nvidia" not in backends:
        sys.exit(77)
    made = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for width in (7, 2048):
            made[f"{dtype} {width}"] = stores(dtype, width, capability=int(sys.argv[1]))
    json.dump(made, sys.stdout)

"""What happens to a tile between its products: by torch's operations, or in C where that was compiled at installation.

Torch goes through memory once for each of its operations, the C functions once for all of them; they use one thread.

Shapes: A tokens, D model width, n rows of a tile of which the first m are real and the others padding, F expert width,
P = 2 where the activation is gated and 1 where it is not, G = P*F.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from typing_extensions import override

from lightning_moe.config import Activation
from lightning_moe.nn.activation import activate_backward_into, activate_into


class TileOperations:
    """By torch's operations. All write to tensors that they are given.

    Args:
        activation: Which.
    """

    def __init__(self, activation: Activation) -> None:
        self._activation: Activation = activation

    def gather(self, table_AD: Tensor, index_m: Tensor, *, out_nD: Tensor) -> None:
        """Writes ``table[index]``, of a contiguous table; padding becomes 0."""
        size = len(index_m)
        torch.index_select(table_AD, 0, index_m, out=out_nD[:size])
        out_nD[size:].zero_()

    def activate(self, h_PnF: Tensor, *, act_nF: Tensor) -> None:
        """Writes the activation of ``h``."""
        activate_into(h_PnF, self._activation, act_nF=act_nF)

    def activate_backward(
        self,
        h_PnF: Tensor,
        grad_nF: Tensor,
        weights_m: Tensor,
        *,
        act_nF: Tensor,
        grad_h_nG: Tensor,
        grad_weights_m: Tensor,
        memory_nF: Tensor,
    ) -> None:
        """Of rows that are weighted after the second product; padding becomes 0 in all that is written.

        Args:
            h_PnF: What was activated.
            grad_nF: Gradient of the activation as if rows had no weight; undefined afterwards.
            weights_m: Weights of the real rows.
            act_nF: Takes the weighted activation.
            grad_h_nG: Takes the gradient of ``h``, the parts side by side.
            grad_weights_m: Takes the gradient of the weights: the scalar product of activation and ``grad``.
            memory_nF: Undefined afterwards.
        """
        size, F = len(weights_m), act_nF.shape[1]
        rows, padding = slice(size), slice(size, None)
        weights_m1 = weights_m.to(act_nF.dtype).unsqueeze(1)  # mixed products take three times as long
        activate_into(h_PnF, self._activation, act_nF=act_nF, silu_nF=memory_nF)
        products_mF = torch.mul(act_nF[rows], grad_nF[rows], out=grad_h_nG[rows, :F])
        torch.sum(products_mF, 1, dtype=grad_weights_m.dtype, out=grad_weights_m)
        act_nF[rows].mul_(weights_m1)
        grad_nF[rows].mul_(weights_m1)
        activate_backward_into(h_PnF, self._activation, grad_nF, memory_nF, grad_h_nG=grad_h_nG)
        act_nF[padding].zero_()
        grad_h_nG[padding].zero_()


class CompiledOperations(TileOperations):
    """SwiGLU in fp32 and bf16, in C. The tensors are contiguous.

    Args:
        library: Of :func:`compiled_library`.
        dtype: Of all tensors but weights and their gradient, which are in fp32.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        super().__init__("swiglu")
        self._gather_rows = library.gather_rows
        self._swiglu = getattr(library, f"swiglu_{_NAMES[dtype]}")
        self._swiglu_backward = getattr(library, f"swiglu_backward_{_NAMES[dtype]}")

    @override
    def gather(self, table_AD: Tensor, index_m: Tensor, *, out_nD: Tensor) -> None:
        row_bytes = out_nD.shape[1] * out_nD.element_size()
        addresses = table_AD.data_ptr(), index_m.data_ptr(), out_nD.data_ptr()
        self._gather_rows(*addresses, len(out_nD), len(index_m), row_bytes)

    @override
    def activate(self, h_PnF: Tensor, *, act_nF: Tensor) -> None:
        self._swiglu(*_addresses_of_halves(h_PnF), act_nF.data_ptr(), act_nF.numel())

    @override
    def activate_backward(
        self,
        h_PnF: Tensor,
        grad_nF: Tensor,
        weights_m: Tensor,
        *,
        act_nF: Tensor,
        grad_h_nG: Tensor,
        grad_weights_m: Tensor,
        memory_nF: Tensor,
    ) -> None:
        tensors = grad_nF, weights_m, act_nF, grad_h_nG, grad_weights_m
        addresses = *_addresses_of_halves(h_PnF), *(tensor.data_ptr() for tensor in tensors)
        self._swiglu_backward(*addresses, len(act_nF), len(weights_m), act_nF.shape[1])


def operations_for(x_AD: Tensor, weights_AK: Tensor, activation: Activation, num_threads: int) -> TileOperations:
    """The faster ones.

    Args:
        x_AD: Tokens.
        weights_AK: Weights of their experts' outputs.
        activation: Between the products.
        num_threads: Threads that torch would use for an operation on a tile.
    """
    # Dispatch modes, which count operations or decide what is recomputed, are to see them all. A subclass of Tensor may
    # have its values anywhere.
    if (
        activation == "swiglu"
        and type(x_AD) in (Tensor, nn.Parameter)
        and x_AD.dtype in _NAMES
        and weights_AK.dtype == torch.float32
        and num_threads <= _MOST_THREADS
        and not is_in_torch_dispatch_mode()
        and (library := compiled_library()) is not None
    ):
        return CompiledOperations(library, x_AD.dtype)
    return TileOperations(activation)


@cache
def compiled_library() -> ctypes.CDLL | None:
    """The functions of ``csrc/tile_kernels.c``; ``None`` where the package was installed without a compiler.

    Also where it was built for another system or other code: a library may be left over from an earlier installation.
    """
    found = PathFinder.find_spec("tile_kernels", [str(Path(__file__).with_name("csrc"))])
    return None if found is None or found.origin is None else load_library(found.origin)


def load_library(path: str) -> ctypes.CDLL | None:
    """As :func:`compiled_library`, from this file."""
    try:
        library = ctypes.CDLL(path)
        if library.tile_kernels_version() != _VERSION:
            return None
    except (OSError, AttributeError):
        return None
    address, number = ctypes.c_void_p, ctypes.c_int64
    arguments = {"gather_rows": [address] * 3 + [number] * 3}
    for dtype in _NAMES.values():
        arguments[f"swiglu_{dtype}"] = [address] * 3 + [number]
        arguments[f"swiglu_backward_{dtype}"] = [address] * 7 + [number] * 3
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

_VERSION = 1
"""That of ``csrc/tile_kernels.c`` which the calls here are for."""

_MOST_THREADS = 2
"""Torch's operations take 2.4 (bf16) to 2.7 (fp32) times as long as those in C, which have one thread."""


def _addresses_of_halves(h_PnF: Tensor) -> tuple[int, int]:
    start: int = h_PnF.data_ptr()
    return start, start + h_PnF.nbytes // 2

"""The activation between an expert's two products, with and without autograd.

Shapes: R rows, F expert width, G = 2F where the activation is gated and F where it is not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lightning_moe.config import Activation

_aten = torch.ops.aten


def activate(h_RG: Tensor, activation: Activation) -> Tensor:
    """The activation between the two products, [R, G] -> [R, F]; ``swiglu`` halves the width."""
    if activation == "swiglu":
        gate_RF, up_RF = h_RG.chunk(2, dim=-1)
        return functional.silu(gate_RF) * up_RF
    return functional.gelu(h_RG) if activation == "gelu" else functional.relu(h_RG)


def activate_into(h_RG: Tensor, activation: Activation, *, act_RF: Tensor, silu_RF: Tensor | None = None) -> None:
    """Writes ``activate(h)``.

    Args:
        h_RG: What is activated.
        activation: Which.
        act_RF: Takes the result.
        silu_RF: Takes ``silu(gate)`` for :func:`activate_backward_into`; ``None`` where nobody needs it.
    """
    if activation == "swiglu":
        gate_RF, up_RF = h_RG.chunk(2, dim=-1)
        silu_RF = act_RF if silu_RF is None else silu_RF
        _aten.silu.out(gate_RF, out=silu_RF)
        torch.mul(silu_RF, up_RF, out=act_RF)
    elif activation == "gelu":
        _aten.gelu.out(h_RG, out=act_RF)
    else:
        torch.clamp(h_RG, min=0, out=act_RF)


def activate_backward_into(
    h_RG: Tensor, activation: Activation, grad_RF: Tensor, silu_RF: Tensor, *, grad_h_RG: Tensor
) -> None:
    """Writes the gradient with respect to ``h``.

    Args:
        h_RG: What was activated.
        activation: Which.
        grad_RF: The gradient with respect to the result; what it holds afterwards is undefined.
        silu_RF: Of :func:`activate_into`.
        grad_h_RG: Takes the result.
    """
    if activation == "swiglu":
        gate_RF, up_RF = h_RG.chunk(2, dim=-1)
        grad_gate_RF, grad_up_RF = grad_h_RG.chunk(2, dim=-1)
        torch.mul(grad_RF, silu_RF, out=grad_up_RF)
        grad_RF.mul_(up_RF)
        _aten.silu_backward.grad_input(grad_RF, gate_RF, grad_input=grad_gate_RF)
    elif activation == "gelu":
        _aten.gelu_backward.grad_input(grad_RF, h_RG, grad_input=grad_h_RG)
    else:
        _aten.threshold_backward.grad_input(grad_RF, h_RG, 0, grad_input=grad_h_RG)

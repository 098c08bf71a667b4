"""The activation between an expert's two products, with and without autograd.

Shapes: R rows, F expert width, G = 2F where the activation is gated and F where it is not, P = G / F, n rows of a tile.
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


def activate_into(h_PnF: Tensor, activation: Activation, *, act_nF: Tensor, silu_nF: Tensor | None = None) -> None:
    """Writes ``activate(h)``.

    Args:
        h_PnF: What is activated; of ``swiglu`` the gates, then what they let through.
        activation: Which.
        act_nF: Takes the result.
        silu_nF: Takes ``silu(gate)`` for :func:`activate_backward_into`; ``None`` where nobody needs it.
    """
    if activation == "swiglu":
        gate_nF, up_nF = h_PnF.unbind()
        silu_nF = act_nF if silu_nF is None else silu_nF
        _aten.silu.out(gate_nF, out=silu_nF)
        torch.mul(silu_nF, up_nF, out=act_nF)
    elif activation == "gelu":
        _aten.gelu.out(h_PnF[0], out=act_nF)
    else:
        torch.clamp(h_PnF[0], min=0, out=act_nF)


def activate_backward_into(
    h_PnF: Tensor, activation: Activation, grad_nF: Tensor, silu_nF: Tensor, *, grad_h_nG: Tensor
) -> None:
    """Writes the gradient with respect to ``h``.

    Args:
        h_PnF: What was activated.
        activation: Which.
        grad_nF: The gradient with respect to the result; what it holds afterwards is undefined.
        silu_nF: Of :func:`activate_into`.
        grad_h_nG: Takes the result, the parts side by side.
    """
    if activation == "swiglu":
        gate_nF, up_nF = h_PnF.unbind()
        grad_gate_nF, grad_up_nF = grad_h_nG.chunk(2, dim=-1)
        torch.mul(grad_nF, silu_nF, out=grad_up_nF)
        grad_nF.mul_(up_nF)
        _aten.silu_backward.grad_input(grad_nF, gate_nF, grad_input=grad_gate_nF)
    elif activation == "gelu":
        _aten.gelu_backward.grad_input(grad_nF, h_PnF[0], grad_input=grad_h_nG)
    else:
        _aten.threshold_backward.grad_input(grad_nF, h_PnF[0], 0, grad_input=grad_h_nG)

"""What every token uses beside its routed experts.

Shapes: T tokens, D model width, F width of the MLP, G = 2F where the activation is gated and F where it is not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_moe.config import Activation
from lightning_moe.nn.activation import activate


class SharedMLP(nn.Module):
    """The expert that every token uses: one dense MLP.

    Args:
        hidden_size: D.
        intermediate_size: F of the whole MLP.
        activation: As for the routed experts.
        gated: Weigh it by ``sigmoid(gate(x))`` (Qwen2-MoE, Yang et al. 2024, section 2.2.2).
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation, gated: bool = False) -> None:
        super().__init__()
        self.activation = activation
        width = 2 * intermediate_size if activation == "swiglu" else intermediate_size
        self.up = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.gate = nn.Linear(hidden_size, 1, bias=False) if gated else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """Applies the MLP to every token, [T, D] -> [T, D]."""
        y_TD: Tensor = self.down(activate(self.up(x_TD), self.activation))
        return y_TD if self.gate is None else self.gate(x_TD).sigmoid() * y_TD


class ResidualMLP(nn.Module):
    """A dense MLP and the routed experts, mixed by a softmax per token (PR-MoE, Rajbhandari et al. 2022, section 4.1).

    Args:
        hidden_size: D.
        intermediate_size: F.
        activation: As for the routed experts.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation) -> None:
        super().__init__()
        self.mlp = SharedMLP(hidden_size, intermediate_size, activation)
        self.coefficient = nn.Linear(hidden_size, 2)

    def forward(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """Mixes the experts' outputs ``y_TD`` with the MLP's, [T, D] -> [T, D]; the first weight is the experts'."""
        experts_T1, mlp_T1 = torch.softmax(self.coefficient(x_TD), dim=-1).chunk(2, dim=-1)
        return experts_T1 * y_TD + mlp_T1 * self.mlp(x_TD)

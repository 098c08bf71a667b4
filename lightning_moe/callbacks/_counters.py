"""Sums of what layers decided, kept on the device until somebody asks.

Shapes: E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.metrics.functional import EVEN, dead_experts, entropy_sum, fraction, load_imbalance
from lightning_moe.nn import Decision, MoE

_FURTHER = 4


class RoutingCounter:
    """Watches one layer on this rank, without waiting for its device.

    Attributes:
        sums: Tokens per expert, [E], and behind them dropped and rerouted assignments, entropy and tokens; float64.
    """

    def __init__(self, layer: MoE, device: torch.device) -> None:
        self.sums = torch.zeros(layer.num_experts + _FURTHER, dtype=torch.float64, device=device)

    def look(self, decision: Decision) -> Tensor:
        """All that is counted of one micro-batch."""
        entropy, num_tokens = entropy_sum(decision.probs_TE, decision.tokens.valid_T)
        scalars = decision.num_dropped, decision.num_rerouted, entropy, num_tokens
        return torch.cat([decision.tokens_per_expert_E.double(), torch.stack([n.double() for n in scalars])])

    def count(self, looked: Tensor) -> None:
        """Adds a micro-batch."""
        self.sums += looked


@dataclass(frozen=True)
class RoutingCounts:
    """What was counted in some layers, over all ranks.

    Args:
        tokens_per_expert_LE: Assignments before any is dropped; 0 beyond a layer's experts.
        num_experts_L: Experts of every layer.
        num_dropped_L: Assignments that found no expert with room.
        num_rerouted_L: Assignments that another expert took.
        entropy_L: Sum over tokens of the entropy of the router's probabilities, each divided by log(E).
        num_tokens_L: Tokens that are no padding.
    """

    tokens_per_expert_LE: Tensor
    num_experts_L: Tensor
    num_dropped_L: Tensor
    num_rerouted_L: Tensor
    entropy_L: Tensor
    num_tokens_L: Tensor

    def metrics(self) -> dict[str, Tensor]:
        """What is logged, by name, [L]."""
        total_L = self.tokens_per_expert_LE.sum(1)
        return {
            "load_imbalance": load_imbalance(self.tokens_per_expert_LE, self.num_experts_L),
            "dead_experts": dead_experts(self.tokens_per_expert_LE, self.num_experts_L),
            "dropped_fraction": fraction(self.num_dropped_L, total_L),
            "rerouted_fraction": fraction(self.num_rerouted_L, total_L),
            "router_entropy": fraction(self.entropy_L, self.num_tokens_L, empty=EVEN),
        }


def take(counters: Sequence[RoutingCounter]) -> Tensor:
    """All sums behind each other, for one reduction over ranks; the counters begin again from 0."""
    taken = torch.cat([counter.sums for counter in counters])
    for counter in counters:
        counter.sums.zero_()
    return taken


def read(sums: Tensor, counters: Sequence[RoutingCounter]) -> RoutingCounts:
    """What :func:`take` gave, once it is summed over ranks."""
    layers = sums.split([len(counter.sums) for counter in counters])
    experts = [len(layer) - _FURTHER for layer in layers]
    loads = [layer[:-_FURTHER] for layer in layers]
    return RoutingCounts(
        torch.nn.utils.rnn.pad_sequence(loads, batch_first=True),
        torch.tensor(experts, dtype=torch.float64, device=sums.device),
        *torch.stack([layer[-_FURTHER:] for layer in layers]).unbind(1),
    )

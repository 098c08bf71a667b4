"""How evenly the experts are used."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_moe.callbacks._layers import RoutingCallback, is_logging_step
from lightning_moe.nn import RoutingStats


class ExpertLoadMonitor(RoutingCallback):
    """Logs how evenly tokens spread over the experts in training.

    ``moe/load_imbalance`` is the largest over the mean of ``tokens_per_expert``, averaged over the layers: 1 is
    even, ``num_experts / top_k`` is the worst. ``moe/dropped_fraction`` is the share of assignments that found no
    expert with room, and ``moe/rerouted_fraction`` of those that another expert took. All count the tokens of all
    ranks in the micro-batches since the last logged step, each token once; they are logged every
    ``log_every_n_steps``, with one reduction.

    Args:
        prog_bar: Show the imbalance in the progress bar.

    Raises:
        MisconfigurationException: at fit start, where the model has no MoE layer.
    """

    def __init__(self, prog_bar: bool = True) -> None:
        super().__init__()
        self.prog_bar = prog_bar
        self._counters: list[_Counter] = []

    @override
    def attach(self, pl_module: L.LightningModule) -> None:
        self._counters = [_Counter(layer.num_experts, pl_module.device) for layer in self.layers]
        for layer, counter in zip(self.layers, self._counters, strict=True):
            layer.tap.observers.append(counter)

    @override
    def detach(self) -> None:
        for layer, counter in zip(self.layers, self._counters, strict=True):
            layer.tap.observers.remove(counter)

    @override
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_logging_step(trainer):
            return
        local = torch.cat([counter.take() for counter in self._counters])
        counts = trainer.strategy.reduce(local, reduce_op="sum")
        imbalances, lost_fractions = [], []
        for layer_counts in counts.split([counter.counts.numel() for counter in self._counters]):
            tokens_per_expert_E, dropped_and_rerouted = layer_counts[:-2], layer_counts[-2:]
            total = tokens_per_expert_E.sum().clamp(min=1)
            imbalances.append(tokens_per_expert_E.max() * tokens_per_expert_E.numel() / total)
            lost_fractions.append(dropped_and_rerouted / total)
        dropped, rerouted = torch.stack(lost_fractions).mean(0)
        pl_module.log("moe/load_imbalance", torch.stack(imbalances).mean(), prog_bar=self.prog_bar)
        pl_module.log_dict({"moe/dropped_fraction": dropped, "moe/rerouted_fraction": rerouted})


class _Counter:
    """Sums one layer's tokens per expert, and behind them the dropped and the rerouted assignments."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_experts + 2, dtype=torch.float64, device=device)

    def __call__(self, stats: RoutingStats) -> None:
        self.counts[:-2] += stats.tokens_per_expert_E
        self.counts[-2] += stats.num_dropped
        self.counts[-1] += stats.num_rerouted

    def take(self) -> Tensor:
        taken = self.counts.clone()
        self.counts.zero_()
        return taken

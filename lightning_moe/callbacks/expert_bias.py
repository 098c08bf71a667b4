"""Balance without a loss: a bias per expert that only the selection sees."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_moe.callbacks._layers import RoutingCallback, sum_over_ranks
from lightning_moe.nn import MoE, RoutingStats


class ExpertBiasUpdate(RoutingCallback):
    """Moves every router's ``expert_bias`` towards an even load, once per optimizer step.

    ``bias += rate * sign(mean load - load)`` (Wang et al. 2024, algorithm 1; DeepSeek-V3, section 2.1.2), where the
    load counts the tokens of all ranks in all micro-batches of the step, each once. The bias selects and never weighs.
    It is part of the router's state, so that checkpoints have it; evaluation and recomputed activations leave it alone.
    (Manual optimization that steps several times in one batch moves it once.)

    Routers have the bias with ``router="group_limited"``, or ``router="topk"`` and ``expert_bias=True``.

    Args:
        rate: What a bias moves by in one step, in units of the scores.

    Raises:
        ValueError: ``rate`` is not a finite number above 0.
        MisconfigurationException: at fit start, where no router of the model has the bias.
    """

    def __init__(self, rate: float = 0.001) -> None:
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"rate={rate}: must be a finite number above 0. Use 0.001, or leave the callback out.")
        super().__init__()
        self.rate = rate
        self._loads: list[tuple[MoE, Tensor, Any]] = []

    @override
    def attach(self, pl_module: L.LightningModule) -> None:
        self._loads = []
        for layer in self.layers:
            if getattr(layer.router, "expert_bias", None) is not None:
                load_E = torch.zeros(layer.num_experts, dtype=torch.int64, device=pl_module.device)
                observer = partial(_add, load_E)
                layer.tap.observers.append(observer)
                layer.tap.balanced = True
                self._loads.append((layer, load_E, observer))
        if not self._loads:
            raise MisconfigurationException(
                "ExpertBiasUpdate: no router of this model has an expert_bias. Use router='group_limited', or "
                "expert_bias=True with router='topk'."
            )

    @override
    def detach(self) -> None:
        for layer, _, observer in self._loads:
            layer.tap.observers.remove(observer)
            layer.tap.balanced = False
        self._loads = []

    @override
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loads = sum_over_ranks(torch.cat([load_E for _, load_E, _ in self._loads]))
        for (layer, local_E, _), load_E in zip(
            self._loads, loads.split([load_E.numel() for _, load_E, _ in self._loads]), strict=True
        ):
            # The mean is compared as a whole number, where no rounding can turn an even load into an uneven one.
            layer.router.expert_bias += self.rate * (load_E.sum() - load_E * load_E.numel()).sign()
            local_E.zero_()


def _add(load_E: Tensor, stats: RoutingStats) -> None:
    load_E += stats.tokens_per_expert_E

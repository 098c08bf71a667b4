"""How evenly the experts are used, and what their communication costs."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_moe.callbacks._counters import RoutingCounter, read, take
from lightning_moe.callbacks._layers import RoutingCallback, is_logging_step, moe_layers, sum_over_ranks
from lightning_moe.callbacks._traffic import StepTraffic
from lightning_moe.metrics.functional import mean_over_layers
from lightning_moe.nn import MoE


class ExpertLoadMonitor(RoutingCallback):
    """Logs how evenly tokens spread over the experts, in training and in validation, and what dispatch costs.

    Every ``log_every_n_steps``, over the tokens of all ranks in the micro-batches since the last logged step, each
    token once, as means over the MoE layers:

    - ``moe/load_imbalance``: largest over mean of ``tokens_per_expert``; 1 is even, ``num_experts / top_k`` the worst.
    - ``moe/dead_experts``: experts of a layer that got no token.
    - ``moe/dropped_fraction``, ``moe/rerouted_fraction``: shares of the assignments that found no expert with room,
      and that another expert took.
    - ``moe/router_entropy``: of a token's router probabilities, over that of even ones; 1 is undecided, 0 certain.

    ``val_moe/...`` has the same of every validation, sanity checks left out.

    Of the logged step itself, where experts are spread over ranks:

    - ``moe/dispatch_bytes``: sent to other ranks, mean over ranks; ``moe/dispatch_bytes_received``: received by the
      rank that gets most.
    - ``moe/dispatch_seconds``: for which a rank stood still until rows had come, mean over ranks;
      ``moe/dispatch_seconds_slowest``: of the rank that waited longest.
    - ``moe/dispatch_share``: of the step's time, mean over ranks.

    All of it takes one reduction each time it is logged, and in the steps between nobody waits for the device.

    Args:
        prog_bar: Show imbalance and dropped share in the progress bar.
        per_layer: Log each layer's values, too: ``moe/layer_03/load_imbalance``.

    Raises:
        MisconfigurationException: at fit start, where the model has no MoE layer.
    """

    def __init__(self, prog_bar: bool = True, per_layer: bool = False) -> None:
        super().__init__()
        self.prog_bar = prog_bar
        self.per_layer = per_layer
        self._counters: list[tuple[MoE, RoutingCounter]] = []
        self._eval_counters: list[tuple[MoE, RoutingCounter]] = []
        self._traffic: StepTraffic | None = None

    @override
    def attach(self, pl_module: L.LightningModule) -> None:
        self._counters = [(layer, RoutingCounter(layer, pl_module.device)) for layer in self.layers]
        for layer, counter in self._counters:
            layer.tap.watchers.append(counter)
        self._traffic = StepTraffic(self.layers, pl_module.device)

    @override
    def detach(self) -> None:
        for layer, counter in self._counters:
            layer.tap.watchers.remove(counter)
        self._counters = []
        if self._traffic is not None:
            self._traffic.drop()

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._traffic is not None and is_logging_step(trainer, trainer.global_step + 1):
            self._traffic.begin()

    @override
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_logging_step(trainer):
            return
        assert self._traffic is not None
        counters = [counter for _, counter in self._counters]
        local = take(counters)
        traffic = self._traffic.end()
        summed, traffics = sum_over_ranks(torch.cat([local, traffic])).split([len(local), len(traffic)])
        values = self._values("moe", summed, counters) | self._traffic.values(traffics)
        for name, value in values.items():
            in_bar = name in ("moe/load_imbalance", "moe/dropped_fraction")
            pl_module.log(name, value, prog_bar=self.prog_bar and in_bar)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self._traffic is not None:
            self._traffic.pause()
        layers = self.layers or moe_layers(pl_module)
        self._eval_counters = [(layer, RoutingCounter(layer, pl_module.device)) for layer in layers]
        for layer, counter in self._eval_counters:
            layer.tap.eval_watchers.append(counter)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._traffic is not None:
            self._traffic.resume()

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._eval_counters:
            return
        counters = [counter for _, counter in self._eval_counters]
        self._leave_evaluation()
        values = self._values("val_moe", sum_over_ranks(take(counters)), counters)
        pl_module.log_dict(values, sync_dist=True)  # the same on all ranks already: Lightning warns otherwise

    def _leave_evaluation(self) -> None:
        for layer, counter in self._eval_counters:
            layer.tap.eval_watchers.remove(counter)
        self._eval_counters = []

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leave_evaluation()
        super().on_exception(trainer, pl_module, exception)

    def _values(self, prefix: str, sums: Tensor, counters: list[RoutingCounter]) -> dict[str, Tensor]:
        """What is logged of sums over all ranks, by name."""
        counts = read(sums, counters)
        of_layers = counts.metrics()
        seen_L = counts.num_tokens_L > 0
        seen_L = seen_L | ~seen_L.any()
        means = {name: mean_over_layers(values_L, seen_L) for name, values_L in of_layers.items()}
        values = {f"{prefix}/{name}": mean for name, mean in means.items()}
        if self.per_layer:
            for name, values_L in of_layers.items():
                for i, value in enumerate(values_L.unbind()):
                    values[f"{prefix}/layer_{i:02}/{name}"] = value
        return values

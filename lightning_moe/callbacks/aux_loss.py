"""Auxiliary losses of the routers: weighted, added to the objective exactly once, logged."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_moe.callbacks._layers import RoutingCallback, is_logging_step, mean_over_ranks
from lightning_moe.nn import RoutingStats


class AuxLossCallback(RoutingCallback):
    """Adds the load-balancing loss and the router z-loss to the objective, and logs them.

    The gradient is that of ``task_loss + load_balancing * mean L_lb + router_z * mean L_z``, where the means are
    over the MoE layers, so that a weight does not depend on the depth (a layer used n times adds its loss n times).
    It is so under gradient accumulation, fp16 loss scaling, data and expert parallelism and activation checkpointing;
    the loss that the module returns and logs stays the task's alone.

    Logs ``moe/load_balancing_loss`` and ``moe/router_z_loss``, unweighted, and ``moe/aux_loss``, their weighted
    sum, as means over ranks and the micro-batches since the last logged step, every ``log_every_n_steps``.

    Args:
        load_balancing: Weight of the load-balancing loss (Switch Transformer, eq. 4).
        router_z: Weight of the router z-loss (ST-MoE, eq. 5).
        scope: Over what a layer's share f_i is taken: ``micro_batch``, this rank's tokens of one micro-batch.
        warmup_steps: Optimizer steps over which both weights rise linearly from 0.

    Raises:
        ValueError: a weight is negative or not finite, ``warmup_steps`` is negative, or the scope is unknown.
        MisconfigurationException: at fit start, where the model has no MoE layer.
    """

    def __init__(
        self,
        load_balancing: float = 0.01,
        router_z: float = 0.0,
        scope: Literal["micro_batch"] = "micro_batch",
        warmup_steps: int = 0,
    ) -> None:
        for name, weight in (("load_balancing", load_balancing), ("router_z", router_z)):
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"{name}={weight}: must be a finite number of at least 0. Use 0 to leave it out.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps}: must be 0 or more. Use 0 for full weights at once.")
        if scope != "micro_batch":
            raise ValueError(f"scope={scope!r}: unknown. Known: micro_batch.")
        super().__init__()
        self.load_balancing = load_balancing
        self.router_z = router_z
        self.scope = scope
        self.warmup_steps = warmup_steps
        self._sum_2: Tensor | None = None
        self._count = 0

    @override
    def attach(self, pl_module: L.LightningModule) -> None:
        self._sum_2, self._count = None, 0
        for layer in self.layers:
            layer.tap.loss_weights = (0.0, 0.0)
            layer.tap.observers.append(self._observe)

    @override
    def detach(self) -> None:
        for layer in self.layers:
            layer.tap.loss_weights = None
            layer.tap.loss_gradient = 1.0
            layer.tap.observers.remove(self._observe)

    def weights(self, step: int) -> tuple[float, float]:
        """Both weights at an optimizer step."""
        factor = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return self.load_balancing * factor, self.router_z * factor

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # Lightning has already divided the task's loss by the number of micro-batches.
        share = len(self.layers) * (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
        load_balancing, router_z = self.weights(trainer.global_step)
        # Under DDP's 16-mixed the loss that comes here is scaled already; elsewhere its own gradient tells the scale.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale: Any = 1.0 if scaler is None else scaler.scale(torch.ones((), device=loss.device))
        for layer in self.layers:
            layer.tap.loss_weights = (load_balancing / share, router_z / share)
            layer.tap.loss_gradient = scale
        if scaler is None and loss.requires_grad:
            loss.register_hook(self._set_loss_gradient)

    def _set_loss_gradient(self, grad: Tensor) -> None:
        """First of all hooks in the backward pass: whatever the engine scales the loss by arrives here."""
        for layer in self.layers:
            layer.tap.loss_gradient = grad.float()

    def _observe(self, stats: RoutingStats) -> None:
        losses_2 = torch.stack([stats.load_balancing_loss, stats.router_z_loss])
        self._sum_2 = losses_2 if self._sum_2 is None else self._sum_2 + losses_2
        self._count += 1

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_logging_step(trainer):
            return
        # Every rank reduces, whether or not its layers ran: a rank that skips would hang the others.
        losses_2 = torch.zeros(2, device=pl_module.device) if self._sum_2 is None else self._sum_2 / self._count
        self._sum_2, self._count = None, 0
        load_balancing, router_z = mean_over_ranks(trainer, losses_2.unbind())
        weights = self.weights(trainer.global_step - 1)
        pl_module.log_dict(
            {
                "moe/load_balancing_loss": load_balancing,
                "moe/router_z_loss": router_z,
                "moe/aux_loss": weights[0] * load_balancing + weights[1] * router_z,
            }
        )

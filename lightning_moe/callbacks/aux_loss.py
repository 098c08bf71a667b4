"""Auxiliary losses of the routers: weighted, added to the objective exactly once, logged."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_moe.callbacks._layers import (
    RoutingCallback,
    is_logging_step,
    mean_over_ranks,
    sum_over_ranks,
)
from lightning_moe.nn import LossWeights, RoutingStats

Decay = Literal["none", "linear", "cosine"]


class AuxLossCallback(RoutingCallback):
    """Adds the routers' losses to the objective, and logs them.

    The gradient is that of ``task_loss + load_balancing * mean L_lb + router_z * mean L_z + ...``, where the means are
    over the MoE layers, so that a weight does not depend on the depth (a layer used n times adds its loss n times).
    It is so under gradient accumulation, fp16 loss scaling, data and expert parallelism and activation checkpointing;
    the loss that the module returns and logs stays the task's alone.

    Logs ``moe/load_balancing_loss`` and ``moe/router_z_loss``, unweighted, and ``moe/aux_loss``, the weighted
    sum of all, as means over ranks and the micro-batches since the last logged step, every ``log_every_n_steps``.
    ``moe/importance_loss`` and ``moe/load_loss`` join them where they have a weight. ``moe/load_balancing_weight`` is
    that of the step, with warm-up, decay and what RouterCollapseGuard has raised.

    Args:
        load_balancing: Weight of the load-balancing loss (Switch Transformer, eq. 4).
        router_z: Weight of the router z-loss (ST-MoE, eq. 5).
        scope: Over what a layer's share f_i is taken: ``micro_batch``, this rank's tokens of one micro-batch;
            ``sequence``, each sequence, and the mean over them; ``global_batch``, the tokens of all ranks in all
            micro-batches of the optimizer step so far.
        warmup_steps: Optimizer steps over which all weights rise linearly from 0.
        importance: Weight of the importance loss (Shazeer et al. 2017, eq. 7).
        load: Weight of the load loss (Shazeer et al. 2017, eq. 11), for ``router="noisy_topk"``.
        decay: How all weights fall after the warm-up: ``none``, ``linear`` or ``cosine``.
        decay_steps: Optimizer step at which the decay has come to its end; ``None`` is the end of the run.
        final_ratio: What is left of the weights then.

    Raises:
        ValueError: a weight is negative or not finite, a number of steps or the ratio is out of its range, or the
            scope or the decay is unknown.
        MisconfigurationException: at fit start, where the model has no MoE layer, ``load`` has no router that it is
            for, or the run has no end for the decay to come to.
    """

    def __init__(
        self,
        load_balancing: float = 0.01,
        router_z: float = 0.0,
        scope: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch",
        warmup_steps: int = 0,
        importance: float = 0.0,
        load: float = 0.0,
        decay: Decay = "none",
        decay_steps: int | None = None,
        final_ratio: float = 0.0,
    ) -> None:
        self.peak = LossWeights(load_balancing, router_z, importance, load)
        for name, weight in self.peak._asdict().items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"{name}={weight}: must be a finite number of at least 0. Use 0 to leave it out.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps}: must be 0 or more. Use 0 for full weights at once.")
        for name, value, known in (
            ("scope", scope, ("micro_batch", "sequence", "global_batch")),
            ("decay", decay, get_args(Decay)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: unknown. Known: {', '.join(known)}.")
        if decay_steps is not None and decay_steps <= warmup_steps:
            raise ValueError(
                f"decay_steps={decay_steps}: must be above warmup_steps={warmup_steps}, where the decay begins. Use a "
                "later step, or null for the end of the run."
            )
        if not 0 <= final_ratio <= 1:
            raise ValueError(f"final_ratio={final_ratio}: must be from 0 to 1. Use 0 to let the weights fall to 0.")
        if decay == "none" and (decay_steps is not None or final_ratio):
            raise ValueError(
                f"decay='none': decay_steps={decay_steps} and final_ratio={final_ratio} would do nothing. Use "
                "decay='linear' or 'cosine', or leave them out."
            )
        super().__init__()
        self.load_balancing, self.router_z = load_balancing, router_z
        self.importance, self.load = importance, load
        self.scope = scope
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.decay_steps = decay_steps
        self.final_ratio = final_ratio
        self._last_step: float = math.inf if decay_steps is None else decay_steps
        self._in_force = self.peak
        self._sum_4: Tensor | None = None
        self._count = 0

    @override
    def attach(self, pl_module: L.LightningModule) -> None:
        if self.load and not any(layer.router.estimates_load for layer in self.layers):
            routers = ", ".join(sorted({layer.config.router for layer in self.layers}))
            raise MisconfigurationException(
                f"load={self.load}: router={routers!r} has no noise to take the load loss over. Use "
                "router='noisy_topk', or load=0 with load_balancing."
            )
        if any(layer.tap.loss_weights is not None for layer in self.layers):
            raise MisconfigurationException(
                "AuxLossCallback: another one is in charge of these layers already. Use one; the command has its own, "
                "whose settings are --aux_loss."
            )
        self._sum_4, self._count = None, 0
        self.scale_load_balancing(1.0)
        for layer in self.layers:
            layer.tap.loss_weights = LossWeights()
            layer.tap.scope = self.scope
            layer.tap.sum_over_ranks = sum_over_ranks
            layer.tap.importance, layer.tap.load = self.importance > 0, self.load > 0
            layer.tap.begin_step()
            layer.tap.observers.append(self._observe)

    @override
    def detach(self) -> None:
        for layer in self.layers:
            layer.tap.loss_weights = None
            layer.tap.loss_gradient = 1.0
            layer.tap.scope = "micro_batch"
            layer.tap.sum_over_ranks = None
            layer.tap.importance = layer.tap.load = False
            layer.tap.begin_step()
            if self._observe in layer.tap.observers:
                layer.tap.observers.remove(self._observe)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.decay == "none" or self.decay_steps is not None:
            return
        self._last_step = trainer.estimated_stepping_batches
        if not 0 <= self._last_step < math.inf:  # -1 where the length of an epoch is not known
            raise MisconfigurationException(
                f"decay={self.decay!r}: the end of this run, to which the weights would fall, is not known. Set "
                "decay_steps, or the Trainer's max_steps."
            )

    def weights(self, step: int) -> LossWeights:
        """All weights at an optimizer step."""
        return LossWeights(*(weight * self._factor(step) for weight in self.peak))

    def scale_load_balancing(self, factor: float) -> None:
        """Multiplies the load-balancing weight of the config, for the steps from the next one to the end of the fit.

        The same on every rank. Whoever calls it sees to it that a resumed run has the factor again.
        """
        self.peak = self.peak._replace(load_balancing=self.load_balancing * factor)

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.decay == "none":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, self._last_step - self.warmup_steps))
        left = 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_ratio + (1 - self.final_ratio) * left

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # Lightning has already divided the task's loss by the number of micro-batches.
        share = len(self.layers) * (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
        self._in_force = self.weights(trainer.global_step)
        weights = LossWeights(*(weight / share for weight in self._in_force))
        # Under DDP's 16-mixed the loss that comes here is scaled already; elsewhere its own gradient tells the scale.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale: Any = 1.0 if scaler is None else scaler.scale(torch.ones((), device=loss.device))
        for layer in self.layers:
            layer.tap.loss_weights = weights
            layer.tap.loss_gradient = scale
        if scaler is None and loss.requires_grad:
            loss.register_hook(self._set_loss_gradient)

    def _set_loss_gradient(self, grad: Tensor) -> None:
        """First of all hooks in the backward pass: whatever the engine scales the loss by arrives here."""
        for layer in self.layers:
            layer.tap.loss_gradient = grad.float()

    def _observe(self, stats: RoutingStats) -> None:
        losses = stats.load_balancing_loss, stats.router_z_loss, stats.importance_loss, stats.load_loss
        losses_4 = torch.stack(losses).float()
        self._sum_4 = losses_4 if self._sum_4 is None else self._sum_4 + losses_4
        self._count += 1

    @override
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for layer in self.layers:
            layer.tap.begin_step()
        if not is_logging_step(trainer):
            return
        # Every rank reduces, whether or not its layers ran: a rank that skips would hang the others.
        losses_4 = torch.zeros(4, device=pl_module.device) if self._sum_4 is None else self._sum_4 / self._count
        self._sum_4, self._count = None, 0
        losses = mean_over_ranks(trainer, losses_4.unbind())
        logged: dict[str, Tensor | float] = {
            "moe/load_balancing_loss": losses[0],
            "moe/router_z_loss": losses[1],
            "moe/aux_loss": sum(weight * loss for weight, loss in zip(self._in_force, losses, strict=True)),
        }
        if self.load_balancing:
            logged["moe/load_balancing_weight"] = self._in_force.load_balancing
        if self.importance:
            logged["moe/importance_loss"] = losses[2]
        if self.load:
            logged["moe/load_loss"] = losses[3]
        pl_module.log_dict(logged)

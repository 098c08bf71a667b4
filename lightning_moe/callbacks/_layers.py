"""What the callbacks share: their time with the layers, when to log, and a mean over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_moe.nn import MoE


class RoutingCallback(L.Callback):
    """Base of the callbacks that listen to the MoE layers while a model is fitted.

    Subclasses say what they do when they begin and cease to listen, and after each optimizer step.

    Attributes:
        layers: The MoE layers, in the order of the model's modules; empty outside of ``fit``.

    Raises:
        MisconfigurationException: the Trainer is of ``pytorch_lightning``, or the model has no MoE layer.
    """

    def __init__(self) -> None:
        self.layers: list[MoE] = []
        self._steps_seen = 0

    def attach(self, pl_module: L.LightningModule) -> None:
        """Begins to listen to ``self.layers``."""
        raise NotImplementedError

    def detach(self) -> None:
        """Leaves ``self.layers`` as they were."""
        raise NotImplementedError

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called on every rank when the batch that has just ended also ended an optimizer step."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps_seen = trainer.global_step  # not before: a resumed run gets its own only now

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # By the count of steps, so that it is right whoever steps: the loop, or the user's own training_step.
        if trainer.global_step != self._steps_seen:
            self._steps_seen = trainer.global_step
            self.after_step(trainer, pl_module)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_lightning(trainer, self)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layers = moe_layers(pl_module)
        if not layers:
            raise MisconfigurationException(
                f"{type(self).__name__}: {type(pl_module).__name__} has no lightning_moe.MoE layer. Build one in "
                "__init__ or configure_model, or leave the callback out."
            )
        if layers[0].groups.ep_size > 1 and getattr(trainer.strategy, "expert_groups", None) is None:
            raise MisconfigurationException(
                f"strategy={type(trainer.strategy).__name__}: {type(pl_module).__name__} was sharded by an earlier "
                "ExpertParallelStrategy, so that each rank has other experts, and this strategy would mix them up. "
                "Build the model anew."
            )
        for layer in layers:
            if layer.groups.ep_group is None:  # of no EP strategy, so that only the Trainer knows who has other data
                layer.groups = replace(layer.groups, data_size=trainer.world_size, data_rank=trainer.global_rank)
        self.layers = layers
        self.attach(pl_module)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.layers:
            self.detach()
        self.layers = []


def require_lightning(trainer: L.Trainer, callback: L.Callback) -> None:
    """Refuses a Trainer of the package ``pytorch_lightning``, whose classes are others.

    Raises:
        MisconfigurationException: it is one.
    """
    if not isinstance(trainer, L.Trainer):
        raise MisconfigurationException(
            f"{type(callback).__name__}: the Trainer is of {type(trainer).__module__.split('.')[0]}, and this callback "
            "of lightning. Import Trainer, LightningModule and callbacks from 'lightning'."
        )


def moe_layers(module: L.LightningModule) -> list[MoE]:
    """The MoE layers, in the order of the module's modules."""
    return [part for part in module.modules() if isinstance(part, MoE)]


def names_of(layers: Sequence[MoE], module: L.LightningModule) -> list[str]:
    """Names of layers in their module: ``transformer.blocks.3.feed_forward``."""
    names = {id(part): name for name, part in module.named_modules()}
    return [names[id(layer)] for layer in layers]


def is_logging_step(trainer: L.Trainer, step: int | None = None) -> bool:
    """Whether the loggers get to see an optimizer step; the same on every rank.

    Args:
        trainer: Whose.
        step: Which, from 1; ``None`` is that which has just ended.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Trainer's logger connector
    return every > 0 and (trainer.global_step if step is None else step) % every == 0


def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum over all ranks, without the barrier of ``Strategy.reduce``; the argument stays as it is."""
    total = counts.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def mean_over_ranks(trainer: L.Trainer, values: Sequence[Tensor]) -> list[Tensor]:
    """Means of scalars over all ranks, in one reduction."""
    stacked = torch.stack([value.float() for value in values])
    return list(trainer.strategy.reduce(stacked, reduce_op="mean").unbind())

"""What the callbacks share: finding the MoE layers, and refusing the wrong Trainer."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_moe.nn import MoE


def moe_layers(module: nn.Module) -> list[MoE]:
    """The MoE layers of a model, in the order of its modules."""
    return [layer for layer in module.modules() if isinstance(layer, MoE)]


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


def is_logging_step(trainer: L.Trainer) -> bool:
    """Whether the optimizer step that has just ended is one that the loggers get to see; the same on every rank."""
    steps: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Trainer's logger connector
    stepped = not trainer.fit_loop._should_accumulate() if trainer.lightning_module.automatic_optimization else True
    return stepped and steps > 0 and trainer.global_step % steps == 0


def mean_over_ranks(trainer: L.Trainer, values: Sequence[Tensor]) -> list[Tensor]:
    """Means of scalars over all ranks, in one reduction."""
    stacked = torch.stack([value.float() for value in values])
    return list(trainer.strategy.reduce(stacked, reduce_op="mean").unbind())

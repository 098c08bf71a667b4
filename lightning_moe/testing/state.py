"""The whole weights of a model that a strategy has spread over ranks."""

from __future__ import annotations

import lightning as L
from torch import Tensor

from lightning_moe.engine.deepspeed import full_parameter
from lightning_moe.strategies import ExpertParallelStrategy


def full_state(trainer: L.Trainer) -> dict[str, Tensor]:
    """Every parameter whole and every persistent buffer, on the CPU, by name, on every rank. Collective.

    Raises:
        TypeError: the Trainer has another strategy.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ExpertParallelStrategy) or strategy.expert_groups is None:
        raise TypeError(f"strategy={strategy!r}: full_state needs an ExpertParallelStrategy that has been set up.")
    assert strategy.lightning_module is not None
    module = strategy.lightning_module
    state = {
        name: full_parameter(parameter, strategy.expert_groups).float().cpu()
        for name, parameter in module.named_parameters()
    }
    persistent = module.state_dict().keys()
    return state | {name: buffer.cpu().clone() for name, buffer in module.named_buffers() if name in persistent}

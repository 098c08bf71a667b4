"""Settings of the MoE layers that change during a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_moe.callbacks._layers import RoutingCallback, moe_layers


class _Schedule(RoutingCallback):
    """Sets one setting of every MoE layer to the value of the latest step that the run has come to.

    Steps decide, not the time since the start, so that a resumed run goes on where it was. The value in force is in
    the checkpoint, for evaluation by ``ckpt_path``.
    """

    field: ClassVar[str]

    def __init__(self, by_step: dict[int, Any]) -> None:
        if not by_step:
            raise ValueError(f"{self.field}={{}}: must have at least one step. Use {{0: value}}, for example.")
        for step in by_step:
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:
                raise ValueError(
                    f"{self.field}: {step!r} must be an optimizer step, a whole number of at least 0. Use {{0: value, "
                    "1000: value}, for example."
                )
        super().__init__()
        self.by_step = dict(sorted(by_step.items()))
        self._in_force: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}

    @override
    def attach(self, pl_module: L.LightningModule) -> None:
        self._in_force, self._loaded = {}, {}  # those of another fit or model: steps decide
        for layer in self.layers:
            for step, value in self.by_step.items():
                try:
                    replace(layer.config, **{self.field: value})
                except ValueError as error:
                    raise MisconfigurationException(f"{type(self).__name__}, step {step}: {error}") from error

    @override
    def detach(self) -> None:
        """The last value stays: the model was trained for it."""

    def _set(self, layers: list[Any], value: Any) -> None:
        for layer in layers:
            if getattr(layer.config, self.field) != value:
                layer.reconfigure(**{self.field: value})

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        due = [value for step, value in self.by_step.items() if step <= trainer.global_step]
        if due:
            self._in_force = {"value": due[-1]}
            self._set(self.layers, due[-1])

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._in_force)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)

    def _restore(self, pl_module: L.LightningModule) -> None:
        """Outside of fit, what the checkpoint says, for this evaluation's model."""
        if not self.layers and self._loaded:
            self._set(moe_layers(pl_module), self._loaded["value"])
        self._loaded = {}

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore(pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore(pl_module)

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore(pl_module)


class CapacitySchedule(_Schedule):
    """Changes the capacity factor of every MoE layer by optimizer step, without a restart.

    Args:
        capacity_factor: From which step on which factor, ``{0: 2.0, 1000: 1.25}``; ``None`` as a factor is dropless.
            Before the first step the layers' own holds.

    Raises:
        ValueError: there is no step, or one is negative.
        MisconfigurationException: at fit start, where a layer's config refuses a value.
    """

    field = "capacity_factor"

    def __init__(self, capacity_factor: dict[int, float | None]) -> None:
        super().__init__(capacity_factor)


class TopKSchedule(_Schedule):
    """Changes the number of experts per token of every MoE layer by optimizer step, without a restart.

    Args:
        top_k: From which step on how many, ``{0: 4, 1000: 2}``. Before the first step the layers' own holds.

    Raises:
        ValueError: there is no step, or one is negative.
        MisconfigurationException: at fit start, where a layer's config refuses a value.
    """

    field = "top_k"

    def __init__(self, top_k: dict[int, int]) -> None:
        super().__init__(top_k)

    @override
    def attach(self, pl_module: L.LightningModule) -> None:
        super().attach(pl_module)
        if any(layer.router.fits_capacity for layer in self.layers):
            raise MisconfigurationException(
                "TopKSchedule: router='expert_choice' does not read top_k. Use CapacitySchedule, whose factor is the "
                "mean number of experts per token."
            )

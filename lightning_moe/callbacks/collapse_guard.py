"""An alarm for experts that nobody uses any more.

Shapes: E experts, L layers. Column E of [L, E+1] is for the entropy of the layer's router.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_moe.callbacks._counters import RoutingCounter, RoutingCounts, read, take
from lightning_moe.callbacks._layers import RoutingCallback, is_logging_step, names_of, sum_over_ranks
from lightning_moe.callbacks.aux_loss import AuxLossCallback
from lightning_moe.nn import MoE

Action = Literal["warn", "raise_weight", "stop"]

_NAMED = 8  # experts that a message names


class RouterCollapseGuard(RoutingCallback):
    """Acts when experts are left without tokens for long, or a router has become too certain.

    An expert is low while it gets less than ``min_load`` times the mean load of its layer, and a router while the
    entropy of its probabilities, as ``moe/router_entropy`` is taken, is under ``min_entropy``. The tokens of all ranks
    count, each once and only in training, and every ``check_every_n_steps`` those since the last check are judged
    together, so that a short dip is none. What is low in all checks of ``patience`` steps is collapsed: from the step
    on at which it begins it is caught within ``patience + check_every_n_steps`` steps. All ranks decide the same.

    What is done then:

    - ``warn``: a warning names layers, experts and what helps. It comes again only for further experts, and after
      a recovery, which is said, too.
    - ``raise_weight``: warns, and multiplies the load-balancing weight of :class:`AuxLossCallback` by ``factor``, again
      each time ``patience`` further steps have brought no recovery, and never sooner; warm-up and decay of weights go
      on. The weight stays raised to the end of the run, also of one that is resumed with the guard.
    - ``stop``: warns, and ends the training of all ranks after this step, or at the Trainer's ``min_steps`` and
      ``min_epochs`` if those are later.

    ``moe/collapsed_layers`` is logged every ``log_every_n_steps``, and at the step at which ``stop`` ends the run: the
    number of layers that are collapsed, 0 where all is well. Of several guards it is the largest number.

    The load of routers that balance themselves (``expert_choice``, ``sinkhorn``) or learn nothing (``hash``,
    ``random``) is not judged. Checkpoints keep how long experts have been low, so that a resumed run acts at the same
    step.

    Args:
        min_load: Share of the mean load that an expert must get; 0 judges entropy alone.
        patience: Optimizer steps for which an expert or a router has to be low; a multiple of ``check_every_n_steps``.
        min_entropy: Entropy that a router must have, between 0, certain, and 1, undecided; ``None`` judges load alone.
        action: What to do.
        check_every_n_steps: Optimizer steps from one check to the next: each takes one reduction over ranks.
        factor: What ``raise_weight`` multiplies the weight by.
        max_weight: What it raises the weight to at most.

    Raises:
        ValueError: a value is out of its range, or nothing is left to judge.
        MisconfigurationException: at fit start, where the model has no MoE layer, or ``raise_weight`` finds no
            AuxLossCallback whose weight it could raise.
    """

    def __init__(
        self,
        min_load: float = 0.1,
        patience: int = 200,
        min_entropy: float | None = None,
        action: Action = "warn",
        check_every_n_steps: int = 10,
        factor: float = 2.0,
        max_weight: float = 1.0,
    ) -> None:
        if not 0 <= min_load < 1:
            raise ValueError(f"min_load={min_load}: must be from 0 to below 1, a share of the mean load. Use 0.1.")
        if min_entropy is not None and not 0 < min_entropy < 1:
            raise ValueError(
                f"min_entropy={min_entropy}: must be between 0, certain, and 1, undecided. Use 0.05, or null to leave "
                "it out."
            )
        if min_load == 0 and min_entropy is None:
            raise ValueError(
                "min_load=0: nothing is judged without min_entropy. Use min_load=0.1, or leave the callback out."
            )
        if check_every_n_steps < 1:
            raise ValueError(f"check_every_n_steps={check_every_n_steps}: must be at least 1. Use 10.")
        if patience < 1 or patience % check_every_n_steps:
            fitting = max(1, -(-patience // check_every_n_steps)) * check_every_n_steps
            raise ValueError(
                f"patience={patience}: must be a multiple of check_every_n_steps={check_every_n_steps}, at least one. "
                f"Use {fitting}, or other checks."
            )
        if action not in get_args(Action):
            raise ValueError(f"action={action!r}: unknown. Known: {', '.join(get_args(Action))}.")
        if not (factor > 1 and math.isfinite(factor)):
            raise ValueError(f"factor={factor}: must be a finite number above 1. Use 2.0.")
        if not (max_weight > 0 and math.isfinite(max_weight)):
            raise ValueError(f"max_weight={max_weight}: must be a finite number above 0. Use 1.0.")
        super().__init__()
        self.min_load = min_load
        self.patience = patience
        self.min_entropy = min_entropy
        self.action = action
        self.check_every_n_steps = check_every_n_steps
        self.factor = factor
        self.max_weight = max_weight
        self._aux_loss: AuxLossCallback | None = None
        self._forget()

    def _forget(self) -> None:
        self._watched: list[tuple[MoE, RoutingCounter]] = []
        self._names: list[str] = []
        self._low_steps = torch.zeros(0, 1, dtype=torch.int64)  # [L, E+1], of steps judged so far
        self._reported = torch.zeros(0, 1, dtype=torch.bool)  # [L, E+1]
        self._collapsed_layers = 0
        self._last_check = 0
        self._last_raise: int | None = None
        self._raised = 1.0  # times the weight of the config
        self._loaded: dict[str, Any] = {}
        self._failed = False

    # ------------------------------------------------------------------------------------ listening

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # before a checkpoint is loaded
            self._forget()

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.action == "raise_weight":
            self._aux_loss = self._raisable(trainer)
        super().on_fit_start(trainer, pl_module)

    def _raisable(self, trainer: L.Trainer) -> AuxLossCallback:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        found = next((c for c in callbacks if isinstance(c, AuxLossCallback)), None)
        if found is None or not found.load_balancing:
            problem = "there is none" if found is None else "its weight is 0"
            raise MisconfigurationException(
                f"action='raise_weight': multiplies the load_balancing weight of AuxLossCallback, and {problem}. Add "
                "AuxLossCallback(load_balancing=0.01) to the Trainer's callbacks, or --aux_loss.load_balancing=0.01 to "
                "the command, or use action='warn'."
            )
        if found.load_balancing >= self.max_weight:
            raise MisconfigurationException(
                f"max_weight={self.max_weight}: must be above load_balancing={found.load_balancing} of "
                "AuxLossCallback for action='raise_weight' to raise it. Use a larger max_weight."
            )
        if sum(isinstance(c, RouterCollapseGuard) and c.action == "raise_weight" for c in callbacks) > 1:
            raise MisconfigurationException(
                "action='raise_weight': another RouterCollapseGuard raises the same weight. Use action='warn' in one."
            )
        return found

    @override
    def attach(self, pl_module: L.LightningModule) -> None:
        self._watched, self._names = [], []
        for index, (layer, name) in enumerate(zip(self.layers, names_of(self.layers, pl_module), strict=True)):
            judges_load = self.min_load > 0 and not layer.router.balances_itself
            if layer.num_experts > 1 and (judges_load or self.min_entropy is not None):
                counter = RoutingCounter(layer, pl_module.device)
                layer.tap.watchers.append(counter)
                self._watched.append((layer, counter))
                self._names.append(f"layer_{index:02} ({name})")
        shape = len(self._watched), max([layer.num_experts for layer, _ in self._watched], default=0) + 1
        self._low_steps = torch.zeros(shape, dtype=torch.int64)
        self._reported = torch.zeros(shape, dtype=torch.bool)

    @override
    def detach(self) -> None:
        for layer, counter in self._watched:
            layer.tap.watchers.remove(counter)

    @property
    def _counters(self) -> list[RoutingCounter]:
        return [counter for _, counter in self._watched]

    # ---------------------------------------------------------------------------------------- state

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._failed = True
        super().on_exception(trainer, pl_module, exception)

    @property
    @override
    def state_key(self) -> str:
        """Guards of different bounds, patience and actions can stand beside each other."""
        names = "min_load", "min_entropy", "action", "patience", "check_every_n_steps"
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    @override
    def state_dict(self) -> dict[str, Any]:
        """How long what has been low, what is counted since the last check, and the raised weight. Collective."""
        if not self._watched:
            return {}
        counted = torch.cat([counter.sums for counter in self._counters])
        # After an exception the other ranks may not come.
        counted = torch.zeros_like(counted) if self._failed else sum_over_ranks(counted)
        return {
            "low_steps": self._low_steps.tolist(),
            "reported": self._reported.tolist(),
            "counted": counted.tolist(),
            "last_check": self._last_check,
            "last_raise": self._last_raise,
            "raised": self._raised,  # the factor: a resumed run may have another weight in its config
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_check = trainer.global_step
        state, self._loaded = self._loaded, {}
        if state and self._aux_loss is not None:
            # Of a weight that is larger in this config it may be too much.
            self._raised = min(state["raised"], self.max_weight / self._aux_loss.load_balancing)
            self._aux_loss.scale_load_balancing(self._raised)
        if not state or torch.tensor(state["low_steps"]).shape != self._low_steps.shape:
            return  # a new run, or one that judges other layers now
        self._low_steps = torch.tensor(state["low_steps"])
        self._reported = torch.tensor(state["reported"])
        if self.action == "stop" and self._reported.any():  # resumed all the same: it has its patience again
            self._low_steps.zero_()
            self._reported.zero_()
        self._collapsed_layers = int(self._reported.any(1).sum())
        self._last_check, self._last_raise = state["last_check"], state["last_raise"]
        if trainer.is_global_zero:  # the sum over ranks, whichever they are now
            counted = torch.tensor(state["counted"], dtype=torch.float64, device=pl_module.device)
            for counter, sums in zip(self._counters, counted.split([len(c.sums) for c in self._counters]), strict=True):
                counter.sums += sums

    # -------------------------------------------------------------------------------------- judging

    @override
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = trainer.global_step - self._last_check
        if self._watched and steps >= self.check_every_n_steps:
            self._check(trainer, steps)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        guards = [callback for callback in callbacks if isinstance(callback, RouterCollapseGuard)] or [self]
        if self is guards[-1] and (is_logging_step(trainer) or trainer.should_stop):
            pl_module.log("moe/collapsed_layers", float(max(guard._collapsed_layers for guard in guards)))

    def _check(self, trainer: L.Trainer, steps: int) -> None:
        self._last_check = trainer.global_step
        counts = read(sum_over_ranks(take(self._counters)).cpu(), self._counters)
        values = self._values(counts)
        limits = torch.full(values.shape[1:], self.min_load, dtype=torch.float64)
        limits[-1] = self.min_entropy or 0.0
        has_tokens_L1 = counts.num_tokens_L.unsqueeze(1) > 0  # a layer without any stays as it was
        self._low_steps = torch.where(has_tokens_L1, (self._low_steps + steps) * (values < limits), self._low_steps)
        collapsed, before = self._low_steps >= self.patience, self._reported
        self._reported = collapsed
        self._collapsed_layers = int(collapsed.any(1).sum())
        self._act(trainer, collapsed & ~before, values, steps)
        recovered_L = before.any(1) & ~collapsed.any(1)
        if recovered_L.any():
            names = ", ".join(self._names[i] for i in recovered_L.nonzero()[:, 0].tolist())
            rank_zero_info(f"RouterCollapseGuard, step {trainer.global_step}: recovered from collapse: {names}.")

    def _values(self, counts: RoutingCounts) -> Tensor:
        """Load over the mean load of the layer, and entropy; infinite where it is not judged, [L, E+1]."""
        mean_L = counts.tokens_per_expert_LE.sum(1) / counts.num_experts_L
        loads_LE = counts.tokens_per_expert_LE / mean_L.unsqueeze(1)
        for row_E, (layer, _) in zip(loads_LE, self._watched, strict=True):
            row_E[0 if layer.router.balances_itself else layer.num_experts :] = math.inf
        return torch.cat([loads_LE, counts.metrics()["router_entropy"].unsqueeze(1)], 1)

    def _act(self, trainer: L.Trainer, joined: Tensor, values: Tensor, steps: int) -> None:
        step, collapsed = trainer.global_step, self._reported
        if not collapsed.any():
            return
        raised = self.action == "raise_weight" and self._raise_weight(step)
        if not (joined.any() or raised):
            return
        if self.action == "warn":
            done = "Nothing is done about it."
        elif self.action == "stop":
            trainer.should_stop = True
            done = "Training stops" + _not_before(trainer)
        else:
            assert self._aux_loss is not None
            weight = self._aux_loss.peak.load_balancing
            since = "" if self._last_raise is None else f" since step {self._last_raise}"
            most = ", and max_weight" if math.isclose(weight, self.max_weight) else ""
            changes = self._aux_loss.warmup_steps or self._aux_loss.decay != "none"
            planned = ", before warm-up and decay," if changes else ""
            done = f"The load_balancing weight{planned} is {weight:g}{since}{most}."
        shown = joined if joined.any() else collapsed
        lines = [self._describe(i, shown[i], values[i], steps) for i in shown.any(1).nonzero()[:, 0].tolist()]
        begun = step - int(self._low_steps[collapsed].max())
        weights = "load_balancing, router_z; of the command --aux_loss.load_balancing and so on"
        helps = [f"larger weights of AuxLossCallback ({weights})", "a lower learning rate"]
        if begun > 0:
            helps.append(f"a checkpoint of step {begun} or before")
        rank_zero_warn(
            "\n  ".join([f"RouterCollapseGuard, step {step}: routers have collapsed.", *lines])
            + f"\n{done} What helps: {', '.join(helps)}; see docs/monitoring.md."
        )

    def _raise_weight(self, step: int) -> bool:
        """Raises the weight if it is time, and there is room up to the largest."""
        assert self._aux_loss is not None
        most = self.max_weight / self._aux_loss.load_balancing
        if self._raised >= most or (self._last_raise is not None and step - self._last_raise < self.patience):
            return False
        self._raised = min(self._raised * self.factor, most)
        self._aux_loss.scale_load_balancing(self._raised)
        self._last_raise = step
        return True

    def _describe(self, index: int, shown: Tensor, values: Tensor, steps: int) -> str:
        """One layer in words: what is shown of it, with the values of the last check's steps, and what else is low."""
        num_experts = self._watched[index][0].num_experts
        low = [int(expert) for expert in shown[:-1].nonzero()]
        known = [str(int(expert)) for expert in (self._reported[index] & ~shown)[:-1].nonzero()]
        parts = []
        if low:
            span = _span(self._low_steps[index][:-1][shown[:-1]])
            experts = _list([f"{expert} ({values[expert]:.3g})" for expert in low])
            parts.append(
                f"of {num_experts} experts these have had less than min_load={self.min_load} of the mean load for "
                f"{span} steps (in brackets: in the last {steps}): {experts}"
                + (f"; besides {_list(known)}, as said before" if known else "")
            )
        if shown[-1]:
            parts.append(
                f"router entropy {values[-1]:.3g} in the last {steps} steps, under min_entropy={self.min_entropy} for "
                f"{int(self._low_steps[index, -1])}"
            )
        return f"{self._names[index]}: {'; '.join(parts)}."


def _not_before(trainer: L.Trainer) -> str:
    """What Lightning waits for before it stops."""
    limits = {"min_steps": trainer.min_steps, "min_epochs": trainer.min_epochs}
    reached = {"min_steps": trainer.global_step, "min_epochs": trainer.current_epoch}
    open_ones = [f"{name}={least}" for name, least in limits.items() if least and reached[name] < least]
    return f", not before {' and '.join(open_ones)}." if open_ones else "."


def _span(steps: Tensor) -> str:
    least, most = int(steps.min()), int(steps.max())
    return f"{least}" if least == most else f"{least} to {most}"


def _list(items: Sequence[str]) -> str:
    more = len(items) - _NAMED
    return ", ".join([*items[:_NAMED], *([f"and {more} more"] if more > 0 else [])])

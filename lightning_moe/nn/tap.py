"""Where the router's losses enter the gradient and its statistics leave the layer.

Both happen in backward, because backward reaches a layer exactly once a micro-batch: evaluation has none, and of
the two forwards under activation checkpointing (whichever kind) only one is gone back through. So a loss can
neither be lost nor added twice, and a token can neither be missed nor counted twice.

Shapes: T tokens, D width, K experts per token, E experts, G groups of tokens over which the balance is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_moe.nn.balance import (
    balance_of,
    balance_weights,
    importance_loss,
    load_loss,
    mean_probabilities,
    router_z_loss,
    tokens_per_expert,
)
from lightning_moe.nn.decision import Decision
from lightning_moe.parallel.autograd import in_backward

Scope = Literal["micro_batch", "sequence", "global_batch"]


class LossWeights(NamedTuple):
    """Weights of the losses in the objective of one micro-batch."""

    load_balancing: float = 0.0
    router_z: float = 0.0
    importance: float = 0.0
    load: float = 0.0


@dataclass(frozen=True)
class RoutingStats:
    """What one layer saw in one micro-batch on this rank; detached.

    Args:
        load_balancing_loss: Unweighted scalar.
        router_z_loss: Unweighted scalar.
        importance_loss: Unweighted scalar; 0 where nobody asks for it.
        load_loss: Unweighted scalar; 0 where nobody asks for it or the router has no noise.
        tokens_per_expert_E: Assignments of every expert, before any is dropped.
        num_dropped: Scalar, assignments that found no expert with room.
        num_rerouted: Scalar, assignments that another expert took.
    """

    load_balancing_loss: Tensor
    router_z_loss: Tensor
    importance_loss: Tensor
    load_loss: Tensor
    tokens_per_expert_E: Tensor
    num_dropped: Tensor
    num_rerouted: Tensor


class Watcher(Protocol):
    """Counts what a layer decides, each micro-batch once."""

    def look(self, decision: Decision, /) -> Any:
        """Makes of it what is to be counted: small, detached. Called in every forward, also in a recomputation."""
        ...

    def count(self, looked: Any, /) -> None:
        """Gets what :meth:`look` returned, once a micro-batch."""
        ...


class RoutingTap:
    """A layer's outlet to callbacks. It does nothing, at no cost, until somebody uses it.

    Attributes:
        loss_weights: Weights of the losses in the objective of this micro-batch; ``None`` while nobody has taken
            charge of them.
        loss_gradient: Gradient of what is differentiated with respect to the objective: the loss scale in fp16.
        scope: Over what the shares f_i of the load-balancing loss are taken: the micro-batch of this rank, each of
            its sequences, or all ranks' micro-batches since :meth:`begin_step`.
        sum_over_ranks: How counts are summed over the ranks that have other data, for ``global_batch``.
        importance: Whether the importance loss is taken, too.
        load: Whether the load loss is taken, too.
        balanced: Whether the load is kept even by something else than a loss.
        observers: Called in backward with the :class:`RoutingStats` of each micro-batch.
        watchers: Look in forward, and count in backward.
        eval_watchers: The same where the layer is evaluated, at once. Whoever joins them leaves them in time: the tap
            cannot tell a sanity check from a validation.
    """

    def __init__(self) -> None:
        self.loss_weights: LossWeights | None = None
        self.loss_gradient: Tensor | float = 1.0
        self.scope: Scope = "micro_batch"
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None
        self.importance = False
        self.load = False
        self.balanced = False
        self.observers: list[Callable[[RoutingStats], None]] = []
        self.watchers: list[Watcher] = []
        self.eval_watchers: list[Watcher] = []
        self._counts_of_step: Tensor | int = 0

    @property
    def in_use(self) -> bool:
        """Whether anybody weighs the losses or looks at the statistics."""
        return bool(self.observers or self.watchers) or self.loss_weights is not None

    def begin_step(self) -> None:
        """Forgets the micro-batches of the optimizer step before."""
        self._counts_of_step = 0

    def prepare(self, decision: Decision) -> Callable[[Tensor], Tensor]:
        """Takes the losses, for what it returns to tie them to the layer's output, whose values stay as they are.

        Before tokens are dispatched, so that activation checkpointing, which recomputes up to the last tensor that
        backward needs, has no need to compute and send back the experts' outputs again.

        Args:
            decision: What the layer decided.
        """
        if not decision.tokens.training:
            self._look_on(decision)
            return _untied
        if not (self.in_use and torch.is_grad_enabled()):
            return _untied
        # Nothing here may depend on the weights: those of this micro-batch come after its forward.
        chosen, tokens = decision.chosen, decision.tokens
        length = tokens.sequence_length if self.scope == "sequence" else None
        probs_TE = chosen.scores_TE if chosen.probs_TE is None else chosen.probs_TE
        probs_GE = mean_probabilities(probs_TE, tokens.valid_T, length)
        z = router_z_loss(chosen.logits_TE, tokens.valid_T)
        importance = load = probs_GE.new_zeros(())
        if self.importance:
            importance = importance_loss(
                chosen.topk_scores_TK, chosen.topk_ids_TK, chosen.num_experts, chosen.assigned_TK
            )
        if self.load and chosen.load_TE is not None:
            load = load_loss(chosen.load_TE, tokens.valid_T)
        if length is None:
            counts_GE = decision.tokens_per_expert_E.unsqueeze(0)
        else:
            counts_GE = tokens_per_expert(chosen.topk_ids_TK, chosen.num_experts, chosen.assigned_TK, length)
        stats = RoutingStats(
            z.new_zeros(()),  # the load-balancing loss is known in backward
            z.detach(),
            importance.detach(),
            load.detach(),
            decision.tokens_per_expert_E,
            decision.num_dropped,
            decision.num_rerouted,
        )
        looked = [(watcher, watcher.look(decision)) for watcher in self.watchers]

        def tie(y_TD: Tensor) -> Tensor:
            if not y_TD.requires_grad:
                return y_TD
            tied: Tensor = _Tie.apply(y_TD, probs_GE, z, importance, load, self, counts_GE, stats, looked)
            return tied

        return tie

    def _look_on(self, decision: Decision) -> None:
        if self.eval_watchers and not in_backward():  # where a recomputation would be counted again
            for watcher in self.eval_watchers:
                watcher.count(watcher.look(decision))

    def shares_of(self, counts_GE: Tensor) -> Tensor:
        """The counts over which f is taken. Collective over the ranks with other data for ``global_batch``."""
        if self.scope != "global_batch":
            return counts_GE
        total_GE = counts_GE if self.sum_over_ranks is None else self.sum_over_ranks(counts_GE)
        self._counts_of_step = self._counts_of_step + total_GE
        return self._counts_of_step


def _untied(y_TD: Tensor) -> Tensor:
    return y_TD


class _Tie(torch.autograd.Function):
    """Identity on the output; its backward starts the losses' gradient (as Megatron's MoEAuxLossAutoScaler does)."""

    @staticmethod
    def forward(
        ctx: Any,
        y_TD: Tensor,
        probs_GE: Tensor,
        z: Tensor,
        importance: Tensor,
        load: Tensor,
        tap: RoutingTap,
        counts_GE: Tensor,
        stats: RoutingStats,
        looked: list[tuple[Watcher, Any]],
    ) -> Tensor:
        ctx.tap, ctx.stats, ctx.looked = tap, stats, looked
        ctx.dtypes = z.dtype, importance.dtype, load.dtype
        ctx.probs_GE, ctx.counts_GE = probs_GE.detach(), counts_GE  # not saved_tensors: see prepare
        return y_TD.view_as(y_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        tap: RoutingTap = ctx.tap
        probs_GE, counts_GE = ctx.probs_GE, tap.shares_of(ctx.counts_GE)
        stats = replace(ctx.stats, load_balancing_loss=balance_of(probs_GE, counts_GE))
        for observe in tap.observers:
            observe(stats)
        for watcher, seen in ctx.looked:
            watcher.count(seen)
        weights = tap.loss_weights or LossWeights()
        # full() and not tensor(), which would wait for an accelerator.
        balancing, *others = (torch.full((), w, device=grad_TD.device) * tap.loss_gradient for w in weights)
        return (
            grad_TD,
            (balancing * balance_weights(probs_GE, counts_GE)).to(probs_GE.dtype),
            *(grad.to(dtype) for grad, dtype in zip(others, ctx.dtypes, strict=True)),
            None,
            None,
            None,
            None,
        )

"""Where the router's losses enter the gradient and its statistics leave the layer.

Both happen in backward, because backward reaches a layer exactly once a micro-batch: evaluation has none, and of
the two forwards under activation checkpointing (whichever kind) only one is gone back through. So a loss can
neither be lost nor added twice, and a token can neither be missed nor counted twice.

Shapes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_moe.dispatch.permute import count_ids
from lightning_moe.nn.balance import load_balancing_loss, router_z_loss
from lightning_moe.nn.router import Routing


@dataclass(frozen=True)
class RoutingStats:
    """What one layer saw in one micro-batch on this rank; detached.

    Args:
        load_balancing_loss: Unweighted scalar.
        router_z_loss: Unweighted scalar.
        tokens_per_expert_E: Assignments of every expert, before any is dropped.
        num_dropped: Scalar, assignments over capacity.
    """

    load_balancing_loss: Tensor
    router_z_loss: Tensor
    tokens_per_expert_E: Tensor
    num_dropped: Tensor


class RoutingTap:
    """A layer's outlet to callbacks. It does nothing, at no cost, until somebody uses it.

    Attributes:
        loss_weights: Weights of the load-balancing and the z-loss in the objective of this micro-batch; ``None``
            while nobody has taken charge of them.
        loss_gradient: Gradient of what is differentiated with respect to the objective: the loss scale in fp16.
        observers: Called in backward with the :class:`RoutingStats` of each micro-batch.
    """

    def __init__(self) -> None:
        self.loss_weights: tuple[float, float] | None = None
        self.loss_gradient: Tensor | float = 1.0
        self.observers: list[Callable[[RoutingStats], None]] = []

    @property
    def in_use(self) -> bool:
        """Whether anybody weighs the losses or looks at the statistics."""
        return bool(self.observers) or self.loss_weights is not None

    def __call__(self, routing: Routing) -> Routing:
        """Ties the losses to the selected scores, whose values stay as they are."""
        if not (self.in_use and routing.topk_scores_TK.requires_grad):
            return routing
        losses_2 = torch.stack(
            [load_balancing_loss(routing.scores_TE, routing.topk_ids_TK), router_z_loss(routing.logits_TE)]
        )
        ids_N = routing.topk_ids_TK.reshape(-1)
        values_2 = losses_2.detach()
        stats = RoutingStats(
            values_2[0],
            values_2[1],
            count_ids(ids_N, routing.scores_TE.shape[1]),
            ids_N.new_zeros(()) if routing.kept_TK is None else (~routing.kept_TK).sum(),
        )
        tied_TK = _Tie.apply(routing.topk_scores_TK, losses_2, self, stats)
        return routing._replace(topk_scores_TK=tied_TK)


class _Tie(torch.autograd.Function):
    """Identity on the scores; its backward starts the losses' gradient (as Megatron's MoEAuxLossAutoScaler does)."""

    @staticmethod
    def forward(ctx: Any, scores_TK: Tensor, losses_2: Tensor, tap: RoutingTap, stats: RoutingStats) -> Tensor:
        ctx.tap, ctx.stats = tap, stats
        return scores_TK.view_as(scores_TK)

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, Tensor, None, None]:
        tap: RoutingTap = ctx.tap
        for observe in tap.observers:
            observe(ctx.stats)
        weights_2 = torch.tensor(tap.loss_weights or (0.0, 0.0), dtype=torch.float32, device=grad_TK.device)
        return grad_TK, weights_2 * tap.loss_gradient, None, None

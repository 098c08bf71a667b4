"""Experts choose their tokens.

Shapes: T tokens, D width, E experts, K = E places of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_moe.nn.capacity import expert_capacity
from lightning_moe.nn.router.base import LearnedRouter, Routing, best, closed, register_router
from lightning_moe.nn.tokens import Tokens


@register_router("expert_choice")
class ExpertChoiceRouter(LearnedRouter):
    """Every expert takes the ``capacity_factor * T / E`` tokens that score highest with it (Zhou et al. 2022, eq. 2).

    Load is even by construction; a token may get several experts or none. The weights are softmax scores over the
    experts. The choice is among the tokens of one rank, later ones included: a causal model sees its future.

    Args:
        hidden_size: D.
        config: Reads ``capacity_factor`` and ``eval_capacity_factor``.
    """

    balances_itself = True
    looks_ahead = True
    fits_capacity = True

    @override
    def choose(self, x_TD: Tensor, logits_TE: Tensor, tokens: Tokens) -> Routing:
        scores_TE = logits_TE.softmax(-1)
        choice_TE = logits_TE.detach().log_softmax(-1)  # in the order of the scores, without their underflow to ties
        capacity = self.rows_per_expert(tokens.num_valid, tokens.training).minimum(tokens.num_valid)
        chosen_TE = _chosen_by_experts(choice_TE, tokens.valid_T, capacity)
        # A place for every expert, those that chose the token first; the layer cuts off what no token needs.
        topk_ids_TK = best(closed(choice_TE, ~chosen_TE), self.config.num_experts)
        return Routing(
            logits_TE,
            scores_TE,
            scores_TE.gather(1, topk_ids_TK),
            topk_ids_TK,
            assigned_TK=chosen_TE.gather(1, topk_ids_TK),
        )

    @override
    def rows_per_expert(self, num_tokens: int | Tensor, training: bool) -> Tensor:
        config = self.config
        factor = config.capacity_factor if training else config.eval_capacity_factor or config.capacity_factor
        assert factor is not None  # MoEConfig sees to it
        return expert_capacity(num_tokens, config.num_experts, top_k=1, capacity_factor=factor, min_capacity=1)


def _chosen_by_experts(choice_TE: Tensor, valid_T: Tensor | None, capacity: Tensor) -> Tensor:
    """True where expert e takes token t; among equals the earlier token."""
    if valid_T is not None:
        choice_TE = closed(choice_TE, ~valid_T.unsqueeze(1))
    order_TE = choice_TE.sort(dim=0, descending=True, stable=True).indices
    place_T1 = torch.arange(len(choice_TE), device=choice_TE.device).unsqueeze(1)
    return torch.zeros_like(choice_TE, dtype=torch.bool).scatter(0, order_TE, (place_T1 < capacity).expand_as(order_TE))

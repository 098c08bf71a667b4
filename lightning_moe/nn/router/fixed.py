"""Routers that learn nothing: cheap baselines.

Shapes: T tokens, D width, K experts per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_moe.nn.router.base import CHOICE, Router, Routing, best, register_router
from lightning_moe.nn.tokens import Tokens, hashed_uniform


class FixedRouter(Router):
    """``top_k`` experts by numbers that have nothing to do with the activations, each with the weight 1 / K."""

    balances_itself = True

    @override
    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        num_experts, top_k = self.config.num_experts, self.config.top_k
        choice_TE = self.numbers(tokens)
        topk_ids_TK = best(choice_TE, top_k)
        logits_TE = x_TD.new_zeros((len(x_TD), num_experts), dtype=getattr(torch, self.config.router_dtype))
        return Routing(
            logits_TE,
            torch.full_like(logits_TE, 1 / num_experts),
            torch.full_like(topk_ids_TK, 1 / top_k, dtype=logits_TE.dtype),
            topk_ids_TK,
            choice_TE=choice_TE,
        )

    def numbers(self, tokens: Tokens) -> Tensor:
        """What is chosen by, [T, E]."""
        raise NotImplementedError

    @override
    def weigh(self, routing: Routing, topk_ids_TK: Tensor) -> Tensor:
        return routing.topk_scores_TK


@register_router("hash")
class HashRouter(FixedRouter):
    """A fixed hash of the token's id in the vocabulary (Hash Layers, Roller et al. 2021, random hash).

    The same in every layer and every run. The layer has to be told the ids: ``moe(x, token_ids=ids)``.
    """

    @override
    def numbers(self, tokens: Tokens) -> Tensor:
        if tokens.token_ids_T is None:
            raise ValueError(
                "token_ids=None: router='hash' goes by the ids of the tokens. Call the layer as "
                "moe(x, token_ids=ids), or use router='random'."
            )
        return hashed_uniform(0, [tokens.token_ids_T.long()], self.config.num_experts)


@register_router("random")
class RandomRouter(FixedRouter):
    """Experts by chance: new ones at every pass in training, always the same for a place in the batch at evaluation."""

    @override
    def numbers(self, tokens: Tokens) -> Tensor:
        return tokens.uniform(self.config.num_experts, CHOICE)

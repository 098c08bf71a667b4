"""Every token travels to a rank once, however many of its experts live there, and their sum comes back.

To R ranks, a token with k experts at random goes in ``R (1 - (1 - 1/R)^k)`` rows instead of k: 5.25 instead of 8 for
R = k = 8. (As DeepEP does, DeepSeek 2025, and Tutel's and Megatron's deduplicated dispatch.)

Shapes: T local tokens, K experts per token, E experts, L local experts, W ranks, S rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_moe.dispatch.base import FixedShape
from lightning_moe.dispatch.exchange import ExchangeDispatcher, Outgoing, destinations
from lightning_moe.dispatch.permute import Permutation, plan_permutation, sum_of_rows


class FusedDispatcher(ExchangeDispatcher):
    """One row per token and rank, with all the token's experts and weights."""

    @override
    def outgoing(self, topk_ids_TK: Tensor, kept_TK: Tensor | None, shape: FixedShape | None) -> Outgoing:
        (T, K), W = topk_ids_TK.shape, self.groups.ep_size
        rank_TK, assignments_W = destinations(topk_ids_TK, kept_TK, self.num_experts, W)
        goes_TW = torch.zeros(T, W + 1, dtype=torch.bool, device=rank_TK.device).scatter_(1, rank_TK, True)[:, :W]
        rows_per_rank = None
        if shape is not None:
            rows_per_rank = min(shape.num_tokens, shape.rows_per_expert * len(self.local_experts))
        ranks_TW = torch.arange(W, device=rank_TK.device).expand(T, W)
        # All rows for now; those without a destination stand at the tail and are cut off once the host knows.
        order = plan_permutation(ranks_TW, W, goes_TW, num_rows=T * W, rows_per_expert=rows_per_rank)
        ids_TK = topk_ids_TK if kept_TK is None else torch.where(kept_TK, topk_ids_TK, self.num_experts)
        ids = torch.cat([ids_TK, ids_TK.new_full((1, K), self.num_experts)]).to(torch.int32)
        return Outgoing(order, ids, order.token_R, assignments_W)

    @override
    def entries(self, scores_TK: Tensor) -> Tensor:
        return scores_TK

    @override
    def from_entries(self, values_SM: Tensor, order: Permutation) -> Tensor:
        return sum_of_rows(values_SM.contiguous(), order)

"""Every assignment travels to the rank of its expert and back by an uneven all-to-all: best for large groups.

Shapes: T local tokens, K experts per token, E experts, L local experts, W ranks, N = T*K assignments, S rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_moe.dispatch.base import FixedShape
from lightning_moe.dispatch.exchange import ExchangeDispatcher, Outgoing, destinations
from lightning_moe.dispatch.permute import Permutation, gather, plan_permutation


class AllToAllDispatcher(ExchangeDispatcher):
    """One row per assignment: a token goes to a rank as often as it has experts there."""

    @override
    def outgoing(self, topk_ids_TK: Tensor, kept_TK: Tensor | None, shape: FixedShape | None) -> Outgoing:
        W = self.groups.ep_size
        rank_TK, assignments_W = destinations(topk_ids_TK, kept_TK, self.num_experts, W)
        rows_per_rank = None if shape is None else shape.rows_per_expert * len(self.local_experts)
        # All rows for now; those without a destination stand at the tail and are cut off once the host knows.
        order = plan_permutation(rank_TK, W, kept_TK, num_rows=rank_TK.numel(), rows_per_expert=rows_per_rank)
        ids_N = topk_ids_TK.reshape(-1, 1).to(torch.int32)
        ids = torch.cat([ids_N, ids_N.new_full((1, 1), self.num_experts)])
        return Outgoing(order, ids, order.assignment_R, assignments_W)

    @override
    def entries(self, scores_TK: Tensor) -> Tensor:
        return scores_TK.reshape(-1, 1)

    @override
    def from_entries(self, values_SM: Tensor, order: Permutation) -> Tensor:
        return gather(values_SM, order.row_TK.reshape(-1), is_complete=False).view(order.row_TK.shape)

"""Every rank sees every token of its group, computes its experts' share, and the shares are summed: for small groups.

Shapes: T local tokens, P tokens of the largest rank, W ranks, A = W*P gathered tokens, D width, K experts per
token, E experts, L local experts, R rows for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lightning_moe.dispatch.base import Dispatched, Dispatcher, FixedShape, ep_group_of
from lightning_moe.dispatch.permute import Permutation, count_ids, permute, plan_permutation, unpermute
from lightning_moe.parallel import ExpertGroups
from lightning_moe.parallel.collectives import all_gather, reduce_scatter


@dataclass(frozen=True)
class AllGatherState(Dispatched):
    """Adds the way back.

    Args:
        plan: Rows of this rank's experts among all gathered assignments.
        topk_scores_AK: Weights of all gathered assignments.
        num_tokens: T of this rank.
    """

    plan: Permutation
    topk_scores_AK: Tensor
    num_tokens: int


class AllGatherDispatcher(Dispatcher[AllGatherState]):
    """Gathers tokens and routes over the EP group; weighted partial sums come back by a reduce-scatter."""

    def __init__(self, num_experts: int, groups: ExpertGroups) -> None:
        super().__init__(num_experts, groups)
        self.group = ep_group_of(groups)

    @override
    def dispatch(
        self,
        x_TD: Tensor,
        topk_ids_TK: Tensor,
        topk_scores_TK: Tensor,
        kept_TK: Tensor | None,
        shape: FixedShape | None = None,
    ) -> AllGatherState:
        T, first = x_TD.shape[0], self.local_experts.start
        ids_TK = topk_ids_TK if kept_TK is None else torch.where(kept_TK, topk_ids_TK, self.num_experts)
        if shape is None:
            counts_E = count_ids(ids_TK.reshape(-1), self.num_experts + 1)[: self.num_experts]
            counts_W = all_gather(torch.cat([counts_E.new_full((1,), T), counts_E]), self.group)
            # The layer's one host synchronisation: tokens and rows per expert of every rank.
            counts = counts_W.view(self.groups.ep_size, -1).tolist()
            padding, rows_per_expert = max(count[0] for count in counts) - T, None
            num_rows = sum(sum(count[1 + expert] for expert in self.local_experts) for count in counts)
        else:
            padding, rows_per_expert = shape.num_tokens - T, shape.rows_per_expert * self.groups.ep_size
            num_rows = len(self.local_experts) * rows_per_expert

        x_AD = all_gather(pad(x_TD, (0, 0, 0, padding)), self.group)
        ids_AK = all_gather(pad(ids_TK, (0, 0, 0, padding), value=self.num_experts), self.group)
        scores_AK = all_gather(pad(topk_scores_TK, (0, 0, 0, padding)), self.group)
        local_ids_AK = ids_AK - first
        mine_AK = (local_ids_AK >= 0) & (local_ids_AK < len(self.local_experts))
        plan = plan_permutation(local_ids_AK, len(self.local_experts), mine_AK, num_rows, rows_per_expert)
        return AllGatherState(permute(x_AD, plan), plan.tokens_per_expert_E, plan, scores_AK, T)

    @override
    def combine(self, y_RD: Tensor, state: AllGatherState) -> Tensor:
        shares_AD = unpermute(y_RD, state.topk_scores_AK, state.plan)
        return reduce_scatter(shares_AD, self.group)[: state.num_tokens]

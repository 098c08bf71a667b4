"""Every assignment travels to the rank of its expert and back by an uneven all-to-all: best for large groups.

Shapes: T local tokens, D width, K experts per token, E experts, L local experts, W ranks, R received rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from lightning_moe.dispatch.base import Dispatched, Dispatcher, FixedShape, ep_group_of
from lightning_moe.dispatch.permute import Permutation, permute, plan_permutation, reorder, unpermute
from lightning_moe.parallel import ExpertGroups
from lightning_moe.parallel.collectives import all_gather, all_to_all


@dataclass(frozen=True)
class AllToAllState(Dispatched):
    """Adds the way back.

    Args:
        plan: Order in which this rank's assignments were sent.
        topk_scores_TK: Their weights.
        arrival_R: For every row in order of arrival (by source, then expert), its place in expert order.
        input_splits: Rows that this rank sent, by peer.
        output_splits: Rows that it received, by peer.
    """

    plan: Permutation
    topk_scores_TK: Tensor
    arrival_R: Tensor
    input_splits: list[int]
    output_splits: list[int]


class AllToAllDispatcher(Dispatcher[AllToAllState]):
    """Uneven all-to-all of the assignments; weights stay at home and are applied on return."""

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
    ) -> AllToAllState:
        W, L, rank = self.groups.ep_size, len(self.local_experts), self.groups.ep_rank
        if shape is None:
            # Rows that have no expert stay at the tail of the order, so the plan needs no count of its own yet.
            plan = plan_permutation(topk_ids_TK, self.num_experts, kept_TK, num_rows=topk_ids_TK.numel())
            counts_WWL = all_gather(plan.tokens_per_expert_E, self.group).view(W, W, L)
            splits_WW = counts_WWL.sum(-1).tolist()  # the layer's one host synchronisation: sender x receiver
            input_splits, output_splits = splits_WW[rank], [sender[rank] for sender in splits_WW]
            plan = replace(plan, assignment_R=plan.assignment_R[: sum(input_splits)])
            counts_WL = counts_WWL[:, rank]
        else:
            C = shape.rows_per_expert
            plan = plan_permutation(topk_ids_TK, self.num_experts, kept_TK, rows_per_expert=C)
            input_splits = output_splits = [L * C] * W
            counts_WL = torch.full((W, L), C, device=x_TD.device)

        arrived_RD = all_to_all(permute(x_TD, plan), output_splits, input_splits, self.group)
        expert_of_run_WL = torch.arange(L, device=x_TD.device).repeat(W)
        expert_R = expert_of_run_WL.repeat_interleave(counts_WL.reshape(-1), output_size=sum(output_splits))
        order_R = torch.argsort(expert_R, stable=True)
        return AllToAllState(
            reorder(arrived_RD, order_R),
            counts_WL.sum(0),
            plan,
            topk_scores_TK,
            torch.argsort(order_R),
            input_splits,
            output_splits,
        )

    @override
    def combine(self, y_RD: Tensor, state: AllToAllState) -> Tensor:
        leaving_RD = reorder(y_RD, state.arrival_R)
        returned_RD = all_to_all(leaving_RD, state.input_splits, state.output_splits, self.group)
        return unpermute(returned_RD, state.topk_scores_TK, state.plan)

"""All experts are on this rank: nothing is sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_moe.dispatch.base import Dispatched, Dispatcher, FixedShape, Route
from lightning_moe.dispatch.permute import Permutation, plan_permutation
from lightning_moe.parallel import ExpertGroups
from lightning_moe.parallel.collectives import Pending


@dataclass(frozen=True)
class LocalRoute(Route):
    """Adds the order of the rows."""

    plan: Permutation


class LocalDispatcher(Dispatcher[LocalRoute]):
    """Every token is at its experts already.

    Raises:
        ValueError: the experts are spread over several ranks.
    """

    def __init__(self, num_experts: int, groups: ExpertGroups, wire_dtype: torch.dtype | None = None) -> None:
        super().__init__(num_experts, groups, wire_dtype)
        if groups.ep_size > 1:
            raise ValueError(
                f"dispatcher='local': expert_parallel_size is {groups.ep_size}, and this dispatcher sends nothing "
                "to other ranks. Use dispatcher='auto', or expert_parallel_size=1."
            )

    @override
    def plan(
        self, topk_ids_TK: Tensor, kept_TK: Tensor | None, shape: FixedShape | None = None, num_chunks: int = 1
    ) -> list[LocalRoute]:
        rows_per_expert = None if shape is None else shape.rows_per_expert
        plan = plan_permutation(topk_ids_TK, self.num_experts, kept_TK, rows_per_expert=rows_per_expert)
        return [LocalRoute(len(topk_ids_TK), plan)]  # in one part: nothing is on its way that one could wait for

    @override
    def send(self, x_TD: Tensor, topk_scores_TK: Tensor, route: LocalRoute) -> Pending[Dispatched[LocalRoute]]:
        return Pending(lambda: Dispatched(x_TD, topk_scores_TK, route.plan, route))

    @override
    def combine(self, y_AD: Tensor, state: Dispatched[LocalRoute]) -> Pending[Tensor]:
        return Pending(lambda: y_AD)

"""All experts are on this rank: rows are reordered and nothing is sent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from lightning_moe.dispatch.base import Dispatched, Dispatcher, FixedShape
from lightning_moe.dispatch.permute import Permutation, permute, plan_permutation, unpermute
from lightning_moe.parallel import ExpertGroups


@dataclass(frozen=True)
class LocalState(Dispatched):
    """Adds the way back and the weights."""

    plan: Permutation
    topk_scores_TK: Tensor


class LocalDispatcher(Dispatcher[LocalState]):
    """Reorders tokens by expert on this rank.

    Raises:
        ValueError: the experts are spread over several ranks.
    """

    def __init__(self, num_experts: int, groups: ExpertGroups) -> None:
        super().__init__(num_experts, groups)
        if groups.ep_size > 1:
            raise ValueError(
                f"dispatcher='local': expert_parallel_size is {groups.ep_size}, and this dispatcher sends nothing "
                "to other ranks. Use dispatcher='auto', or expert_parallel_size=1."
            )

    @override
    def dispatch(
        self,
        x_TD: Tensor,
        topk_ids_TK: Tensor,
        topk_scores_TK: Tensor,
        kept_TK: Tensor | None,
        shape: FixedShape | None = None,
    ) -> LocalState:
        plan = plan_permutation(
            topk_ids_TK, self.num_experts, kept_TK, rows_per_expert=shape.rows_per_expert if shape else None
        )
        return LocalState(permute(x_TD, plan), plan.tokens_per_expert_E, plan, topk_scores_TK)

    @override
    def combine(self, y_RD: Tensor, state: LocalState) -> Tensor:
        return unpermute(y_RD, state.topk_scores_TK, state.plan)

"""What every dispatcher is: it moves tokens to the ranks of their experts, and the results back.

Shapes: T local tokens, D width, K experts per token, E experts, L experts on this rank, R rows for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.parallel import ExpertGroups


@dataclass(frozen=True)
class Dispatched:
    """What passes from ``dispatch`` to ``combine``; dispatchers add fields of their own.

    Args:
        x_RD: Rows for this rank's experts, in expert order.
        tokens_per_expert_L: How many of the rows each local expert has.
    """

    x_RD: Tensor
    tokens_per_expert_L: Tensor


@dataclass(frozen=True)
class FixedShape:
    """Sizes that every rank of the EP group pads to, so that they depend on no routing.

    Args:
        num_tokens: Tokens of the rank that has most.
        rows_per_expert: Rows that every expert gets from every rank; assignments are kept within it.
    """

    num_tokens: int
    rows_per_expert: int


State = TypeVar("State", bound=Dispatched)


class Dispatcher(ABC, Generic[State]):
    """Base of all dispatchers. It keeps no state between calls: that is in what ``dispatch`` returns.

    Every rank of the EP group calls ``dispatch`` and ``combine`` equally often, whatever its number of tokens.

    Args:
        num_experts: Routed experts of the layer, over all ranks.
        groups: Where this rank stands.

    Raises:
        ValueError: ``num_experts`` is not divisible by the size of the EP group.
    """

    def __init__(self, num_experts: int, groups: ExpertGroups) -> None:
        self.num_experts = num_experts
        self.groups = groups
        self.local_experts = groups.local_experts(num_experts)

    @abstractmethod
    def dispatch(
        self,
        x_TD: Tensor,
        topk_ids_TK: Tensor,
        topk_scores_TK: Tensor,
        kept_TK: Tensor | None,
        shape: FixedShape | None = None,
    ) -> State:
        """Sends every kept assignment's token to the rank of its expert.

        Args:
            x_TD: Tokens.
            topk_ids_TK: Their experts.
            topk_scores_TK: Weights of the experts' outputs, fp32.
            kept_TK: False where an assignment is dropped; ``None`` is dropless.
            shape: Sizes to pad to, the same on all ranks of the group; ``None`` moves what there is.
        """

    @abstractmethod
    def combine(self, y_RD: Tensor, state: State) -> Tensor:
        """Brings the experts' outputs back and sums them, weighted: [R, D] -> [T, D]."""

    def largest(self, numbers: list[int | Tensor], device: torch.device) -> Tensor:
        """The largest of each number over the ranks of the EP group, in one reduction for which nobody waits."""
        # full() and not tensor(): that would wait for an accelerator.
        largest = torch.stack([n if isinstance(n, Tensor) else torch.full((), n, device=device) for n in numbers])
        if self.groups.ep_group is not None and self.groups.ep_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.groups.ep_group)
        return largest


def ep_group_of(groups: ExpertGroups) -> dist.ProcessGroup:
    """The EP group, for dispatchers that cannot do without one.

    Raises:
        ValueError: there is none.
    """
    if groups.ep_group is None:
        raise ValueError(
            "dispatcher: this one needs an expert-parallel process group, and the layer has none. "
            "Use dispatcher='auto' or 'local', or run under ExpertParallelStrategy."
        )
    return groups.ep_group

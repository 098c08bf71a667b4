"""What every dispatcher is: it moves tokens to the ranks of their experts, and the results back.

Shapes: T local tokens, D width, K experts per token, E experts, L experts on this rank, A tokens that arrive here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from lightning_moe.dispatch.permute import Permutation, plan_permutation
from lightning_moe.parallel import ExpertGroups
from lightning_moe.parallel.collectives import Pending, max_over_ranks


@dataclass(frozen=True)
class Route:
    """Where some consecutive tokens of this rank go; dispatchers add fields of their own.

    Args:
        num_tokens: How many tokens.
    """

    num_tokens: int


@dataclass(frozen=True)
class SizedRoute(Route):
    """Adds how much will arrive, for dispatchers whose messages carry global ids of experts.

    Args:
        num_rows: Assignments that arrive here; ``None`` with a fixed shape.
        rows_per_expert: Rows that each local expert gets with a fixed shape.
    """

    num_rows: int | None
    rows_per_expert: int | None


RouteT = TypeVar("RouteT", bound=Route)
SizedRouteT = TypeVar("SizedRouteT", bound=SizedRoute)


@dataclass(frozen=True)
class Dispatched(Generic[RouteT]):
    """What passes from ``dispatch`` through the experts to ``combine``.

    Args:
        x_AD: Tokens that have experts on this rank.
        weights_AK: Weights of their experts' outputs.
        plan: Which row of which local expert each of their assignments gets.
        route: The way back.
    """

    x_AD: Tensor
    weights_AK: Tensor
    plan: Permutation
    route: RouteT


@dataclass(frozen=True)
class FixedShape:
    """Sizes that every rank of the EP group pads to, so that they depend on no routing.

    Args:
        num_tokens: Tokens of the rank that has most.
        rows_per_expert: Rows that every expert gets from every rank; assignments are kept within it.
    """

    num_tokens: int
    rows_per_expert: int

    def of_chunk(self, num_chunks: int) -> FixedShape:
        """The shape of each of ``num_chunks`` parts; an expert gets a token once at most."""
        if num_chunks == 1:
            return self
        num_tokens = -(-self.num_tokens // num_chunks)
        return FixedShape(num_tokens, min(self.rows_per_expert, num_tokens))


class Dispatcher(ABC, Generic[RouteT]):
    """Base of all dispatchers. It keeps no state between calls: that is in what they return.

    Every rank of the EP group calls its methods equally often, whatever its number of tokens.

    Args:
        num_experts: Routed experts of the layer, over all ranks.
        groups: Where this rank stands.
        wire_dtype: What activations and their gradients are converted to for the way; ``None`` leaves them as they
            are.

    Raises:
        ValueError: ``num_experts`` is not divisible by the size of the EP group.
    """

    def __init__(self, num_experts: int, groups: ExpertGroups, wire_dtype: torch.dtype | None = None) -> None:
        self.num_experts = num_experts
        self.groups = groups
        self.wire_dtype = wire_dtype
        self.local_experts = groups.local_experts(num_experts)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Copies of a model, as for weight averaging, share it: it has no state, and a process group has no copy."""
        return self

    @abstractmethod
    def plan(
        self,
        topk_ids_TK: Tensor,
        kept_TK: Tensor | None,
        shape: FixedShape | None = None,
        num_chunks: int = 1,
    ) -> list[RouteT]:
        """Agrees with the other ranks on who sends how much to whom.

        Args:
            topk_ids_TK: The tokens' experts.
            kept_TK: False where an assignment is dropped; ``None`` is dropless.
            shape: Sizes to pad to, the same on all ranks of the group; ``None`` moves what there is.
            num_chunks: Parts in which the tokens travel, so that experts compute while the next are on their way.

        Returns:
            A route for every part; fewer where there is nothing to gain, but equally many on all ranks.
        """

    @abstractmethod
    def send(self, x_TD: Tensor, topk_scores_TK: Tensor, route: RouteT) -> Pending[Dispatched[RouteT]]:
        """Sends every kept assignment's token to the rank of its expert.

        Args:
            x_TD: The route's tokens.
            topk_scores_TK: Weights of their experts' outputs, fp32.
            route: Of :meth:`plan`.
        """

    @abstractmethod
    def combine(self, y_AD: Tensor, state: Dispatched[RouteT]) -> Pending[Tensor]:
        """Brings the experts' outputs back, and sums them for each of the route's tokens: [A, D] -> [T, D]."""

    def dispatch(self, x_TD: Tensor, topk_scores_TK: Tensor, routes: list[RouteT]) -> Iterator[Dispatched[RouteT]]:
        """Sends all tokens, part after part, and hands each part out with the next already on its way."""
        tokens, scores = [x_TD], [topk_scores_TK]
        if len(routes) > 1:
            sizes = [route.num_tokens for route in routes]
            tokens, scores = [*x_TD.split(sizes)], [*topk_scores_TK.split(sizes)]
        parts = zip(tokens, scores, routes, strict=True)
        first = self.send(*next(parts))  # now, and not when the iterator is first asked

        def arriving(pending: Pending[Dispatched[RouteT]]) -> Iterator[Dispatched[RouteT]]:
            for part in parts:
                following = self.send(*part)
                yield pending.wait()
                pending = following
            yield pending.wait()

        return arriving(first)

    def largest(self, numbers: list[int | Tensor], device: torch.device) -> Tensor:
        """The largest of each number over the ranks of the EP group, in one reduction for which nobody waits."""
        # full() and not tensor(): that would wait for an accelerator.
        largest = torch.stack([n if isinstance(n, Tensor) else torch.full((), n, device=device) for n in numbers])
        if self.groups.ep_group is not None and self.groups.ep_size > 1:
            max_over_ranks(largest, self.groups.ep_group, self.groups.meter)
        return largest

    def on_wire(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which activations of this dtype travel."""
        return self.wire_dtype or dtype


def arrived(
    route: SizedRouteT, local_experts: range, x_AD: Tensor, weights_AK: Tensor, ids_AK: Tensor
) -> Dispatched[SizedRouteT]:
    """What came, in the order of this rank's experts; ids of other ranks' experts get no row."""
    local_ids_AK = ids_AK.long() - local_experts.start
    mine_AK = (local_ids_AK >= 0) & (local_ids_AK < len(local_experts))
    plan = plan_permutation(local_ids_AK, len(local_experts), mine_AK, route.num_rows, route.rows_per_expert)
    return Dispatched(x_AD, weights_AK, plan, route)


def chunk_sizes(num_tokens: int, num_chunks: int) -> list[int]:
    """Sizes of ``num_chunks`` parts, as even as can be; the last ones may be empty.

    >>> chunk_sizes(7, 3), chunk_sizes(1, 2)
    ([3, 2, 2], [1, 0])
    """
    return [num_tokens // num_chunks + (i < num_tokens % num_chunks) for i in range(num_chunks)]


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

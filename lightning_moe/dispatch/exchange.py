"""What the dispatchers that send rows to the ranks of their experts have in common.

Shapes: T local tokens, D width, K experts per token, E experts, L local experts, W ranks, S rows that this rank sends,
M experts that one row is for, A rows that arrive here.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lightning_moe.dispatch.base import (
    Dispatched,
    Dispatcher,
    FixedShape,
    SizedRoute,
    arrived,
    chunk_sizes,
    ep_group_of,
)
from lightning_moe.dispatch.message import Field, pack, pack_rows, unpack
from lightning_moe.dispatch.permute import Permutation, count_ids, rows_of_tokens, sum_of_rows
from lightning_moe.parallel import ExpertGroups
from lightning_moe.parallel.collectives import Pending, all_gather, start_all_to_all, travel


@dataclass(frozen=True)
class Outgoing:
    """The rows that a rank sends.

    Args:
        order: The rows, ordered by destination; its "experts" are ranks.
        ids: Experts that each entry of a table is for, [..., M] int32; E stands for none, as in the last entry.
        entry_S: The entry of every row.
        assignments_W: Assignments that go to every rank.
    """

    order: Permutation
    ids: Tensor
    entry_S: Tensor
    assignments_W: Tensor


@dataclass(frozen=True)
class ExchangeRoute(SizedRoute):
    """Adds who sends how much to whom.

    Args:
        outgoing: What this rank sends.
        input_splits: Rows that it sends, by peer.
        output_splits: Rows that it receives, by peer.
    """

    outgoing: Outgoing
    input_splits: list[int]
    output_splits: list[int]


class ExchangeDispatcher(Dispatcher[ExchangeRoute]):
    """Sends rows, each with the ids and weights of its experts in the same message, by an all-to-all."""

    def __init__(self, num_experts: int, groups: ExpertGroups, wire_dtype: torch.dtype | None = None) -> None:
        super().__init__(num_experts, groups, wire_dtype)
        self.group, self.meter = ep_group_of(groups), groups.meter

    @abstractmethod
    def outgoing(self, topk_ids_TK: Tensor, kept_TK: Tensor | None, shape: FixedShape | None) -> Outgoing:
        """The rows to send; with no shape, those without a destination stand behind the others."""

    @abstractmethod
    def entries(self, scores_TK: Tensor) -> Tensor:
        """The weights in the order of ``Outgoing.ids``, [..., M]."""

    @abstractmethod
    def from_entries(self, values_SM: Tensor, order: Permutation) -> Tensor:
        """What came back for every row's experts, by token: [S, M] -> [T, K]."""

    @override
    def plan(
        self, topk_ids_TK: Tensor, kept_TK: Tensor | None, shape: FixedShape | None = None, num_chunks: int = 1
    ) -> list[ExchangeRoute]:
        sizes = chunk_sizes(len(topk_ids_TK), num_chunks)
        ids = topk_ids_TK.split(sizes)
        kept = [None] * num_chunks if kept_TK is None else kept_TK.split(sizes)
        if shape is not None:
            return [self._fixed(*chunk, shape.of_chunk(num_chunks)) for chunk in zip(ids, kept, strict=True)]
        leaving = [self.outgoing(*chunk, None) for chunk in zip(ids, kept, strict=True)]
        counts = torch.stack([torch.stack([o.order.tokens_per_expert_E, o.assignments_W]) for o in leaving])
        # The layer's one host synchronisation: sender x chunk x (rows, assignments) x receiver.
        counts_of = all_gather(counts.unsqueeze(0), self.group, self.meter).tolist()
        rank, routes = self.groups.ep_rank, []
        for i, (size, chunk) in enumerate(zip(sizes, leaving, strict=True)):
            input_splits = counts_of[rank][i][0]
            order = replace(chunk.order, assignment_R=chunk.order.assignment_R[: sum(input_splits)])
            outgoing = replace(chunk, order=order, entry_S=chunk.entry_S[: sum(input_splits)])
            output_splits = [sender[i][0][rank] for sender in counts_of]
            num_rows = sum(sender[i][1][rank] for sender in counts_of)
            routes.append(ExchangeRoute(size, num_rows, None, outgoing, input_splits, output_splits))
        return routes

    def _fixed(self, topk_ids_TK: Tensor, kept_TK: Tensor | None, shape: FixedShape) -> ExchangeRoute:
        outgoing, W = self.outgoing(topk_ids_TK, kept_TK, shape), self.groups.ep_size
        splits = [len(outgoing.entry_S) // W] * W
        return ExchangeRoute(len(topk_ids_TK), None, shape.rows_per_expert * W, outgoing, splits, splits)

    @override
    def send(self, x_TD: Tensor, topk_scores_TK: Tensor, route: ExchangeRoute) -> Pending[Dispatched[ExchangeRoute]]:
        order, ids, entry_S = route.outgoing.order, route.outgoing.ids, route.outgoing.entry_S
        dtype, M = x_TD.dtype, ids.shape[1]
        fields = [
            Field(x_TD.shape[1], self.on_wire(dtype)),
            Field(M, topk_scores_TK.dtype),
            Field(M, torch.int32),
        ]

        def there(x_TD: Tensor, scores_TK: Tensor) -> Pending[tuple[Tensor, ...]]:
            token_S, entries = order.token_R, self.entries(scores_TK)
            if order.has_gaps:  # they take the entry that is for no expert, and whatever token
                x_TD = x_TD if len(x_TD) else x_TD.new_zeros(1, x_TD.shape[1])
                token_S, entries = token_S.clamp(max=len(x_TD) - 1), pad(entries, (0, 0, 0, 1))
            message = pack_rows(fields, x_TD, token_S, entries, ids, entry_S)
            arriving = start_all_to_all(message, route.output_splits, route.input_splits, self.group, self.meter)
            return arriving.then(lambda message: received(*unpack(fields, message)))

        def received(x_AD: Tensor, scores_AM: Tensor, ids_AM: Tensor) -> tuple[Tensor, ...]:
            return x_AD.to(dtype), scores_AM, ids_AM

        def back(grad_x_AD: Tensor, grad_scores_AM: Tensor) -> Pending[tuple[Tensor, ...]]:
            message = pack(fields[:2], [grad_x_AD, grad_scores_AM])
            returning = start_all_to_all(message, route.input_splits, route.output_splits, self.group, self.meter)
            return returning.then(lambda message: returned(*unpack(fields[:2], message)))

        def returned(grad_x_SD: Tensor, grad_scores_SM: Tensor) -> tuple[Tensor, ...]:
            return sum_of_rows(grad_x_SD.to(dtype), order), self.from_entries(grad_scores_SM, order)

        return travel(there, back, x_TD, topk_scores_TK).then(
            lambda tensors: arrived(route, self.local_experts, *tensors)
        )

    @override
    def combine(self, y_AD: Tensor, state: Dispatched[ExchangeRoute]) -> Pending[Tensor]:
        route, order, dtype = state.route, state.route.outgoing.order, y_AD.dtype
        wire_dtype = self.on_wire(dtype)

        def there(y_AD: Tensor) -> Pending[tuple[Tensor, ...]]:
            rows = y_AD.to(wire_dtype)
            arriving = start_all_to_all(rows, route.input_splits, route.output_splits, self.group, self.meter)
            return arriving.then(lambda y_SD: (sum_of_rows(y_SD.to(dtype), order),))

        def back(grad_TD: Tensor) -> Pending[tuple[Tensor, ...]]:
            rows = rows_of_tokens(grad_TD, order).to(wire_dtype)
            returning = start_all_to_all(rows, route.output_splits, route.input_splits, self.group, self.meter)
            return returning.then(lambda grad_AD: (grad_AD.to(dtype),))

        return travel(there, back, y_AD).then(lambda tensors: tensors[0])


def destinations(topk_ids_TK: Tensor, kept_TK: Tensor | None, num_experts: int, ep_size: int) -> tuple[Tensor, Tensor]:
    """The rank of every assignment, [T, K], and how many go to each, [W]; rank W where it is dropped."""
    rank_TK = topk_ids_TK // (num_experts // ep_size)
    if kept_TK is not None:
        rank_TK = torch.where(kept_TK, rank_TK, ep_size)
    return rank_TK, count_ids(rank_TK.reshape(-1), ep_size + 1)[:ep_size]

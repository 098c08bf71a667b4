"""Every rank sees every token of its group, computes its experts' share, and the shares are summed: for small groups.

Shapes: T local tokens, P tokens of the largest rank, W ranks, A = W*P gathered tokens, D width, K experts per
token, E experts, L local experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
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
from lightning_moe.dispatch.message import Field, pack, unpack
from lightning_moe.dispatch.permute import count_ids
from lightning_moe.parallel import ExpertGroups
from lightning_moe.parallel.collectives import (
    Pending,
    all_gather,
    start_all_gather,
    start_all_to_all,
    start_reduce_scatter,
    travel,
)


@dataclass(frozen=True)
class AllGatherRoute(SizedRoute):
    """Adds what is gathered.

    Args:
        ids_PK: Experts of this rank's tokens, padded; E stands for none.
    """

    ids_PK: Tensor


class AllGatherDispatcher(Dispatcher[AllGatherRoute]):
    """Gathers tokens and routes over the EP group; the ranks' shares come back and are summed."""

    def __init__(self, num_experts: int, groups: ExpertGroups, wire_dtype: torch.dtype | None = None) -> None:
        super().__init__(num_experts, groups, wire_dtype)
        self.group, self.meter = ep_group_of(groups), groups.meter
        # Gloo's reduce-scatter is an all-reduce, of twice the bytes; no group at all is for tests of names.
        self.can_reduce_scatter = isinstance(self.group, dist.ProcessGroup) and dist.get_backend(self.group) != "gloo"

    @override
    def plan(
        self, topk_ids_TK: Tensor, kept_TK: Tensor | None, shape: FixedShape | None = None, num_chunks: int = 1
    ) -> list[AllGatherRoute]:
        E, W = self.num_experts, self.groups.ep_size
        sizes = chunk_sizes(len(topk_ids_TK), num_chunks)
        ids_TK = topk_ids_TK if kept_TK is None else torch.where(kept_TK, topk_ids_TK, E)
        chunks = ids_TK.split(sizes)
        if shape is None:
            counts_E = [count_ids(ids.reshape(-1), E + 1)[:E] for ids in chunks]
            counts = torch.stack([torch.cat([c.new_full((1,), n), c]) for c, n in zip(counts_E, sizes, strict=True)])
            # The layer's one host synchronisation: sender x chunk x (tokens, rows of every expert).
            counts_of = all_gather(counts.unsqueeze(0), self.group, self.meter).tolist()
            lengths = [max(sender[i][0] for sender in counts_of) for i in range(num_chunks)]
            mine = slice(1 + self.local_experts.start, 1 + self.local_experts.stop)
            num_rows = [sum(sum(sender[i][mine]) for sender in counts_of) for i in range(num_chunks)]
            rows_per_expert = None
        else:
            chunk = shape.of_chunk(num_chunks)
            lengths, num_rows = [chunk.num_tokens] * num_chunks, [None] * num_chunks
            rows_per_expert = chunk.rows_per_expert * W
        return [
            AllGatherRoute(size, rows, rows_per_expert, pad(ids, (0, 0, 0, length - size), value=E))
            for size, ids, length, rows in zip(sizes, chunks, lengths, num_rows, strict=True)
        ]

    @override
    def send(self, x_TD: Tensor, topk_scores_TK: Tensor, route: AllGatherRoute) -> Pending[Dispatched[AllGatherRoute]]:
        dtype, T = x_TD.dtype, route.num_tokens
        P, K = route.ids_PK.shape
        fields = [Field(x_TD.shape[1], self.on_wire(dtype)), Field(K, topk_scores_TK.dtype), Field(K, torch.int32)]

        def there(x_TD: Tensor, scores_TK: Tensor) -> Pending[tuple[Tensor, ...]]:
            tables = [pad(x_TD, (0, 0, 0, P - T)), pad(scores_TK, (0, 0, 0, P - T)), route.ids_PK]
            message = pack(fields, tables)
            return start_all_gather(message, self.group, self.meter).then(
                lambda message: received(*unpack(fields, message))
            )

        def received(x_AD: Tensor, scores_AK: Tensor, ids_AK: Tensor) -> tuple[Tensor, ...]:
            return x_AD.to(dtype), scores_AK, ids_AK

        def back(grad_x_AD: Tensor, grad_scores_AK: Tensor) -> Pending[tuple[Tensor, ...]]:
            grads = self._start_sum(grad_x_AD, T, self.on_wire(dtype)), self._start_sum(grad_scores_AK, T)
            return Pending(lambda: (grads[0].wait(), grads[1].wait()))

        return travel(there, back, x_TD, topk_scores_TK).then(
            lambda tensors: arrived(route, self.local_experts, *tensors)
        )

    @override
    def combine(self, y_AD: Tensor, state: Dispatched[AllGatherRoute]) -> Pending[Tensor]:
        T, P, dtype = state.route.num_tokens, len(state.route.ids_PK), y_AD.dtype

        def there(y_AD: Tensor) -> Pending[tuple[Tensor, ...]]:
            return self._start_sum(y_AD, T, self.on_wire(dtype)).then(lambda y_TD: (y_TD,))

        def back(grad_TD: Tensor) -> Pending[tuple[Tensor, ...]]:
            padded = pad(grad_TD, (0, 0, 0, P - T)).to(self.on_wire(dtype))
            return start_all_gather(padded, self.group, self.meter).then(lambda grad_AD: (grad_AD.to(dtype),))

        return travel(there, back, y_AD).then(lambda tensors: tensors[0])

    def _start_sum(self, shares_AD: Tensor, num_tokens: int, wire_dtype: torch.dtype | None = None) -> Pending[Tensor]:
        """Sums the ranks' shares of this rank's tokens, [A, D] -> [T, D]."""
        dtype, W = shares_AD.dtype, self.groups.ep_size
        wire_dtype, wide = wire_dtype or dtype, torch.promote_types(dtype, torch.float32)
        if self.can_reduce_scatter and wire_dtype == wide:
            return start_reduce_scatter(shares_AD, self.group, self.meter).then(lambda sum_PD: sum_PD[:num_tokens])
        # In bf16 a reduce-scatter would round every partial sum: as many bytes travel, and are summed in fp32 here.
        splits = [len(shares_AD) // W] * W
        arriving = start_all_to_all(shares_AD.to(wire_dtype), splits, splits, self.group, self.meter)

        def summed(shares_AD: Tensor) -> Tensor:
            shares_WPD = shares_AD.view(W, -1, shares_AD.shape[1])[:, :num_tokens]
            return shares_WPD.sum(0, dtype=wide).to(dtype)

        return arriving.then(summed)

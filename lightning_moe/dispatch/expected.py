"""How many bytes a layer is to send, by its dispatcher, before it has sent any. Pure functions.

Shapes: T local tokens, D width, K experts per token, E experts, L local experts, W ranks, S rows that a rank sends to
others, M experts that one row is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any

import torch

from lightning_moe.dispatch.allgather import AllGatherDispatcher
from lightning_moe.dispatch.alltoall import AllToAllDispatcher
from lightning_moe.dispatch.base import Dispatcher, FixedShape
from lightning_moe.dispatch.deep_ep import DeepEPDispatcher, HopperDispatcher
from lightning_moe.dispatch.fused import FusedDispatcher
from lightning_moe.dispatch.local import LocalDispatcher
from lightning_moe.dispatch.message import Field, layout


@dataclass(frozen=True)
class ExpectedBytes:
    """Bytes from one rank to others, a mean; what stays on the rank does not count.

    Args:
        forward: In a forward pass.
        backward: In its backward pass.
    """

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


NOTHING = ExpectedBytes(0.0, 0.0)


def expected_bytes(
    dispatcher: Dispatcher[Any],
    num_tokens: int,
    hidden_size: int,
    top_k: int,
    dtype: torch.dtype,
    shape: FixedShape | None = None,
    weights_dtype: torch.dtype = torch.float32,
) -> ExpectedBytes:
    """What a rank sends to others for one layer and one micro-batch, where every rank has as many tokens.

    Experts are taken to be drawn evenly, K different ones for a token, and nothing to be dropped: where a capacity
    drops, tokens keep to few groups of experts (``group_limited``) or are padding, less is sent. It is all that the
    dispatcher sends, counts, ids and weights included, in one part; ``overlap_chunks`` adds counts. What activation
    checkpointing sends again, and the few bytes by which ranks agree on a capacity, do not count.

    ``local`` sends nothing, ``allgather`` all tokens to all ranks, ``alltoall`` a token once for each of its experts,
    ``fused`` once to each rank that has any: to ``(W - 1) (1 - C(E - L, K) / C(E, K))`` others. DeepEP's kernels send
    the same rows as ``fused``, in bfloat16.

    Args:
        dispatcher: Knows the group, the experts and the dtype on the wire.
        num_tokens: T.
        hidden_size: D.
        top_k: K.
        dtype: Of the layer's input.
        shape: Sizes to pad to, where the layer has ``pad_to_capacity``.
        weights_dtype: Of the experts' weights: float64 with ``router_dtype="float64"``.

    Raises:
        ValueError: the dispatcher is one of your own, of which nobody here knows what it sends.
    """
    if isinstance(dispatcher, LocalDispatcher) or dispatcher.groups.ep_size == 1:
        return NOTHING
    x = Field(hidden_size, dispatcher.on_wire(dtype))
    if isinstance(dispatcher, AllGatherDispatcher):
        return _of_allgather(dispatcher, num_tokens, x, Field(top_k, weights_dtype), shape)
    if isinstance(dispatcher, AllToAllDispatcher):
        rows = _rows_of_alltoall(dispatcher, num_tokens, top_k, shape)
        return _of_exchange(dispatcher, rows, x, Field(1, weights_dtype), shape)
    if isinstance(dispatcher, FusedDispatcher | HopperDispatcher | DeepEPDispatcher):
        rows = _rows_of_fused(dispatcher, num_tokens, top_k, shape)
        return _of_exchange(dispatcher, rows, x, Field(top_k, weights_dtype), shape)
    raise ValueError(
        f"dispatcher={type(dispatcher).__name__}: what it sends is not known here. Use allgather, alltoall, fused or "
        "local, or count what yours sends."
    )


def _rows_of_alltoall(dispatcher: Dispatcher[Any], num_tokens: int, top_k: int, shape: FixedShape | None) -> float:
    W = dispatcher.groups.ep_size
    if shape is not None:
        return (W - 1) * shape.rows_per_expert * len(dispatcher.local_experts)
    return num_tokens * top_k * (W - 1) / W


def _rows_of_fused(dispatcher: Dispatcher[Any], num_tokens: int, top_k: int, shape: FixedShape | None) -> float:
    E, L, W = dispatcher.num_experts, len(dispatcher.local_experts), dispatcher.groups.ep_size
    if shape is not None:
        return (W - 1) * min(shape.num_tokens, shape.rows_per_expert * L)
    without_rank = comb(E - L, top_k) / comb(E, top_k)  # of all sets of experts, those with none of a given rank
    return num_tokens * (W - 1) * (1 - without_rank)


def _of_exchange(
    dispatcher: Dispatcher[Any], rows: float, x: Field, weights: Field, shape: FixedShape | None
) -> ExpectedBytes:
    W = dispatcher.groups.ep_size
    _, there = layout([x, weights, Field(weights.width, torch.int32)])
    _, grads = layout([x, weights])
    outputs = x.width * x.dtype.itemsize
    counts = 2 * W * torch.int64.itemsize * (W - 1) if shape is None else 0  # rows and assignments, by peer
    return ExpectedBytes(rows * (there + outputs) + counts, rows * (outputs + grads))


def _of_allgather(
    dispatcher: Dispatcher[Any], num_tokens: int, x: Field, weights: Field, shape: FixedShape | None
) -> ExpectedBytes:
    W = dispatcher.groups.ep_size
    rows = (W - 1) * (num_tokens if shape is None else shape.num_tokens)
    _, there = layout([x, weights, Field(weights.width, torch.int32)])
    outputs = x.width * x.dtype.itemsize
    counts = (1 + dispatcher.num_experts) * torch.int64.itemsize * (W - 1) if shape is None else 0
    grads_of_weights = weights.width * weights.dtype.itemsize
    return ExpectedBytes(rows * (there + outputs) + counts, rows * (2 * outputs + grads_of_weights))

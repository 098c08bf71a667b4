"""How many rows an expert takes, and which assignments are dropped above that. Pure functions.

Shapes: T tokens of one rank, K experts per token, N = T*K assignments, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.dispatch.permute import count_ids


def expert_capacity(
    num_tokens: int | Tensor, num_experts: int, top_k: int, capacity_factor: float, min_capacity: int
) -> Tensor:
    """Rows that one expert takes from one rank.

    ``max(min_capacity, ceil(capacity_factor * num_tokens * top_k / num_experts))``
    (GShard, Lepikhin et al. 2020, section 2.2; Switch Transformer, Fedus et al. 2021, eq. 3).

    Args:
        num_tokens: Tokens per rank; a tensor keeps the result on its device without waiting for it.
        num_experts: E.
        top_k: K.
        capacity_factor: Multiple of the even share.
        min_capacity: Lower bound, in rows.

    Returns:
        A scalar int64 tensor.

    >>> expert_capacity(num_tokens=10, num_experts=4, top_k=2, capacity_factor=1.25, min_capacity=4).item()
    7
    """
    even_share = torch.as_tensor(num_tokens).double() * top_k / num_experts
    return torch.ceil(capacity_factor * even_share).long().clamp(min=min_capacity)


def keep_within_capacity(topk_ids_TK: Tensor, priority_TK: Tensor, num_experts: int, capacity: int | Tensor) -> Tensor:
    """Which assignments have room: each expert keeps its ``capacity`` assignments of highest priority.

    Equal priorities keep token order, so that the result does not depend on the device.

    Args:
        topk_ids_TK: Expert of every assignment.
        priority_TK: Higher stays; the router's score for ``drop_priority="score"``.
        num_experts: E.
        capacity: Rows per expert.

    Returns:
        True where the assignment is kept, [T, K].

    >>> ids, scores = torch.tensor([[0], [0], [0], [1]]), torch.tensor([[0.5], [0.9], [0.7], [0.1]])
    >>> keep_within_capacity(ids, scores, num_experts=2, capacity=2).flatten().tolist()
    [False, True, True, True]
    """
    ids_N = topk_ids_TK.reshape(-1)
    by_priority_N = torch.argsort(priority_TK.detach().reshape(-1), descending=True, stable=True)
    order_N = by_priority_N[torch.argsort(ids_N[by_priority_N], stable=True)]
    counts_E = count_ids(ids_N, num_experts)
    first_row_E = counts_E.cumsum(0) - counts_E
    place_N = torch.arange(ids_N.numel(), device=ids_N.device) - first_row_E[ids_N[order_N]]
    kept_N = torch.empty_like(ids_N, dtype=torch.bool)
    kept_N[order_N] = place_N < capacity
    return kept_N.view_as(topk_ids_TK)

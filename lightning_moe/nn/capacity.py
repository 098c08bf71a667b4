"""How many rows an expert takes, and what becomes of assignments above that. Pure functions.

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
    rows = capacity_factor * torch.as_tensor(num_tokens).double() * top_k / num_experts
    # 1.1 * 50 is a little above 55 in binary, and not 56.
    return torch.ceil(rows * (1 - 1e-12)).long().clamp(min=min_capacity)


def keep_within_capacity(
    topk_ids_TK: Tensor,
    priority_TK: Tensor,
    num_experts: int,
    capacity: int | Tensor,
    assigned_TK: Tensor | None = None,
) -> Tensor:
    """Which assignments have room: each expert keeps its ``capacity`` assignments of highest priority.

    Equal priorities keep token order, so that the result does not depend on the device.

    Args:
        topk_ids_TK: Expert of every assignment.
        priority_TK: Higher stays; the router's score for ``drop_priority="score"``.
        num_experts: E.
        capacity: Rows per expert; a tensor [E] gives each expert its own.
        assigned_TK: False where there is no assignment; ``None`` is nowhere.

    Returns:
        True where the assignment is kept, [T, K].

    >>> ids, scores = torch.tensor([[0], [0], [0], [1]]), torch.tensor([[0.5], [0.9], [0.7], [0.1]])
    >>> keep_within_capacity(ids, scores, num_experts=2, capacity=2).flatten().tolist()
    [False, True, True, True]
    """
    if assigned_TK is not None:
        topk_ids_TK = torch.where(assigned_TK, topk_ids_TK, num_experts)  # an expert that nobody has, without room
    ids_N = topk_ids_TK.reshape(-1)
    by_priority_N = torch.argsort(priority_TK.detach().reshape(-1), descending=True, stable=True)
    order_N = by_priority_N[torch.argsort(ids_N[by_priority_N], stable=True)]
    counts_E = count_ids(ids_N, num_experts + 1)
    first_row_E = counts_E.cumsum(0) - counts_E
    place_N = torch.arange(ids_N.numel(), device=ids_N.device) - first_row_E[ids_N[order_N]]
    capacity_E = torch.as_tensor(capacity, device=ids_N.device).expand(num_experts)
    capacity_E = torch.cat([capacity_E, capacity_E.new_zeros(1)])
    kept_N = torch.empty_like(ids_N, dtype=torch.bool)
    kept_N[order_N] = place_N < capacity_E[ids_N[order_N]]
    return kept_N.view_as(topk_ids_TK)


def move_to_next_expert(
    topk_ids_TK: Tensor,
    kept_TK: Tensor,
    choice_TE: Tensor,
    priority_TK: Tensor,
    capacity: int | Tensor,
    assigned_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gives assignments over capacity to their token's next-best expert that has room.

    In rounds: every assignment without an expert asks the best one that has room and that its token has not got yet,
    and every expert takes the assignments of highest priority. In a round either all find a place or an expert
    becomes full, so that there are E of them at most. Nobody who has a place loses it.

    Args:
        topk_ids_TK: The experts that were selected.
        kept_TK: True where the selected expert has room.
        choice_TE: What a token prefers experts by; among equals the lower id.
        priority_TK: What experts prefer assignments by; among equals the earlier token.
        capacity: Rows per expert.
        assigned_TK: False where there is no assignment; ``None`` is nowhere.

    Returns:
        The experts, [T, K], and True where the assignment has a row. Only what no expert had room for is dropped, and
        stands under the expert that was selected.

    >>> ids, kept = torch.tensor([[0], [0]]), torch.tensor([[True], [False]])
    >>> choice = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    >>> move_to_next_expert(ids, kept, choice, torch.ones(2, 1), capacity=1)
    (tensor([[0],
            [2]]), tensor([[True],
            [True]]))
    """
    num_experts, top_k = choice_TE.shape[1], topk_ids_TK.shape[1]
    order_TE = choice_TE.detach().sort(dim=-1, descending=True, stable=True).indices
    experts_TE = torch.arange(num_experts, device=order_TE.device).expand_as(order_TE)
    rank_TE = torch.empty_like(order_TE).scatter_(1, order_TE, experts_TE)  # 0 is the token's favourite
    ids_TK = topk_ids_TK
    homeless_TK = ~kept_TK if assigned_TK is None else ~kept_TK & assigned_TK
    for _ in range(num_experts):
        taken_E = count_ids(torch.where(kept_TK, ids_TK, num_experts).reshape(-1), num_experts + 1)[:num_experts]
        room_E = (capacity - taken_E).clamp(min=0)
        # The experts that were selected count as taken by their token even where they were full.
        closed_TE = torch.zeros_like(rank_TE, dtype=torch.bool).scatter_(1, ids_TK, True) | (room_E == 0)
        asked = rank_TE.masked_fill(closed_TE, num_experts).topk(top_k, dim=1, largest=False, sorted=True)
        # A token's first homeless assignment asks its best open expert, the second the next, and so on.
        nth_TK = (homeless_TK.cumsum(1) - 1).clamp(min=0)
        asks_TK = homeless_TK & (asked.values.gather(1, nth_TK) < num_experts)
        if not ids_TK.is_cuda and not asks_TK.any():
            break  # on a GPU nobody waits for the answer: the rounds that are left change nothing
        asked_TK = asked.indices.gather(1, nth_TK)
        found_TK = keep_within_capacity(asked_TK, priority_TK, num_experts, room_E, asks_TK)
        ids_TK = torch.where(found_TK, asked_TK, ids_TK)
        kept_TK, homeless_TK = kept_TK | found_TK, homeless_TK & ~found_TK
    return ids_TK, kept_TK

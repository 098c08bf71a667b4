"""What the metrics compute. Pure functions, none of which waits for the device.

A layer that saw no tokens gets the value that raises no alarm, since nothing is known of it: an even load, no dead
experts, undecided routers, nothing dropped. Means over layers leave it out.

Shapes: T tokens, K experts per token, E experts (of the layer with most), L layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EVEN = 1.0
"""Load imbalance and router entropy where there are no tokens."""


def load_imbalance(counts_LE: Tensor, num_experts_L: Tensor | None = None) -> Tensor:
    """Largest over mean load: 1 is even, E / K the most that top-K routing can do.

    Args:
        counts_LE: Tokens of every expert; 0 in columns that a layer has no expert for.
        num_experts_L: Experts of every layer; ``None`` is E in all.

    Returns:
        [L], float64; 1 where a layer saw no tokens.

    >>> load_imbalance(torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0], [3, 1, 0, 0]]), torch.tensor([4, 4, 2]))
    tensor([1.0000, 4.0000, 1.5000], dtype=torch.float64)
    """
    counts_LE = counts_LE.double()
    total_L = counts_LE.sum(1)
    ratio_L = counts_LE.amax(1) * _sizes(counts_LE, num_experts_L) / total_L.clamp(min=1)
    return torch.where(total_L > 0, ratio_L, EVEN)


def load_cv(counts_LE: Tensor, num_experts_L: Tensor | None = None) -> Tensor:
    """Coefficient of variation of the load: its standard deviation (over all experts, no correction) / its mean.

    Args:
        counts_LE: Tokens of every expert; 0 in columns that a layer has no expert for.
        num_experts_L: Experts of every layer; ``None`` is E in all.

    Returns:
        [L], float64; 0 is even, and where a layer saw no tokens.

    >>> load_cv(torch.tensor([[2, 2, 2, 2], [4, 4, 0, 0], [3, 1, 0, 0]]), torch.tensor([4, 4, 2]))
    tensor([0.0000, 1.0000, 0.5000], dtype=torch.float64)
    """
    counts_LE = counts_LE.double()
    num_experts_L = _sizes(counts_LE, num_experts_L)
    mean_L = counts_LE.sum(1) / num_experts_L
    is_expert_LE = expert_mask(num_experts_L, counts_LE.shape[1])
    deviation_LE = (counts_LE - mean_L.unsqueeze(1)).masked_fill(~is_expert_LE, 0)
    std_L = (deviation_LE.square().sum(1) / num_experts_L).sqrt()
    return torch.where(mean_L > 0, std_L / mean_L.clamp(min=1e-300), 0.0)


def dead_experts(counts_LE: Tensor, num_experts_L: Tensor | None = None) -> Tensor:
    """How many experts got no token.

    Args:
        counts_LE: Tokens of every expert; 0 in columns that a layer has no expert for.
        num_experts_L: Experts of every layer; ``None`` is E in all.

    Returns:
        [L], float64; 0 where the layer saw no tokens: an expert is dead where others are not.

    >>> dead_experts(torch.tensor([[2, 0, 2, 2], [3, 1, 0, 0], [0, 0, 0, 0]]), torch.tensor([4, 2, 4]))
    tensor([1., 0., 0.], dtype=torch.float64)
    """
    alive_L = (counts_LE > 0).sum(1)
    return torch.where(alive_L > 0, _sizes(counts_LE, num_experts_L) - alive_L, 0.0)


def fraction(part_L: Tensor, total_L: Tensor, empty: float = 0.0) -> Tensor:
    """``part / total``, float64; ``empty`` where the total is 0.

    >>> fraction(torch.tensor([1, 0]), torch.tensor([4, 0]))
    tensor([0.2500, 0.0000], dtype=torch.float64)
    """
    total_L = total_L.double()
    return torch.where(total_L > 0, part_L.double() / torch.where(total_L > 0, total_L, 1.0), empty)


def mean_over_layers(values_L: Tensor, seen_L: Tensor, empty: float = 0.0) -> Tensor:
    """Mean over the layers that saw tokens, a scalar.

    Args:
        values_L: One value per layer.
        seen_L: Tokens of each layer, or True where it saw some.
        empty: The value where none did.

    >>> mean_over_layers(torch.tensor([1.0, 7.0, 3.0]), torch.tensor([10, 0, 10]))
    tensor(2.)
    """
    seen_L = seen_L > 0
    num_seen = seen_L.sum()
    mean = values_L.masked_fill(~seen_L, 0).sum() / num_seen.clamp(min=1)
    return torch.where(num_seen > 0, mean, empty)


def token_entropy(probs_TE: Tensor) -> Tensor:
    """Entropy of the router's probabilities for each token, divided by log(E): 1 is undecided, 0 is certain.

    Args:
        probs_TE: Router probabilities, which sum to 1 over the experts.

    Returns:
        [T], in fp32 or wider; 0 where there is one expert only.

    >>> token_entropy(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    tensor([1.0000, 0.5000, 0.0000])
    """
    return _entropy_terms(probs_TE).sum(1) / _max_entropy(probs_TE)


def entropy_sum(probs_TE: Tensor, valid_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of the tokens' entropies, and the number of tokens: what adds up over micro-batches and ranks.

    Args:
        probs_TE: Router probabilities, which sum to 1 over the experts.
        valid_T: False where a token is padding; ``None`` is nowhere.

    Returns:
        Scalars, float64 and int64.
    """
    terms_TE = _entropy_terms(probs_TE)
    if valid_T is None:
        num_tokens = torch.full((), len(probs_TE), device=probs_TE.device)
    else:
        terms_TE, num_tokens = torch.where(valid_T, terms_TE.sum(1), 0), valid_T.sum()
    return terms_TE.sum(dtype=torch.float64) / _max_entropy(probs_TE), num_tokens


def router_entropy(probs_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean of :func:`token_entropy` over the tokens, a float64 scalar; 1 where there are none.

    Args:
        probs_TE: Router probabilities, which sum to 1 over the experts.
        valid_T: False where a token is padding; ``None`` is nowhere.
    """
    return fraction(*entropy_sum(probs_TE, valid_T), empty=EVEN)


def is_assigned(topk_ids_TK: Tensor, assigned_TK: Tensor | None = None, valid_T: Tensor | None = None) -> Tensor:
    """True where a place of a token holds an assignment, [T, K].

    Args:
        topk_ids_TK: Selected experts.
        assigned_TK: False where there is no assignment; ``None`` is nowhere.
        valid_T: False where a token is padding; ``None`` is nowhere.
    """
    mask_TK = torch.ones_like(topk_ids_TK, dtype=torch.bool) if assigned_TK is None else assigned_TK
    return mask_TK if valid_T is None else mask_TK & valid_T.unsqueeze(1)


def chosen_together(topk_ids_TK: Tensor, num_experts: int, mask_TK: Tensor) -> Tensor:
    """How many tokens chose both experts of a pair, [E, E] int64; on the diagonal, how many chose the one.

    Args:
        topk_ids_TK: Selected experts.
        num_experts: E.
        mask_TK: True where a place holds an assignment.

    >>> ids = torch.tensor([[0, 1], [0, 2], [1, 0]])
    >>> chosen_together(ids, 3, torch.ones(3, 2, dtype=torch.bool))
    tensor([[3, 2, 1],
            [2, 2, 0],
            [1, 0, 1]])
    """
    ids_TK = torch.where(mask_TK, topk_ids_TK, num_experts)
    chose_TE = torch.zeros(len(ids_TK), num_experts + 1, dtype=torch.float64, device=ids_TK.device)
    chose_TE = chose_TE.scatter(1, ids_TK, 1.0)[:, :-1]
    return (chose_TE.T @ chose_TE).long()  # exact: autocast leaves float64 alone


def affinity(pairs_LEE: Tensor) -> Tensor:
    """Share of the tokens that chose expert i which also chose j, from the counts of :func:`chosen_together`.

    Returns:
        [L, E, E], float64; the diagonal is 1, and rows of experts that nobody chose are 0.
    """
    return fraction(pairs_LEE, pairs_LEE.diagonal(dim1=-2, dim2=-1).unsqueeze(-1))


def expert_mask(num_experts_L: Tensor, num_columns: int) -> Tensor:
    """True where a layer has an expert, [L, E]."""
    return torch.arange(num_columns, device=num_experts_L.device) < num_experts_L.unsqueeze(1)


def _entropy_terms(probs_TE: Tensor) -> Tensor:
    """-p log(p) of every probability, in fp32 or wider: 0 where p is."""
    probs_TE = probs_TE.detach().to(torch.promote_types(probs_TE.dtype, torch.float32))
    # Not torch.special.entr, which takes four times as long on a CPU.
    return probs_TE.clamp(min=torch.finfo(probs_TE.dtype).tiny).log_().mul_(probs_TE).neg_()


def _max_entropy(probs_TE: Tensor) -> float:
    """log(E); above 0 where there is one expert only."""
    return max(math.log(probs_TE.shape[1]), 1e-12)


def _sizes(counts_LE: Tensor, num_experts_L: Tensor | None) -> Tensor:
    if num_experts_L is None:
        num_experts_L = torch.full((len(counts_LE),), counts_LE.shape[1], device=counts_LE.device)
    return num_experts_L.double()

"""Auxiliary losses of the router. Pure functions, unweighted, in fp32, or in float64 where they are given that.

Shapes: T tokens, K experts per token, E experts, G groups of tokens over which a loss is taken, S tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.dispatch.permute import count_ids


def load_balancing_loss(
    scores_TE: Tensor,
    topk_ids_TK: Tensor,
    assigned_TK: Tensor | None = None,
    valid_T: Tensor | None = None,
    sequence_length: int | None = None,
) -> Tensor:
    """``E * sum_i f_i * p_i`` (Switch Transformer, Fedus et al. 2021, eq. 4); 1.0 when uniform, whatever top_k.

    f_i is the share of the T*K assignments that chose expert i, before any is dropped, and carries no gradient;
    p_i is the mean score of expert i over the tokens.

    Args:
        scores_TE: Router probabilities, which sum to 1 over the experts.
        topk_ids_TK: Selected experts.
        assigned_TK: False where there is no assignment; ``None`` is nowhere.
        valid_T: False where a token is padding; ``None`` is nowhere.
        sequence_length: Take the loss over every so many tokens, and the mean over those that are not all padding
            (DeepSeek-V3, eqs. 17 to 20); ``None`` is over all tokens at once.

    Returns:
        A scalar; 0 for no tokens, still connected to ``scores_TE``.
    """
    probs_GE = mean_probabilities(scores_TE, valid_T, sequence_length)
    counts_GE = tokens_per_expert(topk_ids_TK, scores_TE.shape[1], assigned_TK, sequence_length)
    return balance_of(probs_GE, counts_GE)


def mean_probabilities(probs_TE: Tensor, valid_T: Tensor | None = None, sequence_length: int | None = None) -> Tensor:
    """The load-balancing loss's p: mean over the tokens of every group that are no padding, [G, E]."""
    probs_GSE = _in_groups(_at_least_fp32(probs_TE), sequence_length)
    if valid_T is None:
        return probs_GSE.sum(1) / max(probs_GSE.shape[1], 1)
    valid_GS1 = _in_groups(valid_T.unsqueeze(1), sequence_length)
    return probs_GSE.masked_fill(~valid_GS1, 0).sum(1) / valid_GS1.sum(1).clamp(min=1)


def tokens_per_expert(
    topk_ids_TK: Tensor, num_experts: int, assigned_TK: Tensor | None = None, sequence_length: int | None = None
) -> Tensor:
    """Assignments of every expert in every group, before any is dropped, [G, E] int64."""
    if assigned_TK is not None:
        topk_ids_TK = torch.where(assigned_TK, topk_ids_TK, num_experts)
    ids_GN = _in_groups(topk_ids_TK, sequence_length).flatten(1)
    offset_G1 = torch.arange(len(ids_GN), device=ids_GN.device).unsqueeze(1) * (num_experts + 1)
    counts = count_ids((ids_GN + offset_G1).reshape(-1), len(ids_GN) * (num_experts + 1))
    return counts.view(len(ids_GN), num_experts + 1)[:, :num_experts]


def balance_of(probs_GE: Tensor, counts_GE: Tensor) -> Tensor:
    """The load-balancing loss from its two factors, ``E * sum_i f_i * p_i``, as the mean over groups with tokens."""
    return (balance_weights(probs_GE.detach(), counts_GE) * probs_GE).sum()


def balance_weights(probs_GE: Tensor, counts_GE: Tensor) -> Tensor:
    """Gradient of the load-balancing loss with respect to p, [G, E]: ``E * f_i``, over the groups with tokens."""
    share_GE = counts_GE / counts_GE.sum(1, keepdim=True).clamp(min=1)
    num_groups = (probs_GE.sum(1) > 0).sum().clamp(min=1)  # padding has no probabilities
    return (counts_GE.shape[1] * share_GE / num_groups).to(probs_GE.dtype)


def router_z_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2`` (ST-MoE, Zoph et al. 2022, eq. 5).

    Args:
        logits_TE: Raw router outputs.
        valid_T: False where a token is padding; ``None`` is nowhere.

    Returns:
        A scalar; 0 for no tokens, still connected to ``logits_TE``.
    """
    if logits_TE.shape[0] == 0:
        return logits_TE.sum()
    squares_T = torch.logsumexp(_at_least_fp32(logits_TE), -1).square()
    if valid_T is None:
        return squares_T.mean()
    return squares_T.masked_fill(~valid_T, 0).sum() / valid_T.sum().clamp(min=1)


def importance_loss(
    topk_scores_TK: Tensor, topk_ids_TK: Tensor, num_experts: int, assigned_TK: Tensor | None = None
) -> Tensor:
    """``CV(Importance)^2``, of the sums over the batch of every expert's weights (Shazeer et al. 2017, eqs. 6 and 7).

    Args:
        topk_scores_TK: Weights of the selected experts.
        topk_ids_TK: Selected experts.
        num_experts: E.
        assigned_TK: False where there is no assignment; ``None`` is nowhere.

    Returns:
        A scalar; 0 when even, and for no tokens.
    """
    if assigned_TK is not None:
        topk_scores_TK = topk_scores_TK.masked_fill(~assigned_TK, 0)
    # Dense and summed in token order: adding at indices has no fixed order on a GPU.
    topk_scores_TK = _at_least_fp32(topk_scores_TK)
    zeros_TE = topk_scores_TK.new_zeros(len(topk_scores_TK), num_experts)
    return _squared_variation(zeros_TE.scatter(1, topk_ids_TK, topk_scores_TK).sum(0))


def load_loss(load_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """``CV(Load)^2``, of the expected number of tokens of every expert (Shazeer et al. 2017, eqs. 10 and 11).

    Args:
        load_TE: Probability of every expert to be selected under new noise (eq. 9).
        valid_T: False where a token is padding; ``None`` is nowhere.

    Returns:
        A scalar; 0 when even, and for no tokens.
    """
    if valid_T is not None:
        load_TE = load_TE.masked_fill(~valid_T.unsqueeze(1), 0)
    return _squared_variation(_at_least_fp32(load_TE).sum(0))


def _squared_variation(values_E: Tensor) -> Tensor:
    """Variance over squared mean, both over all experts; 0 where all are 0."""
    return values_E.var(correction=0) / values_E.mean().square().clamp(min=1e-10)


def _at_least_fp32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _in_groups(values: Tensor, sequence_length: int | None) -> Tensor:
    """[T, ...] -> [G, S, ...]."""
    if sequence_length is None:
        return values.unsqueeze(0)
    return values.unflatten(0, (-1, sequence_length)) if len(values) else values.unsqueeze(0)

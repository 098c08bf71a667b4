"""Auxiliary losses of the router. Pure functions in fp32, unweighted.

Shapes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.dispatch.permute import count_ids


def load_balancing_loss(scores_TE: Tensor, topk_ids_TK: Tensor) -> Tensor:
    """``E * sum_i f_i * p_i`` (Switch Transformer, Fedus et al. 2021, eq. 4); 1.0 when uniform, whatever top_k.

    f_i is the share of the T*K assignments that chose expert i, before any is dropped, and carries no gradient;
    p_i is the mean score of expert i over the tokens.

    Args:
        scores_TE: Router probabilities.
        topk_ids_TK: Selected experts.

    Returns:
        A scalar; 0 for no tokens, still connected to ``scores_TE``.
    """
    num_tokens, num_experts = scores_TE.shape
    if num_tokens == 0:
        return scores_TE.sum()
    share_E = count_ids(topk_ids_TK.reshape(-1), num_experts) / topk_ids_TK.numel()
    return num_experts * (share_E * scores_TE.float().mean(0)).sum()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2`` (ST-MoE, Zoph et al. 2022, eq. 5).

    Args:
        logits_TE: Raw router outputs.

    Returns:
        A scalar; 0 for no tokens, still connected to ``logits_TE``.
    """
    if logits_TE.shape[0] == 0:
        return logits_TE.sum()
    return torch.logsumexp(logits_TE.float(), dim=-1).square().mean()

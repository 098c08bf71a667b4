"""Balanced assignment of tokens to experts.

Shapes: T tokens, D width, K experts per token, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_moe.nn.router.base import Routing, best, register_router
from lightning_moe.nn.router.topk import TopKRouter
from lightning_moe.nn.tokens import Tokens


@register_router("sinkhorn")
class SinkhornRouter(TopKRouter):
    """In training, the best experts by a transport plan that gives every expert an even share of the tokens.

    Sinkhorn iterations on ``exp(logits)`` over the tokens of one rank (S-BASE, Clark et al. 2022, section 4); the
    weights are those of ``topk``. At evaluation it is ``topk``.

    Args:
        hidden_size: D.
        config: As for ``topk``, without ``expert_bias`` and ``score_before_topk``; and reads
            ``sinkhorn_tolerance`` and ``sinkhorn_iterations``.
    """

    balances_itself = True

    @override
    def choose(self, x_TD: Tensor, logits_TE: Tensor, tokens: Tokens) -> Routing:
        routing = super().choose(x_TD, logits_TE, tokens)
        if not tokens.training:
            return routing
        plan_TE = sinkhorn(
            logits_TE.detach(), tokens.valid_T, self.config.sinkhorn_tolerance, self.config.sinkhorn_iterations
        )
        # The even plan of one token alone is the same for all experts up to rounding.
        plan_TE = torch.where(tokens.num_valid > 1, plan_TE, logits_TE.detach())
        topk_ids_TK = best(plan_TE, self.config.top_k)
        return routing._replace(
            topk_ids_TK=topk_ids_TK, topk_scores_TK=self.weigh(routing, topk_ids_TK), choice_TE=plan_TE
        )


def sinkhorn(
    logits_TE: Tensor, valid_T: Tensor | None = None, tolerance: float = 1e-3, max_iterations: int = 100
) -> Tensor:
    """Logarithm of the plan that is closest to ``exp(logits)`` among those with even shares (Cuturi 2013, alg. 1).

    Every token sends 1, and every expert receives T / E. Rows and columns are scaled in turn, in logarithms, so that
    no logit is too large.

    Args:
        logits_TE: Minus infinity puts an expert out of a token's reach.
        valid_T: False where a row is padding, which sends nothing.
        tolerance: Stops where every expert receives its share up to this fraction.
        max_iterations: And after so many rounds at the latest.

    Returns:
        Logarithms, [T, E].

    >>> plan = sinkhorn(torch.tensor([[2.0, 0.0], [1.0, 0.0]])).exp()
    >>> plan.sum(1), plan.argmax(1)  # both prefer expert 0, and the second gives way
    (tensor([1., 1.]), tensor([0, 1]))
    """
    num_tokens, num_experts = logits_TE.shape
    sending_TE = logits_TE
    even = torch.full((), float(num_tokens), dtype=logits_TE.dtype, device=logits_TE.device)
    if valid_T is not None:
        sending_TE = logits_TE.masked_fill(~valid_T.unsqueeze(1), float("-inf"))
        even = valid_T.sum().to(logits_TE.dtype)
    log_share = even.clamp(min=1).log() - math.log(num_experts)
    column_E = torch.zeros(num_experts, dtype=logits_TE.dtype, device=logits_TE.device)
    row_T1 = _finite(-torch.logsumexp(logits_TE, dim=1, keepdim=True))
    is_even = torch.zeros((), dtype=torch.bool, device=logits_TE.device)
    for _ in range(max_iterations):
        scaled_E = _finite(log_share - torch.logsumexp(sending_TE + row_T1, dim=0))
        is_even = is_even | ((column_E - scaled_E).expm1().abs().amax() <= tolerance)
        if not is_even.is_cuda and is_even:
            break  # on a GPU nobody waits for the answer: what has converged just stays
        column_E = torch.where(is_even, column_E, scaled_E)
        row_T1 = torch.where(is_even, row_T1, _finite(-torch.logsumexp(logits_TE + column_E, dim=1, keepdim=True)))
    return logits_TE + row_T1 + column_E


def _finite(scale: Tensor) -> Tensor:
    """No scaling where there is nothing to scale: an expert or a token that nobody can reach."""
    return torch.where(scale.isfinite(), scale, 0)

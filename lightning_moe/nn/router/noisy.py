"""Routers that explore by chance in training.

Shapes: T tokens, D width, K experts per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_moe.config import MoEConfig
from lightning_moe.nn.router.base import (
    CHOICE,
    LearnedRouter,
    Routing,
    best,
    closed,
    register_router,
)
from lightning_moe.nn.tokens import Tokens


@register_router("gshard")
class GShardRouter(LearnedRouter):
    """The best expert, and a second that is drawn with a probability proportional to its weight (GShard).

    The draw is from the other experts by their softmax scores, as in fairseq and DeepSpeed; Lepikhin et al. 2020,
    algorithm 1, takes the second-best instead and skips it by the same chance. At evaluation the second-best is taken.
    The two weights are divided by their sum.

    Args:
        hidden_size: D.
        config: ``top_k`` is 2.
    """

    @override
    def choose(self, x_TD: Tensor, logits_TE: Tensor, tokens: Tokens) -> Routing:
        scores_TE = logits_TE.softmax(-1)
        topk_ids_TK = best(logits_TE, 2)
        if tokens.training:
            drawn_TE = logits_TE.detach() + tokens.gumbel(logits_TE.shape[1], CHOICE)
            is_first_TE = torch.zeros_like(drawn_TE, dtype=torch.bool).scatter(1, topk_ids_TK[:, :1], True)
            topk_ids_TK = torch.cat([topk_ids_TK[:, :1], best(closed(drawn_TE, is_first_TE), 1)], dim=1)
        routing = Routing(logits_TE, scores_TE, scores_TE, topk_ids_TK)
        return routing._replace(topk_scores_TK=self.weigh(routing, topk_ids_TK))

    @override
    def weigh(self, routing: Routing, topk_ids_TK: Tensor) -> Tensor:
        return routing.logits_TE.gather(1, topk_ids_TK).softmax(-1)  # the scores over their sum, without underflow


@register_router("noisy_topk")
class NoisyTopKRouter(LearnedRouter):
    """Learned noise on the logits, then a softmax over the ``top_k`` best (Shazeer et al. 2017, eqs. 3 to 5).

    ``H_i = (x @ weight.T)_i + N(0, 1) * softplus((x @ noise_weight.T)_i)``; without noise at evaluation. It goes with
    the importance and load losses, :class:`~lightning_moe.AuxLossCallback`'s ``importance`` and ``load``.

    Args:
        hidden_size: D.
        config: Reads ``top_k``.

    Attributes:
        noise_weight: [E, D], zero at the start.
    """

    estimates_load = True

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__(hidden_size, config)
        self.noise_weight = nn.Parameter(torch.zeros(config.num_experts, hidden_size))

    @override
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "noise_weight"):  # not yet where the base class calls this
            nn.init.zeros_(self.noise_weight)

    @override
    def choose(self, x_TD: Tensor, logits_TE: Tensor, tokens: Tokens) -> Routing:
        noisy_TE, load_TE = logits_TE, None
        if tokens.training:
            spread_TE = nn.functional.softplus(self.project(x_TD, self.noise_weight))
            noisy_TE = logits_TE + tokens.normal(logits_TE.shape[1], CHOICE) * spread_TE
            load_TE = _chance_of_selection(logits_TE, noisy_TE, spread_TE, self.config.top_k)
        topk_ids_TK = best(noisy_TE, self.config.top_k)
        return Routing(
            logits_TE,
            noisy_TE.softmax(-1),
            noisy_TE.gather(1, topk_ids_TK).softmax(-1),
            topk_ids_TK,
            choice_TE=noisy_TE,
            load_TE=load_TE,
        )

    @override
    def weigh(self, routing: Routing, topk_ids_TK: Tensor) -> Tensor:
        assert routing.choice_TE is not None
        return routing.choice_TE.gather(1, topk_ids_TK).softmax(-1)


def _chance_of_selection(logits_TE: Tensor, noisy_TE: Tensor, spread_TE: Tensor, top_k: int) -> Tensor:
    """``P(x, i)``: expert i is among the best under new noise on i alone (eqs. 8 and 9).

    Phi((logit_i - k-th highest noisy logit of the others) / spread_i).
    """
    if top_k == logits_TE.shape[1]:
        return torch.ones_like(logits_TE)
    sorted_TE = noisy_TE.sort(dim=-1, descending=True, stable=True).values
    last_in_T1, first_out_T1 = sorted_TE[:, top_k - 1 : top_k], sorted_TE[:, top_k : top_k + 1]
    # Without expert i the k-th highest is the (k+1)-th of all where i is in, and the k-th where it is not.
    threshold_TE = torch.where(noisy_TE > first_out_T1, first_out_T1, last_in_T1)
    # Bounds far from where anything happens, so that neither -inf - -inf nor a noise that has died out gives NaN.
    low = torch.finfo(logits_TE.dtype).min / 4
    z_TE = (logits_TE.clamp(min=low) - threshold_TE.clamp(min=low)) / spread_TE.clamp(min=1e-6)
    return torch.special.ndtr(z_TE.clamp(-30, 30))

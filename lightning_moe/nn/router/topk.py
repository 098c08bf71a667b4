"""Routers that take each token's best experts by score.

Shapes: T tokens, D width, K experts per token, E experts, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_moe.config import MoEConfig
from lightning_moe.nn.router.base import LearnedRouter, Routing, best, closed, register_router
from lightning_moe.nn.tokens import Tokens

_TINY = 1e-20
"""Lower bound of what weights are divided by: scores may all underflow. DeepSeek adds the same."""


@register_router("topk")
class TopKRouter(LearnedRouter):
    """The ``top_k`` experts of highest score (Mixtral, Jiang et al. 2024; DeepSeek-V3's scores for ``sigmoid``).

    Args:
        hidden_size: D.
        config: Reads ``top_k``, ``score_function``, ``score_before_topk``, ``normalize_topk``, ``route_scale`` and
            ``expert_bias``.

    Attributes:
        expert_bias: Added to the scores for the selection and never to the weights (Wang et al. 2024); fp32
            whatever the precision of the module, in the checkpoint; ``None`` where the config has none.
    """

    expert_bias: Tensor | None

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__(hidden_size, config)
        # float(): deepspeed.zero.Init overrides dtype=.
        bias_E = torch.zeros(config.num_experts).float() if self.config.expert_bias else None
        self.register_buffer("expert_bias", bias_E)

    @override
    def reset_parameters(self) -> None:
        super().reset_parameters()
        bias_E = getattr(self, "expert_bias", None)  # not yet there where the base class calls this
        if bias_E is not None:
            nn.init.zeros_(bias_E)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None and self.expert_bias is not None and self.expert_bias.dtype != before.dtype:
            # In bf16 steps of 0.001 would be lost on a bias of 0.5.
            self.expert_bias = before.to(self.expert_bias.device)
        return self

    @override
    def choose(self, x_TD: Tensor, logits_TE: Tensor, tokens: Tokens) -> Routing:
        scores_TE = _score(logits_TE, self.config)
        choice_TE = logits_TE  # in the order of the scores, and exact where those underflow to ties
        if self.expert_bias is not None:
            choice_TE = (scores_TE if self.config.score_before_topk else logits_TE) + self.expert_bias
        topk_ids_TK = best(self.within_reach(choice_TE, scores_TE), self.config.top_k)
        return Routing(
            logits_TE,
            scores_TE,
            _weigh(logits_TE, scores_TE, topk_ids_TK, self.config),
            topk_ids_TK,
            probs_TE=scores_TE if self.config.score_function == "softmax" else _divided_by_sum(scores_TE),
            choice_TE=choice_TE.detach(),
        )

    def within_reach(self, choice_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """Lets a subclass put experts out of a token's reach, at minus infinity."""
        return choice_TE

    @override
    def weigh(self, routing: Routing, topk_ids_TK: Tensor) -> Tensor:
        return _weigh(routing.logits_TE, routing.scores_TE, topk_ids_TK, self.config)


@register_router("group_limited")
class GroupLimitedRouter(TopKRouter):
    """The best experts of a token's best groups, so that it travels to few places (DeepSeek-V3, section 2.1.2).

    Experts stand in ``num_groups`` groups of neighbours; a group is as good as its two best experts together, and
    the ``topk_groups`` best are kept (DeepSeek-V2 takes the single best expert of a group instead). With
    ``overflow="next_expert"`` an assignment over capacity may leave the token's groups.

    Args:
        hidden_size: D.
        config: As for ``topk``, and reads ``num_groups`` and ``topk_groups``.
    """

    @override
    def within_reach(self, choice_TE: Tensor, scores_TE: Tensor) -> Tensor:
        worth_TE = scores_TE.detach() if self.expert_bias is None else scores_TE.detach() + self.expert_bias
        worth_TGE = worth_TE.unflatten(1, (self.config.num_groups, -1))
        worth_TG = worth_TGE.sort(dim=-1, descending=True).values[..., :2].sum(-1)
        closed_TG = torch.ones_like(worth_TG, dtype=torch.bool)
        closed_TG.scatter_(1, best(worth_TG, self.config.topk_groups), False)
        return closed(choice_TE, closed_TG.unsqueeze(-1).expand_as(worth_TGE).flatten(1))


@register_router("switch")
class SwitchRouter(LearnedRouter):
    """One expert per token, weighed by its softmax score (Switch Transformer, Fedus et al. 2021, eqs. 1 and 2).

    Args:
        hidden_size: D.
        config: ``jitter`` is the paper's multiplicative one.
    """

    @override
    def choose(self, x_TD: Tensor, logits_TE: Tensor, tokens: Tokens) -> Routing:
        scores_TE = logits_TE.softmax(-1)
        ids_TK = best(logits_TE, self.config.top_k)
        return Routing(logits_TE, scores_TE, scores_TE.gather(1, ids_TK), ids_TK)


def _score(logits_TE: Tensor, config: MoEConfig) -> Tensor:
    return logits_TE.sigmoid() if config.score_function == "sigmoid" else logits_TE.softmax(-1)


def _weigh(logits_TE: Tensor, scores_TE: Tensor, topk_ids_TK: Tensor, config: MoEConfig) -> Tensor:
    if config.score_before_topk:
        weights_TK = scores_TE.gather(1, topk_ids_TK)
    else:
        weights_TK = _score(logits_TE.gather(1, topk_ids_TK), config)
    if config.normalize_topk:
        weights_TK = _divided_by_sum(weights_TK)
    return weights_TK * config.route_scale if config.route_scale != 1 else weights_TK


def _divided_by_sum(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True).clamp(min=_TINY)

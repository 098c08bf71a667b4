"""What a layer decided for the tokens of one micro-batch, for those who count.

Shapes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_moe.nn.balance import tokens_per_expert
from lightning_moe.nn.router import Routing
from lightning_moe.nn.tokens import Tokens


@dataclass(frozen=True)
class Decision:
    """A router's choice and what became of it, on this rank. Counts are without gradient, and wait for no device.

    Args:
        chosen: What the router chose.
        placed: What became of it under a capacity: other experts where theirs were full, and ``kept_TK``.
        tokens: The tokens.
    """

    chosen: Routing
    placed: Routing
    tokens: Tokens

    @property
    def num_experts(self) -> int:
        """E."""
        return self.chosen.num_experts

    @property
    def probs_TE(self) -> Tensor:
        """Router probabilities, which sum to 1 over the experts."""
        probs_TE = self.chosen.scores_TE if self.chosen.probs_TE is None else self.chosen.probs_TE
        return probs_TE.detach()

    @property
    def placed_ids_TK(self) -> Tensor:
        """As ``chosen.topk_ids_TK``, with the expert that an assignment was moved to in place of a full one."""
        ids_TK = self.placed.topk_ids_TK
        cut_off = self.chosen.topk_ids_TK[:, ids_TK.shape[1] :]  # places that no token needs, where experts choose
        return torch.cat([ids_TK, cut_off], 1) if cut_off.shape[1] else ids_TK

    @property
    def kept_TK(self) -> Tensor | None:
        """False where an assignment has no row: dropped, or never made; ``None`` is nowhere."""
        kept_TK, width = self.placed.kept_TK, self.chosen.topk_ids_TK.shape[1]
        if kept_TK is None or kept_TK.shape[1] == width:
            return kept_TK
        return torch.nn.functional.pad(kept_TK, (0, width - kept_TK.shape[1]))

    @cached_property
    def tokens_per_expert_E(self) -> Tensor:
        """Assignments of every expert, before any is dropped, int64."""
        return tokens_per_expert(self.chosen.topk_ids_TK, self.num_experts, self.chosen.assigned_TK)[0]

    @cached_property
    def num_dropped(self) -> Tensor:
        """Scalar, assignments that found no expert with room."""
        kept_TK, assigned_TK = self.kept_TK, self.chosen.assigned_TK
        if kept_TK is None:
            return self.chosen.topk_ids_TK.new_zeros(())
        return (~kept_TK if assigned_TK is None else ~kept_TK & assigned_TK).sum()

    @cached_property
    def num_rerouted(self) -> Tensor:
        """Scalar, assignments that another expert took."""
        if self.placed.kept_TK is None:
            return self.chosen.topk_ids_TK.new_zeros(())
        return (self.placed_ids_TK != self.chosen.topk_ids_TK).sum()

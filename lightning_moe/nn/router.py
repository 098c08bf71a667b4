"""Which experts a token goes to.

Shapes: T tokens, D width, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_moe.config import MoEConfig


class Routing(NamedTuple):
    """A router's decision; a tuple, because ZeRO-3 finds the tensors of a module's output in nothing else.

    Args:
        logits_TE: Raw router outputs, fp32.
        scores_TE: After the score function, fp32.
        topk_scores_TK: Weights of the selected experts' outputs, fp32.
        topk_ids_TK: The selected experts, best first.
        kept_TK: False where an assignment is dropped for want of capacity; ``None`` is dropless.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    topk_scores_TK: Tensor
    topk_ids_TK: Tensor
    kept_TK: Tensor | None = None


class TopKRouter(nn.Module):
    """Softmax over all experts, then the ``top_k`` best (Mixtral, Jiang et al. 2024; Switch for ``top_k=1``).

    Args:
        hidden_size: D.
        config: Reads ``num_experts``, ``top_k`` and ``normalize_topk``.
    """

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.normalize_topk = config.normalize_topk
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights, normal with standard deviation 0.02."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_TD: Tensor) -> Routing:
        """Routes tokens, [T, D]; in fp32 whatever the precision of ``x_TD`` and of the weights."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = nn.functional.linear(x_TD.float(), self.weight.float())
            scores_TE = logits_TE.softmax(-1)
            # torch.topk leaves the order of ties open; a stable sort takes the lower expert id everywhere.
            topk_ids_TK = scores_TE.detach().sort(dim=-1, descending=True, stable=True).indices
            topk_ids_TK = topk_ids_TK[:, : self.top_k].contiguous()
            topk_scores_TK = scores_TE.gather(1, topk_ids_TK)
            if self.normalize_topk:
                topk_scores_TK = topk_scores_TK / topk_scores_TK.sum(-1, keepdim=True)
        return Routing(logits_TE, scores_TE, topk_scores_TK, topk_ids_TK)


ROUTERS: dict[str, Callable[[int, MoEConfig], nn.Module]] = {"topk": TopKRouter}
"""Known routers: modules whose forward takes [T, D] and returns a :class:`Routing`."""


def make_router(hidden_size: int, config: MoEConfig) -> nn.Module:
    """The router that ``config.router`` names.

    Raises:
        ValueError: the name is unknown; the message lists the known.
    """
    if config.router not in ROUTERS:
        raise ValueError(f"router={config.router!r}: unknown. Known: {', '.join(sorted(ROUTERS))}.")
    return ROUTERS[config.router](hidden_size, config)

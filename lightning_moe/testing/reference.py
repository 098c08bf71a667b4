"""A Mixture-of-Experts layer in plain loops over tokens, to hold the fast one against.

It shares no code with :class:`~lightning_moe.MoE`: routing, capacity, experts and losses are written out from the
papers' equations. It is slow and runs in any dtype, float64 included.

Shapes: T tokens, D model width, K experts per token, E experts.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_moe.config import MoEConfig
from lightning_moe.nn import MoE


class ReferenceMoE(nn.Module):
    """The same function as an unsharded :class:`~lightning_moe.MoE`, with parameters of the same names.

    Args:
        layer: Gives the config and, as copies, the weights.
        num_shares: What is defined per rank (capacity, ``micro_batch`` losses) is computed for this many equal
            parts of the batch, one after the other, as so many ranks would.
        dtype: Of the weights and of the computation.

    Attributes:
        losses: After each forward, the mean over the shares of the unweighted losses,
            ``{"load_balancing": ..., "router_z": ...}``.
        tokens_per_expert_E: After each forward, assignments of every expert before any is dropped.
        num_dropped: After each forward, assignments over capacity.
    """

    def __init__(self, layer: MoE, num_shares: int = 1, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.config: MoEConfig = layer.config
        self.num_shares = num_shares
        self.router: Any = copy.deepcopy(layer.router).to(dtype)
        self.experts: Any = nn.Module()
        self.experts.w1 = nn.Parameter(layer.experts.w1.detach().to(dtype).clone())
        self.experts.w2 = nn.Parameter(layer.experts.w2.detach().to(dtype).clone())
        self.shared_mlp = copy.deepcopy(layer.shared_mlp).to(dtype) if layer.shared_mlp is not None else None
        self.losses: dict[str, Tensor] = {}
        self.tokens_per_expert_E = torch.zeros(self.config.num_experts, dtype=torch.long)
        self.num_dropped = 0

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer, [B, ..., D] -> [B, ..., D]; the first dimension is split into the shares."""
        self.tokens_per_expert_E.zero_()
        self.num_dropped = 0
        outputs, balancing, z = [], [], []
        for share in x.chunk(self.num_shares):
            x_TD = share.reshape(-1, x.shape[-1])
            logits_TE = x_TD @ self.router.weight.t()
            balancing.append(self._load_balancing_loss(logits_TE))
            z.append(torch.stack([torch.logsumexp(logits_E, 0) ** 2 for logits_E in logits_TE]).mean())
            outputs.append(self._share(x_TD, logits_TE).view_as(share))
        self.losses = {"load_balancing": torch.stack(balancing).mean(), "router_z": torch.stack(z).mean()}
        return torch.cat(outputs)

    def _selected(self, scores_E: Tensor) -> list[int]:
        """The K best experts, the lower id first among equals."""
        order = sorted(range(len(scores_E)), key=lambda expert: (-scores_E[expert].item(), expert))
        return order[: self.config.top_k]

    def _load_balancing_loss(self, logits_TE: Tensor) -> Tensor:
        scores_TE = logits_TE.softmax(-1)
        count = torch.zeros(self.config.num_experts, dtype=logits_TE.dtype)
        for scores_E in scores_TE:
            for expert in self._selected(scores_E):
                count[expert] += 1
        self.tokens_per_expert_E += count.long()
        share_E = count / count.sum()
        loss = sum(share_E[e] * scores_TE[:, e].mean() for e in range(self.config.num_experts))
        return self.config.num_experts * torch.as_tensor(loss)

    def _share(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        config = self.config
        routes: list[list[tuple[int, Tensor]]] = []
        for logits_E in logits_TE:
            scores_E = logits_E.softmax(0)
            ids = self._selected(scores_E)
            total = sum(scores_E[e] for e in ids) if config.normalize_topk else 1.0
            routes.append([(e, scores_E[e] / total) for e in ids])

        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor is not None:
            even_share = len(routes) * config.top_k / config.num_experts
            capacity = max(config.min_capacity, math.ceil(factor * even_share))
            for expert in range(config.num_experts):
                asking = [(-score.item(), t) for t, route in enumerate(routes) for e, score in route if e == expert]
                for _, t in sorted(asking)[capacity:]:
                    routes[t] = [(e, score) for e, score in routes[t] if e != expert]
                    self.num_dropped += 1

        rows = []
        for x_D, route in zip(x_TD, routes, strict=True):
            y_D = torch.zeros_like(x_D)
            for expert, score in route:
                y_D = y_D + score * self._expert(x_D, self.experts.w1[expert], self.experts.w2[expert])
            if self.shared_mlp is not None:
                y_D = y_D + self._expert(x_D, self.shared_mlp.up.weight, self.shared_mlp.down.weight)
            rows.append(y_D)
        return torch.stack(rows)

    def _expert(self, x_D: Tensor, w1_GD: Tensor, w2_DF: Tensor) -> Tensor:
        h = w1_GD @ x_D
        if self.config.activation == "swiglu":
            width = w2_DF.shape[1]
            h = functional.silu(h[:width]) * h[width:]
        else:
            h = functional.gelu(h) if self.config.activation == "gelu" else functional.relu(h)
        return w2_DF @ h


def reference_of(module: nn.Module, num_shares: int = 1, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy of a model in which every MoE layer is a :class:`ReferenceMoE`.

    Args:
        module: Built whole, in one process.
        num_shares: See :class:`ReferenceMoE`.
        dtype: Of the whole copy.
    """
    twin = copy.deepcopy(module).to(dtype)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, MoE):
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, ReferenceMoE(layer, num_shares, dtype))
    return twin

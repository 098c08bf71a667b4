"""A Mixture-of-Experts layer in plain loops over tokens, to hold the fast one against.

It shares no code with :class:`~lightning_moe.MoE` but the source of random numbers: routing
(:mod:`lightning_moe.testing.routers`), capacity, experts and losses are written out from the papers' equations. It is
slow and runs in any dtype, float64 included.

Shapes: T tokens of a share, N of them that count, D model width, K experts per token, E experts.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_moe.config import MoEConfig
from lightning_moe.nn import MoE
from lightning_moe.nn.router.base import DROP, JITTER
from lightning_moe.nn.tokens import Tokens
from lightning_moe.parallel import ExpertGroups
from lightning_moe.testing.routers import ReferenceRoutes, reference_routes, valid_tokens


@dataclass
class _Share:
    """What one rank has of a batch."""

    x_TD: Tensor
    tokens: Tokens
    logits_TE: Tensor
    routed: ReferenceRoutes

    @property
    def valid(self) -> list[int]:
        return valid_tokens(self.tokens)

    def counts(self, places: list[int]) -> Tensor:
        """Assignments per expert of the tokens at these places, before any is dropped."""
        count_E = torch.zeros(self.logits_TE.shape[1], dtype=torch.long)
        for t in places:
            for expert, _ in self.routed.routes[t]:
                count_E[expert] += 1
        return count_E


class ReferenceMoE(nn.Module):
    """The same function as an unsharded :class:`~lightning_moe.MoE`, with parameters of the same names.

    Args:
        layer: Gives the config and, as copies, the weights.
        num_shares: What is defined per rank (capacity, ``micro_batch`` losses) is computed for this many equal
            parts of the batch, one after the other, as so many ranks would.
        dtype: Of the weights and of the computation.

    Attributes:
        scope: Over what the load balancing loss counts assignments: ``micro_batch``, a share; ``sequence``;
            ``global_batch``, all shares of all forwards since :meth:`begin_step`.
        losses: After each forward, the mean over the shares of the unweighted losses, ``{"load_balancing": ...,
            "router_z": ..., "importance": ..., "load": ...}``; the load is 0 for all routers but ``noisy_topk``.
        tokens_per_expert_E: After each forward, assignments of every expert before any is dropped.
        num_dropped: After each forward, assignments over capacity that no expert has taken.
        num_rerouted: After each forward, assignments over capacity that another expert has taken.
    """

    def __init__(self, layer: MoE, num_shares: int = 1, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.config: MoEConfig = layer.config
        self.num_shares = num_shares
        self.router: Any = copy.deepcopy(layer.router).to(dtype)
        self.experts: Any = nn.Module()
        self.experts.w1 = nn.Parameter(layer.experts.w1.detach().to(dtype).clone())
        self.experts.w2 = nn.Parameter(layer.experts.w2.detach().to(dtype).clone())
        self.shared_mlp: Any = None if layer.shared_mlp is None else copy.deepcopy(layer.shared_mlp).to(dtype)
        self.residual: Any = None if layer.residual is None else copy.deepcopy(layer.residual).to(dtype)
        self.scope = "micro_batch"
        self.losses: dict[str, Tensor] = {}
        self.tokens_per_expert_E = torch.zeros(self.config.num_experts, dtype=torch.long)
        self.num_dropped = 0
        self.num_rerouted = 0
        self._counts_of_step_E = torch.zeros(self.config.num_experts, dtype=torch.long)

    def begin_step(self) -> None:
        """Forgets the assignments that ``scope="global_batch"`` has counted: a step of the optimizer begins."""
        self._counts_of_step_E.zero_()

    def forward(self, x: Tensor, valid: Tensor | None = None, token_ids: Tensor | None = None) -> Tensor:
        """Applies the layer, [B, ..., D] -> [B, ..., D]; the first dimension is split into the shares."""
        self.tokens_per_expert_E.zero_()
        self.num_dropped = self.num_rerouted = 0
        parts = x.chunk(self.num_shares)
        nothing = (None,) * len(parts)
        valids = nothing if valid is None else valid.chunk(self.num_shares)
        ids = nothing if token_ids is None else token_ids.chunk(self.num_shares)
        key: int | None = None  # the first share that needs random numbers draws it for all
        shares, outputs = [], []
        for rank, part in enumerate(parts):
            groups = ExpertGroups(data_size=self.num_shares, data_rank=rank)
            tokens = Tokens(part.shape[:-1], valids[rank], ids[rank], groups, self.training, x.device)
            if key is not None:
                tokens.key = key
            share = self._route(part.reshape(-1, x.shape[-1]), tokens)
            outputs.append(self._output(share).view_as(part))
            shares.append(share)
            self.tokens_per_expert_E += share.counts(share.valid)
            key = vars(tokens).get("key")
        self._counts_of_step_E += self.tokens_per_expert_E
        losses = [self._losses(share) for share in shares]
        self.losses = {name: torch.stack([of_share[name] for of_share in losses]).mean() for name in losses[0]}
        return torch.cat(outputs)

    def _route(self, x_TD: Tensor, tokens: Tokens) -> _Share:
        config, router = self.config, self.router
        seen_TD = x_TD
        if self.training and config.jitter:
            seen_TD = x_TD * (1 + config.jitter * (2 * tokens.uniform(x_TD.shape[1], JITTER).to(x_TD.dtype) - 1))
        if config.router in ("hash", "random"):
            logits_TE = x_TD.new_zeros(len(x_TD), config.num_experts)
        else:
            logits_TE = seen_TD @ router.weight.t()
        noise_logits_TE = seen_TD @ router.noise_weight.t() if config.router == "noisy_topk" else None
        bias_E = router.expert_bias if config.expert_bias else None
        routed = reference_routes(config, logits_TE, tokens, bias_E=bias_E, noise_logits_TE=noise_logits_TE)
        return _Share(x_TD, tokens, logits_TE, routed)

    # --- losses -------------------------------------------------------------------------------------------------------

    def _losses(self, share: _Share) -> dict[str, Tensor]:
        valid, routed = share.valid, share.routed
        zero = share.logits_TE.sum() * 0
        z = [torch.logsumexp(share.logits_TE[t], 0) ** 2 for t in valid]
        importance: list[Tensor] = [zero] * self.config.num_experts
        for route in routed.routes:
            for expert, weight in route:
                importance[expert] = importance[expert] + weight
        load = [zero] * self.config.num_experts
        if routed.load_TE is not None:
            load = [sum((routed.load_TE[t, e] for t in valid), zero) for e in range(self.config.num_experts)]
        return {
            "load_balancing": self._load_balancing_loss(share),
            "router_z": torch.stack(z).mean() if z else zero,
            "importance": _squared_variation(importance),
            "load": _squared_variation(load),
        }

    def _load_balancing_loss(self, share: _Share) -> Tensor:
        valid, probabilities_TE = share.valid, share.routed.probabilities_TE
        if self.scope == "micro_batch":
            return _balance(share.counts(valid), [probabilities_TE[t] for t in valid], probabilities_TE)
        if self.scope == "global_batch":
            return _balance(self._counts_of_step_E, [probabilities_TE[t] for t in valid], probabilities_TE)
        if self.scope != "sequence":
            raise ValueError(f"scope={self.scope!r}: unknown. Known: micro_batch, sequence, global_batch.")
        sequences: dict[int, list[int]] = {}
        for t in valid:
            sequences.setdefault(t // share.tokens.sequence_length, []).append(t)
        losses = [
            _balance(share.counts(places), [probabilities_TE[t] for t in places], probabilities_TE)
            for places in sequences.values()
        ]
        return torch.stack(losses).mean() if losses else probabilities_TE.sum() * 0

    # --- capacity and experts -----------------------------------------------------------------------------------------

    def _placed(self, share: _Share) -> list[list[tuple[int, Tensor]]]:
        """What is left of the routes when every expert has its capacity."""
        config, routes = self.config, share.routed.routes
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor is None or config.router == "expert_choice":
            return routes
        rows = Fraction(str(factor)) * len(share.valid) * config.top_k / config.num_experts  # no binary rounding
        capacity = max(config.min_capacity, math.ceil(rows))
        if config.drop_priority == "score":
            priority = [[weight.item() for _, weight in route] for route in routes]
        elif config.drop_priority == "position":
            priority = [[-float(t)] * len(route) for t, route in enumerate(routes)]
        else:
            priority = share.tokens.uniform(config.top_k, DROP).tolist()
        ids = [[expert for expert, _ in route] for route in routes]
        kept = keep_best(ids, priority, capacity)
        homeless = sum(not is_kept for row in kept for is_kept in row)
        if config.overflow == "drop":
            self.num_dropped += homeless
            placed = routes
        else:
            move_homeless(ids, kept, priority, capacity, share.routed.preferences)
            self.num_dropped += (left := sum(not is_kept for row in kept for is_kept in row))
            self.num_rerouted += homeless - left
            placed = [list(zip(row, share.routed.weigh(t, row), strict=True)) for t, row in enumerate(ids)]
        return [
            [pair for pair, is_kept in zip(route, row, strict=True) if is_kept]
            for route, row in zip(placed, kept, strict=True)
        ]

    def _output(self, share: _Share) -> Tensor:
        rows = []
        is_padding_T = torch.ones(len(share.x_TD), dtype=torch.bool)
        is_padding_T[share.valid] = False
        x_TD = share.x_TD.masked_fill(is_padding_T.unsqueeze(1), 0)  # to no expert, and through no other part
        for x_D, route in zip(x_TD, self._placed(share), strict=True):
            y_D = x_D * 0  # in the graph, also where no expert follows
            for expert, weight in route:
                y_D = y_D + weight * self._mlp(x_D, self.experts.w1[expert], self.experts.w2[expert])
            if (shared := self.shared_mlp) is not None:
                always_D = self._mlp(x_D, shared.up.weight, shared.down.weight)
                y_D = y_D + (always_D if shared.gate is None else (shared.gate.weight @ x_D).sigmoid() * always_D)
            if (residual := self.residual) is not None:
                mix = (residual.coefficient.weight @ x_D + residual.coefficient.bias).softmax(0)
                dense_D = self._mlp(x_D, residual.mlp.up.weight, residual.mlp.down.weight)
                y_D = mix[0] * y_D + mix[1] * dense_D
            rows.append(y_D)
        return torch.stack(rows) if rows else torch.zeros_like(share.x_TD)

    def _mlp(self, x_D: Tensor, w1_GD: Tensor, w2_DF: Tensor) -> Tensor:
        h = w1_GD @ x_D
        if self.config.activation == "swiglu":
            width = w2_DF.shape[1]
            h = functional.silu(h[:width]) * h[width:]
        else:
            h = functional.gelu(h) if self.config.activation == "gelu" else functional.relu(h)
        return w2_DF @ h


def keep_best(ids: list[list[int]], priority: list[list[float]], capacity: int) -> list[list[bool]]:
    """Which assignments every expert has room for: those of highest priority, among equals the earlier ones.

    Args:
        ids: Experts of every token.
        priority: Of every assignment.
        capacity: Room of each expert.
    """
    kept = [[False] * len(row) for row in ids]
    for expert in {e for row in ids for e in row}:
        asking = [(-priority[t][k], t, k) for t, row in enumerate(ids) for k, e in enumerate(row) if e == expert]
        for _, t, k in sorted(asking)[:capacity]:
            kept[t][k] = True
    return kept


def move_homeless(
    ids: list[list[int]],
    kept: list[list[bool]],
    priority: list[list[float]],
    capacity: int,
    preferences: list[list[int]],
) -> None:
    """Moves what is not kept to the tokens' next-best experts with room, in rounds; changes ``ids`` and ``kept``.

    In each round the j-th homeless assignment of a token asks the token's j-th best expert among those that have
    room when the round begins and that the token does not use; an expert takes by priority as many as it can.

    Args:
        ids: Experts of every token.
        kept: From :func:`keep_best`.
        priority: Of every assignment, which it keeps wherever it goes.
        capacity: Room of each expert.
        preferences: All experts in the order in which a token wants them.
    """
    room = {expert: capacity for order in preferences for expert in order}
    for row, kept_row in zip(ids, kept, strict=True):
        for expert, is_kept in zip(row, kept_row, strict=True):
            room[expert] -= is_kept
    while True:
        asking: dict[int, list[tuple[float, int, int]]] = {}
        for t, (row, kept_row) in enumerate(zip(ids, kept, strict=True)):
            homeless = [k for k, is_kept in enumerate(kept_row) if not is_kept]
            options = [e for e in preferences[t] if room[e] > 0 and e not in row]
            for k, expert in zip(homeless, options, strict=False):  # the shorter of the two decides
                asking.setdefault(expert, []).append((-priority[t][k], t, k))
        if not asking:
            return
        for expert, requests in asking.items():
            for _, t, k in sorted(requests)[: room[expert]]:
                ids[t][k], kept[t][k] = expert, True
                room[expert] -= 1


def _balance(count_E: Tensor, probabilities: list[Tensor], probabilities_TE: Tensor) -> Tensor:
    """E * sum of f_i * p_i (Fedus et al. 2021, equation 4); 0 where there is nothing to balance."""
    total, num_experts = int(count_E.sum()), len(count_E)
    if not probabilities or not total:
        return probabilities_TE.sum() * 0
    mean_E = torch.stack(probabilities).mean(0)
    terms = [count_E[e].item() / total * mean_E[e] for e in range(num_experts)]
    return num_experts * torch.stack(terms).sum()


def _squared_variation(values: list[Tensor]) -> Tensor:
    """The squared coefficient of variation (Shazeer et al. 2017, equation 7); 0 where all are 0."""
    stacked = torch.stack(values)
    mean = stacked.mean()
    if mean.item() == 0:
        return mean * 0
    return ((stacked - mean) ** 2).mean() / mean**2


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

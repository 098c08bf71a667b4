"""Every router in plain loops over tokens, to hold the fast ones against.

Nothing here is shared with :mod:`lightning_moe.nn.router` but the streams of random numbers. Selections are Python
sorts with their rule for ties spelled out; weights stay tensors that know their gradients.

Shapes: T tokens of one rank, K experts per token, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

from lightning_moe.config import MoEConfig
from lightning_moe.nn.router.base import CHOICE
from lightning_moe.nn.tokens import Tokens, hashed_uniform

Route = list[tuple[int, Tensor]]
"""The experts of one token with their weights, the best first."""


@dataclass(frozen=True)
class ReferenceRoutes:
    """What a router chose.

    Args:
        selected: Experts of every token, the best first; none for padding.
        preferences: Of every token, all experts in the order in which it wants them, for ``overflow="next_expert"``.
        probabilities_TE: Shares of the experts in the eyes of the load balancing loss; they add up to 1.
        weigh: Takes a token and any ids; returns the weights of those experts, were they the token's.
        load_TE: Probability of every expert to be selected under new noise, for ``noisy_topk``; else ``None``.

    Attributes:
        routes: ``selected`` with the weights.
    """

    routes: list[Route] = field(init=False)
    selected: list[list[int]]
    preferences: list[list[int]]
    probabilities_TE: Tensor
    weigh: Callable[[int, list[int]], list[Tensor]]
    load_TE: Tensor | None = None

    def __post_init__(self) -> None:
        routes = [list(zip(ids, self.weigh(t, ids), strict=True)) for t, ids in enumerate(self.selected)]
        object.__setattr__(self, "routes", routes)


def reference_routes(
    config: MoEConfig,
    logits_TE: Tensor,
    tokens: Tokens | None = None,
    *,
    bias_E: Tensor | None = None,
    noise_logits_TE: Tensor | None = None,
) -> ReferenceRoutes:
    """Routes the tokens of one rank as ``config.router`` says.

    Args:
        config: Any built-in router.
        logits_TE: In any dtype. ``hash`` and ``random`` read their shape and dtype only.
        tokens: What else is known of the tokens; ``None`` is T tokens outside training, without padding.
        bias_E: The selection's bias where ``config.expert_bias``; ``None`` is zeros.
        noise_logits_TE: Before the softplus, for ``noisy_topk``.

    Raises:
        ValueError: the router is not built in, or something that it reads is missing.
    """
    config = config.resolved()
    if tokens is None:
        tokens = Tokens(logits_TE.shape[:1])
    if config.router == "noisy_topk":
        if noise_logits_TE is None:
            raise ValueError("noise_logits_TE=None: router='noisy_topk' reads them. Give one per token and expert.")
        return _noisy_topk(config, logits_TE, tokens, noise_logits_TE)
    if config.router in ("topk", "group_limited"):
        if config.expert_bias and bias_E is None:
            bias_E = torch.zeros(config.num_experts)
        route = _topk if config.router == "topk" else _group_limited
        return route(config, logits_TE, tokens, bias_E if config.expert_bias else None)
    others = {
        "switch": _switch,
        "gshard": _gshard,
        "sinkhorn": _sinkhorn,
        "expert_choice": _expert_choice,
        "hash": _hash,
        "random": _random,
    }
    if config.router not in others:
        raise ValueError(f"router={config.router!r}: has no reference. Use one that is built in.")
    return others[config.router](config, logits_TE, tokens)


def best_first(values: Sequence[float] | Tensor) -> list[int]:
    """Indices by falling value; the lower index first among equals."""
    numbers = values.tolist() if isinstance(values, Tensor) else list(values)
    return sorted(range(len(numbers)), key=lambda index: (-numbers[index], index))


def valid_tokens(tokens: Tokens) -> list[int]:
    """Places of the tokens that are no padding."""
    return [t for t in range(tokens.num_tokens) if tokens.valid_T is None or bool(tokens.valid_T[t])]


def _unless_padding(tokens: Tokens, ids_of: Callable[[int], list[int]]) -> list[list[int]]:
    valid = set(valid_tokens(tokens))
    return [ids_of(t) if t in valid else [] for t in range(tokens.num_tokens)]


# --- topk and those that weigh as it does -----------------------------------------------------------------------------


def _scores(config: MoEConfig, logits: Tensor) -> Tensor:
    return logits.softmax(-1) if config.score_function == "softmax" else logits.sigmoid()


def _weigh_scores(config: MoEConfig, logits_TE: Tensor) -> Callable[[int, list[int]], list[Tensor]]:
    """g_i = s_i, over their sum where normalized, times the route scale."""

    def weigh(t: int, ids: list[int]) -> list[Tensor]:
        if not ids:
            return []
        if config.score_before_topk:
            scores_E = _scores(config, logits_TE[t])
            scores = [scores_E[e] for e in ids]
        else:
            scores = list(_scores(config, torch.stack([logits_TE[t, e] for e in ids])))
        if config.normalize_topk:
            total = torch.stack(scores).sum().clamp(min=1e-20)
            scores = [score / total for score in scores]
        return [score * config.route_scale for score in scores]

    return weigh


def _probabilities(config: MoEConfig, logits_TE: Tensor) -> Tensor:
    scores_TE = _scores(config, logits_TE)
    return scores_TE / scores_TE.sum(1, keepdim=True)


def _choice_values(config: MoEConfig, logits_TE: Tensor, bias_E: Tensor | None) -> list[list[float]]:
    """What the selection goes by: the bias is in here and nowhere else."""
    logits_TE = logits_TE.detach()
    if bias_E is None:
        return logits_TE.tolist()
    base_TE = _scores(config, logits_TE) if config.score_before_topk else logits_TE
    return (base_TE + bias_E.detach().to(base_TE.dtype)).tolist()


def _topk(config: MoEConfig, logits_TE: Tensor, tokens: Tokens, bias_E: Tensor | None = None) -> ReferenceRoutes:
    """Shazeer et al. 2017 without noise; with a bias Wang et al. 2024 (auxiliary-loss-free balancing)."""
    preferences = [best_first(values) for values in _choice_values(config, logits_TE, bias_E)]
    selected = _unless_padding(tokens, lambda t: preferences[t][: config.top_k])
    return ReferenceRoutes(selected, preferences, _probabilities(config, logits_TE), _weigh_scores(config, logits_TE))


def _group_limited(config: MoEConfig, logits_TE: Tensor, tokens: Tokens, bias_E: Tensor | None) -> ReferenceRoutes:
    """DeepSeek-V3: only the groups are open whose two best experts are worth most together."""
    choices = _choice_values(config, logits_TE, bias_E)
    # Sums of logits would order the groups otherwise than sums of scores.
    worths = choices if bias_E is not None else _scores(config, logits_TE.detach()).tolist()
    size = config.num_experts // config.num_groups

    def select(t: int) -> list[int]:
        groups = [worths[t][g * size : (g + 1) * size] for g in range(config.num_groups)]
        worth = [sum(sorted(group, reverse=True)[:2]) for group in groups]
        is_open = best_first(worth)[: config.topk_groups]
        return [e for e in best_first(choices[t]) if e // size in is_open][: config.top_k]

    preferences = [best_first(values) for values in choices]
    selected = _unless_padding(tokens, select)
    return ReferenceRoutes(selected, preferences, _probabilities(config, logits_TE), _weigh_scores(config, logits_TE))


def _sinkhorn(config: MoEConfig, logits_TE: Tensor, tokens: Tokens) -> ReferenceRoutes:
    """BASE-like: training selects by a transport plan in which all experts get the same (Clark et al. 2022)."""
    if not tokens.training:
        return _topk(config, logits_TE, tokens)
    valid = valid_tokens(tokens)
    if len(valid) <= 1:  # to one token alone the plan gives every expert the same
        return _topk(config, logits_TE, tokens)
    plan = dict(zip(valid, log_plan(config, [logits_TE[t].tolist() for t in valid]), strict=True))
    preferences = [best_first(plan.get(t, logits_TE[t].tolist())) for t in range(tokens.num_tokens)]
    selected = _unless_padding(tokens, lambda t: preferences[t][: config.top_k])
    return ReferenceRoutes(selected, preferences, _probabilities(config, logits_TE), _weigh_scores(config, logits_TE))


def log_plan(config: MoEConfig, logits: list[list[float]]) -> list[list[float]]:
    """Scales rows of ``exp(logits)`` to sum 1 and columns to T / E in turn (Sinkhorn 1964); the logarithm of it."""
    if not logits:
        return []
    num_experts = config.num_experts
    log_share = math.log(len(logits) / num_experts)

    def scale(target: float, log_values: list[float]) -> float:
        highest = max(log_values)
        if highest == -math.inf:
            return 0.0
        return target - highest - math.log(sum(math.exp(value - highest) for value in log_values))

    column = [0.0] * num_experts
    row = [scale(0.0, values) for values in logits]
    for _ in range(config.sinkhorn_iterations):
        new = [
            scale(log_share, [values[e] + log for values, log in zip(logits, row, strict=True)])
            for e in range(num_experts)
        ]
        if max(abs(math.exp(old - log) - 1) for old, log in zip(column, new, strict=True)) <= config.sinkhorn_tolerance:
            break
        column = new
        row = [scale(0.0, [value + log for value, log in zip(values, column, strict=True)]) for values in logits]
    return [
        [value + log + of_row for value, log in zip(values, column, strict=True)]
        for values, of_row in zip(logits, row, strict=True)
    ]


# --- routers with weights of their own --------------------------------------------------------------------------------


def _switch(config: MoEConfig, logits_TE: Tensor, tokens: Tokens) -> ReferenceRoutes:
    """Fedus et al. 2021: one expert, weighed by its probability."""
    probabilities_TE = logits_TE.softmax(1)
    preferences = [best_first(logits_E) for logits_E in logits_TE.tolist()]
    selected = _unless_padding(tokens, lambda t: preferences[t][:1])
    return ReferenceRoutes(
        selected, preferences, probabilities_TE, lambda t, ids: [probabilities_TE[t, e] for e in ids]
    )


def _softmax_over(values_TE: Tensor) -> Callable[[int, list[int]], list[Tensor]]:
    return lambda t, ids: list(torch.stack([values_TE[t, e] for e in ids]).softmax(0)) if ids else []


def _gshard(config: MoEConfig, logits_TE: Tensor, tokens: Tokens) -> ReferenceRoutes:
    """Lepikhin et al. 2020: the best expert, and in training another one in proportion to its probability."""
    preferences = [best_first(logits_E) for logits_E in logits_TE.tolist()]
    second = [order[1] for order in preferences]
    if tokens.training:
        noise = (-(-tokens.uniform(config.num_experts, CHOICE).double().log()).log()).tolist()
        for t, (logits, gumbel) in enumerate(zip(logits_TE.tolist(), noise, strict=True)):
            order = best_first([logit + g for logit, g in zip(logits, gumbel, strict=True)])
            second[t] = next(e for e in order if e != preferences[t][0])
    selected = _unless_padding(tokens, lambda t: [preferences[t][0], second[t]])
    return ReferenceRoutes(selected, preferences, logits_TE.softmax(1), _softmax_over(logits_TE))


def _noisy_topk(config: MoEConfig, logits_TE: Tensor, tokens: Tokens, noise_logits_TE: Tensor) -> ReferenceRoutes:
    """Shazeer et al. 2017, equations 3 to 5 and, for the load, 8 to 10."""
    std_TE = functional.softplus(noise_logits_TE)
    noisy_TE = logits_TE
    if tokens.training:
        noisy_TE = logits_TE + tokens.normal(config.num_experts, CHOICE).to(logits_TE.dtype) * std_TE
    preferences = [best_first(noisy_E) for noisy_E in noisy_TE.tolist()]
    selected = _unless_padding(tokens, lambda t: preferences[t][: config.top_k])

    load_TE = torch.ones_like(logits_TE)
    if config.top_k < config.num_experts:
        load_TE = load_TE.clone()
        for t, order in enumerate(preferences):
            for e in range(config.num_experts):
                threshold = noisy_TE[t, [other for other in order if other != e][config.top_k - 1]]
                z = (logits_TE[t, e] - threshold) / std_TE[t, e]
                load_TE[t, e] = (1 + torch.erf(z / math.sqrt(2))) / 2
    return ReferenceRoutes(selected, preferences, noisy_TE.softmax(1), _softmax_over(noisy_TE), load_TE)


def _expert_choice(config: MoEConfig, logits_TE: Tensor, tokens: Tokens) -> ReferenceRoutes:
    """Zhou et al. 2022: every expert takes as many tokens, those that score highest with it."""
    scores_TE = logits_TE.softmax(1)
    valid = valid_tokens(tokens)
    factor = config.capacity_factor if tokens.training else config.eval_capacity_factor or config.capacity_factor
    assert factor is not None
    capacity = min(len(valid), max(1, math.ceil(Fraction(str(factor)) * len(valid) / config.num_experts)))
    taken: list[set[int]] = [set() for _ in range(tokens.num_tokens)]
    for e in range(config.num_experts):
        order = best_first([scores_TE[t, e].item() for t in valid])
        for place in order[:capacity]:
            taken[valid[place]].add(e)
    preferences = [best_first(scores_E) for scores_E in scores_TE.tolist()]
    selected = [[e for e in order if e in taken[t]] for t, order in enumerate(preferences)]
    return ReferenceRoutes(selected, preferences, scores_TE, lambda t, ids: [scores_TE[t, e] for e in ids])


# --- routers without weights ------------------------------------------------------------------------------------------


def _hash(config: MoEConfig, logits_TE: Tensor, tokens: Tokens) -> ReferenceRoutes:
    """Roller et al. 2021: a token's experts follow from its id."""
    if tokens.token_ids_T is None:
        raise ValueError("token_ids=None: router='hash' goes by them. Give one id per token.")
    return _by_lot(config, hashed_uniform(0, [tokens.token_ids_T.long()], config.num_experts), logits_TE, tokens)


def _random(config: MoEConfig, logits_TE: Tensor, tokens: Tokens) -> ReferenceRoutes:
    """Zuo et al. 2021 (THOR): a token's experts are drawn."""
    return _by_lot(config, tokens.uniform(config.num_experts, CHOICE), logits_TE, tokens)


def _by_lot(config: MoEConfig, lots_TE: Tensor, logits_TE: Tensor, tokens: Tokens) -> ReferenceRoutes:
    preferences = [best_first(lots_E) for lots_E in lots_TE.tolist()]
    selected = _unless_padding(tokens, lambda t: preferences[t][: config.top_k])
    even_TE = torch.full_like(logits_TE.detach(), 1 / config.num_experts)
    weight = even_TE.new_tensor(1 / config.top_k)
    return ReferenceRoutes(selected, preferences, even_TE, lambda t, ids: [weight for _ in ids])

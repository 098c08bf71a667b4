"""Fits a router's choice into the capacity of the experts.

Shapes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_moe.dispatch import Dispatcher, FixedShape
from lightning_moe.nn.capacity import expert_capacity, keep_within_capacity, move_to_next_expert
from lightning_moe.nn.router import Router, Routing
from lightning_moe.nn.router.base import DROP
from lightning_moe.nn.tokens import Tokens


def place(
    chosen: Routing, tokens: Tokens, router: Router, dispatcher: Dispatcher[Any], agreed: FixedShape | None = None
) -> tuple[Routing, FixedShape | None]:
    """Decides which assignments get a row, and of which expert. Collective over the EP group where it has a capacity.

    Args:
        chosen: What the router chose.
        tokens: The tokens.
        router: Its config has the capacity and what happens above it.
        dispatcher: Knows the EP group, whose ranks agree on one capacity.
        agreed: The shape of an earlier pass in the same mode, for the capture of a CUDA graph, in which nobody can
            wait for an answer.

    Returns:
        The routing with ``kept_TK``, and the shape to pad to, where the config asks for it.

    Raises:
        RuntimeError: a CUDA graph is captured of what cannot be.
    """
    config = router.config
    if is_capturing():
        _check_capture(router, tokens, agreed)
    if router.fits_capacity:
        return _cut_off_unused(chosen, tokens, router, dispatcher)
    factor = config.capacity_factor if tokens.training else config.eval_capacity_factor
    if factor is None:
        return chosen._replace(kept_TK=chosen.assigned_TK), None
    # A rank with a short batch must not disagree about shapes.
    largest, largest_valid = dispatcher.largest([tokens.num_tokens, tokens.num_valid], tokens.device)
    settings = config.num_experts, chosen.topk_ids_TK.shape[1], factor, config.min_capacity
    capacity = expert_capacity(largest_valid, *settings)
    routing = _within(capacity, chosen, tokens, router)._replace(capacity=capacity)
    if not config.pad_to_capacity:
        return routing, None
    if is_capturing():
        return routing, agreed
    num_tokens = int(largest)  # the layer's one host synchronisation: with a fixed shape dispatchers need none
    return routing, FixedShape(num_tokens, int(expert_capacity(num_tokens, *settings)))


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _check_capture(router: Router, tokens: Tokens, agreed: FixedShape | None) -> None:
    if router.fits_capacity or not router.config.pad_to_capacity:
        what = f"router={router.config.router!r}" if router.fits_capacity else "pad_to_capacity=False"
        raise RuntimeError(
            f"{what}: a CUDA graph cannot hold an MoE layer whose sizes depend on the routing. Use router='topk' with "
            "a capacity_factor and pad_to_capacity=True, or leave the layer out of the graph."
        )
    if agreed is None or tokens.num_tokens > agreed.num_tokens:
        raise RuntimeError(
            f"{tokens.num_tokens} tokens: a CUDA graph is captured, in which ranks cannot agree on a number of tokens. "
            "Run the layer on a batch of this size before, on all ranks, as a capture wants anyway."
        )


def _cut_off_unused(
    chosen: Routing, tokens: Tokens, router: Router, dispatcher: Dispatcher[Any]
) -> tuple[Routing, FixedShape | None]:
    """Of the E places that every token has where experts choose, keeps those that a token of some rank needs."""
    config = router.config
    assert chosen.assigned_TK is not None
    used = chosen.assigned_TK.sum(1).amax() if tokens.num_tokens else 0
    # A host synchronisation of its own: how many experts a token has is data.
    num_tokens, width = dispatcher.largest([tokens.num_tokens, used], tokens.device).tolist()
    width = max(width, 1)
    routing = chosen._replace(
        topk_ids_TK=chosen.topk_ids_TK[:, :width],
        topk_scores_TK=chosen.topk_scores_TK[:, :width],
        kept_TK=chosen.assigned_TK[:, :width],
        capacity=router.rows_per_expert(tokens.num_valid, tokens.training).minimum(tokens.num_valid),
    )
    if not config.pad_to_capacity:
        return routing, None
    return routing, FixedShape(num_tokens, int(router.rows_per_expert(num_tokens, tokens.training)))


def _within(capacity: Tensor, chosen: Routing, tokens: Tokens, router: Router) -> Routing:
    """Keeps every expert within its capacity, and finds the rest another expert where the config says so."""
    ids_TK, num_experts = chosen.topk_ids_TK, router.config.num_experts
    if router.config.drop_priority == "score":
        priority_TK = chosen.topk_scores_TK.detach()
    elif router.config.drop_priority == "position":
        priority_TK = torch.arange(len(ids_TK), 0, -1, device=ids_TK.device).unsqueeze(1).expand_as(ids_TK)
    else:
        priority_TK = tokens.uniform(ids_TK.shape[1], DROP)
    kept_TK = keep_within_capacity(ids_TK, priority_TK, num_experts, capacity, chosen.assigned_TK)
    if router.config.overflow == "drop":
        return chosen._replace(kept_TK=kept_TK)
    choice_TE = chosen.logits_TE if chosen.choice_TE is None else chosen.choice_TE
    ids_TK, kept_TK = move_to_next_expert(ids_TK, kept_TK, choice_TE, priority_TK, capacity, chosen.assigned_TK)
    has_moved_T1 = (ids_TK != chosen.topk_ids_TK).any(1, keepdim=True)
    scores_TK = torch.where(has_moved_T1, router.weigh(chosen, ids_TK), chosen.topk_scores_TK)
    return chosen._replace(topk_ids_TK=ids_TK, kept_TK=kept_TK, topk_scores_TK=scores_TK)

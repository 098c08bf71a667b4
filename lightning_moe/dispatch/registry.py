"""Dispatchers by name, and the rule behind ``auto``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_moe.dispatch.allgather import AllGatherDispatcher
from lightning_moe.dispatch.alltoall import AllToAllDispatcher
from lightning_moe.dispatch.base import Dispatcher
from lightning_moe.dispatch.deep_ep import choose_fused
from lightning_moe.dispatch.local import LocalDispatcher
from lightning_moe.dispatch.tune import DispatchTuner
from lightning_moe.parallel import ExpertGroups

AUTO = "fused"
"""What ``auto`` takes on more than one rank: on all shapes and groups measured the fastest or equal to it
(docs/performance.md)."""

DISPATCHERS: dict[str, Callable[[int, ExpertGroups, torch.dtype | None], Dispatcher[Any]]] = {
    "allgather": AllGatherDispatcher,
    "alltoall": AllToAllDispatcher,
    "fused": choose_fused,
    "local": LocalDispatcher,
}
"""Known dispatchers, called with num_experts, groups and wire_dtype; add your own under a new name."""


_TUNED = ("allgather", "alltoall", "fused")
"""What ``tune`` tries."""

_RULES = ("auto", "tune")
"""Names that stand for a choice among dispatchers."""


def check_dispatcher(name: str) -> None:
    """Whether :func:`make_dispatcher` knows a name.

    Raises:
        ValueError: it does not; the message lists the known.
    """
    if name not in (*DISPATCHERS, *_RULES):
        known = ", ".join(sorted([*DISPATCHERS, *_RULES]))
        raise ValueError(
            f"dispatcher={name!r}: unknown. Known: {known}. One of your own has to be in "
            "lightning_moe.dispatch.DISPATCHERS before the model is built."
        )


def make_dispatcher(
    name: str, num_experts: int, groups: ExpertGroups, wire_dtype: torch.dtype | None = None
) -> Dispatcher[Any]:
    """The dispatcher called ``name``, or what ``auto`` stands for in these groups; ``tune`` begins with that.

    ``allgather``, ``alltoall`` and ``fused`` also stand for ``local`` where one rank holds all experts, so that one
    config serves a laptop and a cluster.

    Raises:
        ValueError: the name is unknown; the message lists the known.
    """
    check_dispatcher(name)
    if groups.ep_size == 1 and name in (*_RULES, *_TUNED):
        name = "local"
    elif name in _RULES:
        name = AUTO
    return DISPATCHERS[name](num_experts, groups, wire_dtype)


def make_tuner(
    num_experts: int, groups: ExpertGroups, wire_dtype: torch.dtype | None, num_chunks: int
) -> DispatchTuner | None:
    """What finds the fastest dispatcher in these groups; ``None`` where one rank holds all experts."""
    if groups.ep_size == 1:
        return None
    candidates = {name: make_dispatcher(name, num_experts, groups, wire_dtype) for name in _TUNED}
    return DispatchTuner(candidates, groups, num_chunks, make_dispatcher("auto", num_experts, groups, wire_dtype))

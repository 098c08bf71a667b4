"""Dispatchers by name, and the rule behind ``auto``."""

from __future__ import annotations

from typing import Any

from lightning_moe.dispatch.allgather import AllGatherDispatcher
from lightning_moe.dispatch.alltoall import AllToAllDispatcher
from lightning_moe.dispatch.base import Dispatcher
from lightning_moe.dispatch.local import LocalDispatcher
from lightning_moe.parallel import ExpertGroups

ALLGATHER_UP_TO = 4
"""Largest EP group for which ``auto`` takes the all-gather."""

DISPATCHERS: dict[str, type[Dispatcher[Any]]] = {
    "allgather": AllGatherDispatcher,
    "alltoall": AllToAllDispatcher,
    "local": LocalDispatcher,
}
"""Known dispatchers; add your own under a new name."""


def make_dispatcher(name: str, num_experts: int, groups: ExpertGroups) -> Dispatcher[Any]:
    """The dispatcher called ``name``, or what ``auto`` stands for in these groups.

    ``allgather`` and ``alltoall`` also stand for ``local`` where one rank holds all experts, so that one config
    serves a laptop and a cluster.

    Raises:
        ValueError: the name is unknown; the message lists the known.
    """
    if name != "auto" and name not in DISPATCHERS:
        known = ", ".join(sorted([*DISPATCHERS, "auto"]))
        raise ValueError(f"dispatcher={name!r}: unknown. Known: {known}.")
    if groups.ep_size == 1 and name in ("auto", "allgather", "alltoall"):
        name = "local"
    elif name == "auto":
        name = "allgather" if groups.ep_size <= ALLGATHER_UP_TO else "alltoall"
    return DISPATCHERS[name](num_experts, groups)

"""The process groups of this rank, and the scope in which layers are built for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_moe.parallel.topology import Topology, expert_range
from lightning_moe.parallel.traffic import TrafficMeter


@dataclass(frozen=True)
class ExpertGroups:
    """The expert-parallel groups that this rank belongs to.

    Args:
        ep_size: Ranks that together hold all experts once.
        ep_rank: This rank's place among them.
        ep_group: Their process group; ``None`` only when ``ep_size`` is 1.
        edp_group: The ranks that hold the same experts as this one; expert gradients reduce here.
        on_expert_parameter: Called with every expert parameter as soon as it exists, before the constructor of
            its module returns. ZeRO-3 partitions parameters at that moment and must know their group by then.
        data_size: Ranks that have batches of their own, of all EP groups together.
        data_rank: This rank's place among them.
        meter: Counts what the dispatchers of these groups send.
    """

    ep_size: int = 1
    ep_rank: int = 0
    ep_group: dist.ProcessGroup | None = None
    edp_group: dist.ProcessGroup | None = None
    on_expert_parameter: Callable[[nn.Parameter], None] | None = None
    data_size: int = 1
    data_rank: int = 0
    meter: TrafficMeter = field(default_factory=TrafficMeter, compare=False, repr=False)

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertGroups:
        """Copies of a model, as for weight averaging, stand in the same groups; a process group has no copy."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickling, which groups of several ranks cannot be."""
        if self.ep_group is None and self.edp_group is None:
            return dict(self.__dict__)
        raise TypeError(
            "an MoE layer cannot be pickled, nor saved as a whole, while its experts are spread over ranks: process "
            "groups stay in their process. Use trainer.save_checkpoint, or save its state_dict()."
        )

    def local_experts(self, num_experts: int) -> range:
        """Global ids of this rank's experts.

        Raises:
            ValueError: ``num_experts`` is not divisible by ``ep_size``.
        """
        return expert_range(num_experts, self.ep_size, self.ep_rank)


SINGLE_RANK = ExpertGroups()
"""All experts on this rank: what a layer gets when no strategy is at work."""

_scope: ContextVar[ExpertGroups] = ContextVar("lightning_moe_expert_groups", default=SINGLE_RANK)


@contextmanager
def building_for(groups: ExpertGroups) -> Iterator[None]:
    """Layers built inside this scope make only the experts of this rank.

    It plays the part that ``torch.device`` plays for devices: the strategy opens it around ``configure_model``,
    so that a model's own code need not hand groups down to its layers.
    """
    token = _scope.set(groups)
    try:
        yield
    finally:
        _scope.reset(token)


def groups_in_scope() -> ExpertGroups:
    """The groups of the innermost :func:`building_for`, or all experts on this rank."""
    return _scope.get()


def new_expert_groups(topology: Topology) -> ExpertGroups:
    """Makes the EP and EDP process groups of a running ``torch.distributed`` world, without DeepSpeed.

    Every rank makes every group, in the same order: first the EDP groups, then the EP groups.

    Raises:
        ValueError: the topology is for another world size.
    """
    if topology.world_size != dist.get_world_size():
        raise ValueError(
            f"world_size={topology.world_size}: the running process group has {dist.get_world_size()} ranks. "
            "Make the Topology for that number."
        )
    rank = dist.get_rank()
    edp_group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in topology.edp_groups])
    ep_group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in topology.ep_groups])
    return ExpertGroups(
        topology.ep_size,
        rank % topology.ep_size,
        ep_group,
        edp_group,
        data_size=topology.world_size,
        data_rank=rank,
    )

"""Who holds what: topology, process groups, marks of expert parameters, differentiable collectives."""

from lightning_moe.parallel.groups import (
    SINGLE_RANK,
    ExpertGroups,
    building_for,
    groups_in_scope,
    new_expert_groups,
)
from lightning_moe.parallel.params import expert_group_name, is_expert_parameter, mark_expert_parameter
from lightning_moe.parallel.topology import Topology, expert_range

__all__ = [
    "SINGLE_RANK",
    "ExpertGroups",
    "Topology",
    "building_for",
    "expert_group_name",
    "expert_range",
    "groups_in_scope",
    "is_expert_parameter",
    "mark_expert_parameter",
    "new_expert_groups",
]

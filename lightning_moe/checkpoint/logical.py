"""Which logical tensor each parameter of a rank is, or is a part of."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from lightning_moe.nn import MoE
from lightning_moe.parallel import ExpertGroups, is_expert_parameter

_NATIVE_EXPERT = re.compile(r"(?<=\.deepspeed_experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Logical:
    """A parameter as it is in a model with all experts.

    Args:
        name: There; another than here for an expert of DeepSpeed's own layer, which is numbered by rank.
        shape: There.
        start: Where this rank's parameter begins in it, both flattened.
        replica: This rank's place among those that have the same part.
        replicas: How many they are.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    replica: int
    replicas: int


def logical_parameters(module: nn.Module, groups: ExpertGroups) -> dict[str, Logical]:
    """For every parameter of a module, by its name here, what it is in a model with all experts."""
    stacked = {
        id(parameter): layer
        for layer in module.modules()
        if isinstance(layer, MoE)
        for parameter in layer.experts.parameters()
    }
    edp_rank, edp_size = 0, 1
    if groups.edp_group is not None:
        edp_rank, edp_size = dist.get_rank(groups.edp_group), dist.get_world_size(groups.edp_group)
    found = {}
    for name, parameter in module.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO 3 leaves an empty parameter behind
        start, replica, replicas, there = 0, groups.data_rank, groups.data_size, name
        if id(parameter) in stacked:
            layer = stacked[id(parameter)]
            start = layer.experts.expert_ids[0] * math.prod(shape[1:])
            shape = (layer.num_experts, *shape[1:])
            replica, replicas = edp_rank, edp_size
        elif is_expert_parameter(parameter):
            there, replica, replicas = _renumbered(name, module, groups), edp_rank, edp_size
        if not math.prod(shape):
            continue  # there is nothing of it
        found[name] = Logical(there, shape, start, replica, replicas)
    return found


def tied_names(module: nn.Module) -> dict[str, str]:
    """For every further name of a parameter or buffer, the first one."""
    first: dict[int, str] = {}
    tied = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return tied


def all_names(logical: Mapping[str, Logical], groups: ExpertGroups) -> dict[str, tuple[int, ...]]:
    """The shapes of what all ranks together have, by name: also the experts that are on other ranks as modules."""
    local = Counter(_NATIVE_EXPERT.sub("", entry.name) for entry in logical.values())
    shapes = {}
    for entry in logical.values():
        place = _NATIVE_EXPERT.search(entry.name)
        if place is None:
            shapes[entry.name] = entry.shape
            continue
        for number in range(groups.ep_size * local[_NATIVE_EXPERT.sub("", entry.name)]):
            shapes[f"{entry.name[: place.start()]}{number}{entry.name[place.end() :]}"] = entry.shape
    return shapes


def _renumbered(name: str, module: nn.Module, groups: ExpertGroups) -> str:
    """The name of an expert of ``deepspeed.moe.layer.MoE``, by its number among all."""
    place = _NATIVE_EXPERT.search(name)
    assert place is not None, f"{name} is marked as an expert's parameter and belongs to no layer that is known"
    local_experts = len(module.get_submodule(name[: place.start() - 1]))  # type: ignore[arg-type]
    number = groups.ep_rank * local_experts + int(place.group())
    return f"{name[: place.start()]}{number}{name[place.end() :]}"

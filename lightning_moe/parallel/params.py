"""The marks by which an expert parameter is known."""

from __future__ import annotations

from torch import nn


def mark_expert_parameter(parameter: nn.Parameter, ep_size: int) -> None:
    """Marks a parameter as one that differs between the ranks of an EP group.

    ``allreduce`` and ``group_name`` are the names that DeepSpeed, Megatron-DeepSpeed and others have agreed on.
    """
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.group_name = f"ep_size_{ep_size}"  # type: ignore[attr-defined]


def is_expert_parameter(parameter: nn.Parameter) -> bool:
    """Whether gradients of this parameter reduce over the EDP group and not over the world."""
    return getattr(parameter, "allreduce", True) is False


def expert_group_name(parameter: nn.Parameter) -> str:
    """DeepSpeed's name of the group that holds this expert parameter, ``ep_size_N``."""
    name: str = parameter.group_name  # type: ignore[attr-defined]
    return name

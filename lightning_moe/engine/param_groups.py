"""Splits a user's optimizer groups into dense and expert ones, which ZeRO reduces over different ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from lightning_moe.parallel import expert_group_name, is_expert_parameter

_PER_GROUP_LISTS = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",  # LambdaLR, MultiplicativeLR
    "min_lrs",  # ReduceLROnPlateau
    "max_lrs",  # CyclicLR
    "base_momentums",
    "max_momentums",
)
"""Attributes in which torch's schedulers keep one value for every group of the optimizer."""


def split_expert_groups(optimizer: Optimizer, schedulers: list[Any], make_name: Callable[[str, str], str]) -> list[int]:
    """Moves expert parameters into groups of their own, in place, with the same hyper-parameters.

    A group of experts only is renamed where it stands. New groups come last, and the schedulers that already
    count on the optimizer's groups are told of them.

    Args:
        optimizer: Made by the user over dense and expert parameters alike.
        schedulers: Schedulers of this optimizer.
        make_name: From the process-group name (``ep_size_2``) and the name of the group split to a unique name.

    Returns:
        For every group after the split, the group before it that it comes from.
    """
    sources = list(range(len(optimizer.param_groups)))
    taken = {group.get("name") for group in optimizer.param_groups}
    for index, group in enumerate(list(optimizer.param_groups)):
        names = group.get("param_names")
        is_expert = [is_expert_parameter(parameter) for parameter in group["params"]]
        if not any(is_expert):
            continue
        expert = next(parameter for parameter, marked in zip(group["params"], is_expert, strict=True) if marked)
        label = group.get("name", f"pg{index + 1}")
        if label in taken and label.startswith("ep_size_"):
            continue  # the user, or DeepSpeed's own helper, has already split this one
        moe = {"name": make_name(expert_group_name(expert), label), "moe": True}
        if all(is_expert):
            group.update(moe)
            continue
        hyper_parameters = {k: v for k, v in group.items() if k not in ("params", "param_names", "name")}
        split: dict[bool, list[Any]] = {False: [], True: []}
        for position, (parameter, marked) in enumerate(zip(group["params"], is_expert, strict=True)):
            split[marked].append((names[position], parameter) if names else parameter)
        group["params"] = [entry[1] for entry in split[False]] if names else split[False]
        if names:
            group["param_names"] = [entry[0] for entry in split[False]]
        optimizer.add_param_group({"params": split[True], **hyper_parameters, **moe})
        sources.append(index)
    for scheduler in schedulers:
        _extend_scheduler(scheduler, sources)
    return sources


def _extend_scheduler(scheduler: Any, sources: list[int]) -> None:
    """Gives every new group the values of the group that it came from."""
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        _extend_scheduler(inner, sources)
    for attribute in _PER_GROUP_LISTS:
        values = getattr(scheduler, attribute, None)
        if isinstance(values, list) and 0 < len(values) < len(sources):
            setattr(scheduler, attribute, [values[source] for source in sources])


def without_split(state: dict[str, Any], sources: list[int]) -> dict[str, Any]:
    """A scheduler's ``state_dict`` as it would be had the optimizer's groups not been split.

    Args:
        state: Of a scheduler of an optimizer with split groups.
        sources: What :func:`split_expert_groups` returned.
    """
    first = [sources.index(source) for source in range(max(sources) + 1)]
    return _with_groups(state, len(sources), first)


def with_split(state: dict[str, Any], sources: list[int]) -> dict[str, Any]:
    """The reverse of :func:`without_split`, for any split."""
    return _with_groups(state, max(sources) + 1, sources)


def _with_groups(state: dict[str, Any], count: int, chosen: list[int]) -> dict[str, Any]:
    """A scheduler's state with the chosen ones of its ``count`` groups."""
    changed = {
        key: [value[index] for index in chosen]
        for key, value in state.items()
        if key in _PER_GROUP_LISTS and isinstance(value, list) and len(value) == count
    }
    if inner := state.get("_schedulers"):  # SequentialLR, ChainedScheduler
        changed["_schedulers"] = [_with_groups(entry, count, chosen) for entry in inner]
    return {**state, **changed}

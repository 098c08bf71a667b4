"""Where DeepSpeed's optimizers keep the parameters that they work on, and what they keep of each.

Every ZeRO stage and precision has another place, but always the same kind: one contiguous range of a parameter,
flattened, is one contiguous range of a tensor that the torch optimizer has as a parameter. Nothing here imports
DeepSpeed; its classes are known by the attributes that hold these tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, eq=False)
class Master:
    """This rank's range of one parameter, in the precision in which it is optimized; of any, if it is not.

    Args:
        owner: The tensor that the range is in: a parameter of the torch optimizer, or of the module if it is frozen.
        offset: Where the range begins in ``owner``.
        start: Where it begins in the parameter.
        numel: Its length; 0 where another rank has all of the parameter.
        is_partition: Whether no other rank of the same experts has this range.
        is_optimized: Whether ``owner`` is a parameter of the torch optimizer.
    """

    owner: Tensor
    offset: int
    start: int
    numel: int
    is_partition: bool
    is_optimized: bool = True

    def part_of(self, tensor: Tensor) -> Tensor:
        """The range of a tensor that is laid out as ``owner``, flattened; a view where the tensor is contiguous."""
        return tensor.detach().reshape(-1)[self.offset : self.offset + self.numel]


def base_optimizer(engine: Any) -> Optimizer:
    """The torch optimizer under DeepSpeed's."""
    optimizer: Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def masters(engine: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Master]:
    """Where this rank has its range of each parameter, by the parameter's name.

    Args:
        engine: DeepSpeed's, of training or of evaluation.
        parameters: Of its module; those that no optimizer has are their own masters.
    """
    optimized = {id(parameter): master for parameter, master in _masters(engine.optimizer)}
    return {name: optimized.get(id(parameter)) or _own_master(parameter) for name, parameter in parameters.items()}


def _own_master(parameter: Any) -> Master:
    if not hasattr(parameter, "ds_tensor"):
        return Master(parameter, 0, 0, parameter.numel(), False, False)
    size = parameter.ds_tensor.ds_numel
    start = min(dist.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    return Master(parameter.ds_tensor, 0, start, min(size, parameter.ds_numel - start), True, False)


def _masters(optimizer: Any) -> Iterator[tuple[nn.Parameter, Master]]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        yield from _partitions(optimizer)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2
        # The parameters' own `_hp_mapping` does not know of round_robin_gradients.
        groups, offsets = optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets
        yield from _fragments(optimizer, optimizer.single_partition_of_fp32_groups, groups, offsets)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer
        groups = optimizer.bf16_groups
        yield from _fragments(optimizer, optimizer.fp32_groups_flat_partition, groups, map(_offsets, groups))
    elif hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer
        for owner, group in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            for parameter, offset in zip(group, _offsets(group), strict=True):
                yield parameter, Master(owner, offset, 0, parameter.numel(), False)
    elif hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer
        for owned, group in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for owner, parameter in zip(owned, group, strict=True):
                yield parameter, Master(owner, 0, 0, parameter.numel(), False)
    else:  # torch's own; none in evaluation
        for group in getattr(optimizer, "param_groups", ()):
            for parameter in group["params"]:
                yield parameter, Master(parameter, 0, 0, parameter.numel(), False)


def _partitions(optimizer: Any) -> Iterator[tuple[nn.Parameter, Master]]:
    """ZeRO 3: every parameter is cut into as many equal ranges as its group has ranks; the last may be padded."""
    for owner, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        for parameter in group:
            _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = min(dist.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
            yield parameter, Master(owner, offset, start, min(size, parameter.ds_numel - start), True)


def _fragments(
    optimizer: Any, owners: list[Tensor], groups: list[list[nn.Parameter]], offsets: Iterable[list[int]]
) -> Iterator[tuple[nn.Parameter, Master]]:
    """ZeRO 1 and 2: a group's parameters are one after the other, and all together are cut into a part for each rank.

    A rank may have nothing of a parameter.
    """
    ranks = map(dist.get_rank, optimizer.real_dp_process_group)
    for owner, group, offsets_of_group, rank in zip(owners, groups, offsets, ranks, strict=True):
        begin = rank * owner.numel()
        for parameter, offset in zip(group, offsets_of_group, strict=True):
            first = min(max(offset, begin), offset + parameter.numel())
            end = max(min(offset + parameter.numel(), begin + owner.numel()), first)
            yield parameter, Master(owner, max(first - begin, 0), first - offset, end - first, True)


def _offsets(group: list[nn.Parameter]) -> list[int]:
    """Where each begins, one after the other."""
    return [*itertools.accumulate((parameter.numel() for parameter in group), initial=0)][:-1]


def moments(optimizer: Optimizer, master: Master) -> dict[str, Tensor]:
    """What the optimizer keeps for every element, laid out as ``master.owner``, by name."""
    state = optimizer.state.get(master.owner, {})
    return {key: value for key, value in state.items() if _is_moment(key, value, master.owner)}


def scalars(optimizer: Optimizer, master: Master) -> dict[str, Any]:
    """What else the optimizer keeps of a parameter, such as its number of steps."""
    state = optimizer.state.get(master.owner, {})
    return {key: value for key, value in state.items() if not _is_moment(key, value, master.owner)}


def _is_moment(key: str, value: Any, owner: Tensor) -> bool:
    # A parameter of shape [] has moments of the shape of its number of steps.
    return isinstance(value, Tensor) and value.shape == owner.shape and key != "step"


def make_state(
    optimizer: Optimizer,
    masters: Iterable[tuple[Master, Iterable[str], Mapping[str, Any]]],
) -> None:
    """Gives an optimizer, which makes its state in the first step, the state that is to be filled.

    Args:
        optimizer: The torch optimizer.
        masters: Each with the names of its moments and with its scalars. Where one owner has several parameters, it
            takes the scalars of the one with the most steps.
    """
    most: dict[Tensor, float] = {}
    for master, names, entries in masters:
        state = optimizer.state[master.owner]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(master.owner, requires_grad=False)
        steps = float(entries.get("step", 0))
        if steps >= most.get(master.owner, 0.0):
            most[master.owner] = steps
            # A copy each: torch counts steps in place, and owners that shared a count would count it several times.
            state.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in entries.items()})


def before_filling(engine: Any) -> None:
    """Makes ZeRO 3 forget whole parameters that it keeps beside their partitions."""
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()


def keeps_whole_weights(engine: Any) -> bool:
    """Whether every rank has the whole weights that it computes with beside its part of the masters: ZeRO 1 and 2."""
    return hasattr(engine.optimizer, "update_lp_params")


def after_filling(engine: Any, weights_too: bool = False) -> None:
    """Makes the weights what the masters, which were filled, say. Collective.

    Args:
        engine: DeepSpeed's.
        weights_too: The weights that :func:`keeps_whole_weights` speaks of were filled as well.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()
    elif keeps_whole_weights(engine):
        if not weights_too:
            optimizer.update_lp_params()
    else:
        for parameter, master in _masters(optimizer):
            if master.owner is not parameter:
                parameter.data.copy_(master.part_of(master.owner).view_as(parameter))


_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def counters(engine: Any) -> dict[str, Any]:
    """The engine's own counts, and the state of fp16's loss scaling."""
    scaler = getattr(engine.optimizer, "loss_scaler", engine.optimizer)
    scale = {name: getattr(scaler, name) for name in _LOSS_SCALE if engine.fp16_enabled() and hasattr(scaler, name)}
    return {"counters": {name: getattr(engine, name) for name in _COUNTERS}, "loss_scale": scale}


def set_counters(engine: Any, state: Mapping[str, Any]) -> None:
    """Sets what :func:`counters` gave."""
    for name, value in state["counters"].items():
        setattr(engine, name, value)
    scaler = getattr(engine.optimizer, "loss_scaler", engine.optimizer)
    for name, value in state["loss_scale"].items():
        if engine.fp16_enabled() and hasattr(scaler, name):
            setattr(scaler, name, value)

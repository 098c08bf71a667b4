"""The only file that touches DeepSpeed's internals. DeepSpeed is imported inside functions: it takes seconds.

DeepSpeed's engine knows experts by class and by marks on their parameters. Of the routes that it has, only a layer
that is an ``AutoEPMoELayer`` trains and saves right with every ZeRO stage, so that our layers become one at setup.
"""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lightning_moe.nn import GroupedExperts, MoE
from lightning_moe.parallel import ExpertGroups, Topology, is_expert_parameter

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def prepare_import() -> None:
    """Tells DeepSpeed what it would find out with a warning, and only when it is first imported: there is no GPU."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def use_cpu() -> None:
    """Makes DeepSpeed work on CPU ranks, whatever accelerator it found, and without a compiler."""
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    if get_accelerator().device_name() != "cpu":
        set_accelerator(CPU_Accelerator())
    # Compiled at every start, and used for tensor-parallel inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def new_expert_groups(topology: Topology) -> ExpertGroups:
    """DeepSpeed's EP and EDP groups for this topology, made on every rank in the same order.

    Groups of an earlier run in this process are used again, because its layers hold them, unless they are of
    another size or of a world that is gone: an engine takes the largest ep_size it finds for that of the model.
    """
    from deepspeed.utils import groups

    rank, name = dist.get_rank(), f"ep_size_{topology.ep_size}"
    for by_name in _dictionaries_of_groups():
        for known in [*by_name]:
            if known.count("_") > 2:  # an alias of name_param_group
                del by_name[known]
    for by_name in (groups._get_expert_parallel_group_dict(), groups._get_expert_data_parallel_group_dict()):
        for known, group in [*by_name.items()]:
            if known != name or not _is_alive(group):
                groups._release_process_group_references(group)
    groups._create_expert_and_data_parallel(topology.ep_size)
    edp_group = groups._get_expert_data_parallel_group(name)
    return ExpertGroups(
        topology.ep_size,
        rank % topology.ep_size,
        groups._get_expert_parallel_group(name),
        edp_group,
        partial(_place_expert_parameter, name=name, edp_group=edp_group),
        data_size=topology.world_size,
        data_rank=rank,
    )


def _is_alive(group: dist.ProcessGroup) -> bool:
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError):
        return False


def device_mesh(groups: ExpertGroups, topology: Topology, device_type: str) -> DeviceMesh:
    """The same groups as a mesh with the axes ``edp`` and ``ep``."""
    return DeviceMesh.from_group(
        [g for g in (groups.edp_group, groups.ep_group) if g is not None],
        device_type,
        mesh=torch.tensor(topology.ep_groups),
        mesh_dim_names=("edp", "ep"),
    )


def name_param_group(name: str, source: str) -> str:
    """A name for a split-off expert group under which DeepSpeed still finds its process groups.

    DeepSpeed looks a group of parameters up by its name, while LearningRateMonitor wants every name once; so a
    name of its own (``ep_size_2_decay``) is made to lead to the groups of ``ep_size_2``.
    """
    alias = f"{name}_{source}"
    for by_name in _dictionaries_of_groups():
        by_name[alias] = by_name[name]
    return alias


def _dictionaries_of_groups() -> list[dict[str, Any]]:
    """Where DeepSpeed keeps groups and their ranks by name (``ep_size_2``)."""
    from deepspeed.utils import groups

    return [
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ]


def _place_expert_parameter(parameter: nn.Parameter, name: str, edp_group: dist.ProcessGroup) -> None:
    """ZeRO-3 partitions this parameter over its EDP group; every other one over the world."""
    parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
    parameter.ds_zero_partition_group_name = name  # type: ignore[attr-defined]
    parameter.ds_zero_partition_process_group = edp_group  # type: ignore[attr-defined]


@cache
def _adopted_moe(kind: type[MoE]) -> type[MoE]:
    """The layer's own class, a user's subclass included, as DeepSpeed's engine recognises it."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class DeepSpeedMoE(kind, AutoEPMoELayer):  # type: ignore[misc, valid-type]
        """Never runs AutoEPMoELayer's own code."""

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """The groups were made before the model; there is nothing left to bind."""

    return DeepSpeedMoE


@cache
def _adopted_experts(kind: type[GroupedExperts]) -> type[GroupedExperts]:
    class DeepSpeedExperts(kind):  # type: ignore[misc, valid-type]
        """DeepSpeed's checkpoints name three matrices an expert and ours has two: the third is an empty one."""

        @property
        def w3(self) -> Tensor:
            """Empty, [L, 0, 0]."""
            empty: Tensor = self.w2.new_empty((len(self.expert_ids), 0, 0)).requires_grad_()
            empty.ds_autoep_uc_meta = self.w2.ds_autoep_uc_meta  # type: ignore[attr-defined]
            return empty

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            state_dict.pop(prefix + "w3", None)
            super()._load_from_state_dict(state_dict, prefix, *args)

    return DeepSpeedExperts


def adopt_layer(layer: MoE) -> None:
    """Turns a sharded layer, in place, into one that DeepSpeed's engine recognises; weights stay untouched."""
    from deepspeed.checkpoint import autoep_affine as affine
    from deepspeed.checkpoint import constants
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    if not isinstance(layer, AutoEPMoELayer):
        layer.__class__ = _adopted_moe(type(layer))  # type: ignore[assignment, arg-type]
        layer.experts.__class__ = _adopted_experts(type(layer.experts))  # type: ignore[assignment, arg-type]
    groups = layer.groups
    adopted: Any = layer
    adopted.ep_size, adopted.ep_rank = groups.ep_size, groups.ep_rank
    adopted.ep_group, adopted.ep_group_name = groups.ep_group, f"ep_size_{groups.ep_size}"
    placement = affine.legacy_uniform_autoep_placement_descriptor(
        layer.num_experts, layer.num_local_experts, groups.ep_size
    )
    adopted.expert_placement_descriptor = placement
    for weight in (layer.experts.w1, layer.experts.w2):
        shape = [layer.num_experts, *getattr(weight, "ds_shape", weight.shape)[1:]]
        weight.ds_autoep_uc_meta = {  # type: ignore[attr-defined]
            constants.AUTOEP_EXPERT_PLACEMENT: placement,
            constants.AFFINE_MAP: affine.autoep_placement_to_affine_map(placement, shape).to_dict(),
            constants.AUTOEP_PARAM_LOGICAL_SHAPE: shape,
            constants.AUTOEP_PARAM_EP_RANK: groups.ep_rank,
            constants.AUTOEP_PARAM_LOCAL_EXPERTS: list(layer.experts.expert_ids),
        }


def release_earlier_engine(model: nn.Module) -> None:
    """Takes the hooks of an earlier run's ZeRO-3 engine off the parameters, which the next one would meet there."""
    earlier = {id(o): o for p in model.parameters() if (o := getattr(p, "_z3_optimizer", None)) is not None}
    for optimizer in earlier.values():
        optimizer.destroy()


def ignore_deprecations() -> None:
    """Silences torch 2.13's word to DeepSpeed 0.19, at every step of ZeRO 3, on names that it renamed."""
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=rf".*{name}.* is deprecated", category=FutureWarning)


def native_moe_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers of DeepSpeed's own class ``deepspeed.moe.layer.MoE``."""
    from deepspeed.moe.layer import MoE as NativeMoE

    return ((name, module) for name, module in model.named_modules() if isinstance(module, NativeMoE))


def initialize(
    model: nn.Module,
    config: dict[str, Any],
    device: torch.device,
    optimizer: Optimizer | None = None,
    lr_scheduler: Any = None,
) -> tuple[DeepSpeedEngine, Any]:
    """``deepspeed.initialize`` on any device; without an optimizer the engine only evaluates.

    Returns:
        The engine, and DeepSpeed's optimizer around ``optimizer``.
    """
    import deepspeed

    # A CPU has no index, and DeepSpeed compares whatever it is given with 0.
    device_rank = {} if device.index is None else {"args": Namespace(device_rank=device.index)}
    initialized, wrapped, _, _ = deepspeed.initialize(
        config=config,
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad] if optimizer else [],
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        dist_init_required=False,
        **device_rank,
    )
    return initialized, wrapped


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters and leaves the buffers, as the engine does in mixed precision."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def clip_unpartitioned_gradients(engine: DeepSpeedEngine, ep_group: dist.ProcessGroup, max_norm: float) -> float:
    """Global gradient norm at ZeRO 0, and clipping to it where ``max_norm`` is above 0.

    DeepSpeed averages the ranks' local norms in fp32, and leaves experts out in bf16 (its issue 8475). Here the
    squares of this rank's experts are summed over the EP group, whose ranks hold every expert once.

    Returns:
        The norm before clipping, without the loss scale; not finite after an overflow, when nothing is clipped.
    """
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    squares_2 = torch.zeros(2, device=engine.device)
    for parameter in parameters:
        square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
        squares_2[int(is_expert_parameter(parameter))] += square
    expert_square = squares_2[1].clone()
    dist.all_reduce(expert_square, group=ep_group)
    scale = float(getattr(engine.optimizer, "cur_scale", 1.0)) if engine.fp16_enabled() else 1.0
    norm = float((squares_2[0] + expert_square).sqrt()) / scale
    if max_norm > 0 and norm > max_norm and norm < float("inf"):
        torch._foreach_mul_([p.grad for p in parameters], max_norm / (norm + 1e-6))
    return norm


@contextmanager
def plain_checkpoints(engine: DeepSpeedEngine) -> Iterator[None]:
    """Saves and loads inside this scope as for a dense model: every rank its own partitions.

    At ZeRO 3 that is already complete and exact, while the special case for experts there insists on three
    partitioned matrices an expert and ours has two.
    """
    engine.has_moe_layers, before = False, engine.has_moe_layers
    try:
        yield
    finally:
        engine.has_moe_layers = before


def full_parameter(parameter: nn.Parameter, groups: ExpertGroups) -> Tensor:
    """The whole of a parameter on every rank, whatever ZeRO stage and EP group it is spread over. Collective.

    Returns:
        A detached copy; for an expert parameter [E, ...] of all ranks' experts.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        whole = parameter.detach().clone()
    if is_expert_parameter(parameter) and groups.ep_size > 1:
        shards = [torch.empty_like(whole) for _ in range(groups.ep_size)]
        dist.all_gather(shards, whole.contiguous(), group=groups.ep_group)
        whole = torch.cat(shards)
    return whole


__all__ = [
    "adopt_layer",
    "cast_parameters",
    "clip_unpartitioned_gradients",
    "device_mesh",
    "full_parameter",
    "ignore_deprecations",
    "initialize",
    "name_param_group",
    "native_moe_layers",
    "new_expert_groups",
    "plain_checkpoints",
    "prepare_import",
    "release_earlier_engine",
    "use_cpu",
]

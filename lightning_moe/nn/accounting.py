"""What a model costs: floating-point operations per token, bytes to other ranks, and how many parameters are where.

From shapes alone, on one rank, before or after experts are spread over ranks and ZeRO 3 has partitioned parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_moe.dispatch import FixedShape
from lightning_moe.dispatch.expected import ExpectedBytes, expected_bytes
from lightning_moe.nn.capacity import expert_capacity
from lightning_moe.nn.layer import MoE
from lightning_moe.nn.router import Router
from lightning_moe.nn.router.noisy import NoisyTopKRouter

_MULTIPLIES = (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, Router)
"""Modules whose own matrices every token is multiplied by; what else they hold in parts are modules themselves."""

_PASSES = 3
"""Products of training for each of forward's: backward makes one for the input's gradient and one for the weight's."""


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a model has; what several modules share counts once.

    Args:
        total: Over all ranks, each expert once.
        active: That a token meets: all that are of no routed expert, and of those top_k / num_experts.
        local: That this rank keeps: its experts, and of what ZeRO 3 partitions its part without padding.
        expert_total: Of ``total``, those of routed experts.
        expert_active: Of ``active``, those of routed experts.
        expert_local: Of ``local``, those of routed experts.
    """

    total: int
    active: int
    local: int
    expert_total: int
    expert_active: int
    expert_local: int


def active_flops_per_token(model: nn.Module, training: bool = True) -> int:
    """Floating-point operations (FLOPs) per token, for utilisation (MFU) in Lightning's ``ThroughputMonitor``.

    2 for each weight that a token is multiplied by, and in training three times that: backward makes two products for
    each of forward's (Kaplan et al. 2020, section 2.1; PaLM, Chowdhery et al. 2022, appendix B). A routed expert's
    weights count ``top_k / num_experts``, for ``expert_choice`` ``capacity_factor / num_experts``, whatever is
    dropped; shared experts, the residual MLP and the router count wholly, as do ``nn.Linear``, convolutions (a token
    is an output position), recurrent cells and ``nn.MultiheadAttention``. Embeddings, norms and activations do not
    count, nor do what activation checkpointing computes again and products that a module makes with parameters of its
    own: add those. What is frozen counts as if it learned.

    A module counts once, however often forward calls it: a layer that is used n times has to be added n - 1 times. A
    head that shares its weight with the embedding counts once, too: as the product that it is.

    Attention scores depend on the sequence, so that they are left out. Per token of a sequence of length S, for heads
    that are ``hidden_size`` wide together, add ``12 * num_layers * hidden_size * S`` in training for full attention,
    and ``6 * num_layers * hidden_size * (S + 1)`` for causal (a third of either without training).

    ``ThroughputMonitor`` asks the module for the FLOPs of this rank's batch::

        @property
        def flops_per_batch(self) -> int:
            return active_flops_per_token(self) * self.batch_size * self.sequence_length

    Args:
        model: Anything with :class:`~lightning_moe.MoE` layers, or none. Before FSDP has flattened its parameters.
        training: Forward and backward; otherwise forward.

    >>> from lightning_moe.config import MoEConfig
    >>> moe = MoE(8, MoEConfig(num_experts=4, top_k=2, intermediate_size=16))
    >>> 2 * (4 * 8 + 2 * 3 * 8 * 16)  # router, and 2 experts of 3 matrices: gate, up and down
    1600
    >>> active_flops_per_token(moe, training=False), active_flops_per_token(moe)
    (1600, 4800)
    """
    weights = sum(_weights_of_experts(module, training) for module in model.modules() if isinstance(module, MoE))
    for module in model.modules():
        if isinstance(module, _MULTIPLIES):
            weights += sum(num_elements(matrix) for matrix in _matrices(module, training))
    return 2 * weights * (_PASSES if training else 1)


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Counts parameters; nothing is communicated.

    Args:
        model: Anything. Routed experts are those of :class:`~lightning_moe.MoE` layers.

    >>> from lightning_moe.config import MoEConfig
    >>> parameter_counts(MoE(8, MoEConfig(num_experts=4, top_k=2, intermediate_size=16)))
    ParameterCounts(total=1568, active=800, local=1568, expert_total=1536, expert_active=768, expert_local=1536)
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    of_experts = {id(parameter) for layer in layers for parameter in layer.experts.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in of_experts]
    dense, dense_local = sum(map(num_elements, others)), sum(map(num_elements_here, others))
    total = sum(_weights_of_an_expert(layer) * layer.num_experts for layer in layers)
    active = sum(_weights_of_experts(layer, training=True) for layer in layers)
    local = sum(num_elements_here(parameter) for layer in layers for parameter in layer.experts.parameters())
    return ParameterCounts(dense + total, dense + active, dense_local + local, total, active, local)


def experts_per_token(layer: MoE, training: bool = True) -> float:
    """Experts that a token goes to, a mean where experts choose; what is dropped for lack of room counts."""
    config = layer.config
    if not layer.router.fits_capacity:
        return config.top_k
    factor = config.capacity_factor if training else config.eval_capacity_factor or config.capacity_factor
    return min(factor or config.top_k, config.num_experts)


def expected_bytes_of(layer: MoE, num_tokens: int) -> ExpectedBytes:
    """What a rank is expected to send to others for one micro-batch, in training.

    As :func:`~lightning_moe.dispatch.expected.expected_bytes`, with what the layer knows: sizes, what it pads to, and
    the dtype of its weights, which an engine for bf16 gives to activations, too.

    Args:
        layer: Whose dispatcher.
        num_tokens: Of each rank.

    Raises:
        ValueError: the dispatcher is one of your own.
    """
    config, shape = layer.config, _fixed_shape(layer, num_tokens)
    parts = 1 if shape is None else config.overlap_chunks  # each is padded for itself
    sent = expected_bytes(
        layer.dispatcher,
        num_tokens,
        layer.hidden_size,
        max(1, round(experts_per_token(layer))),
        dtype_of(layer),
        None if shape is None else shape.of_chunk(parts),
        getattr(torch, config.router_dtype),
    )
    return ExpectedBytes(parts * sent.forward, parts * sent.backward)


def dtype_of(layer: MoE) -> torch.dtype:
    """Of the experts' weights."""
    return next(layer.experts.parameters()).dtype


def num_elements(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, of which ZeRO 3 may have left none in place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def num_elements_here(parameter: nn.Parameter) -> int:
    """Numbers of a parameter that this rank keeps, of a partitioned one its part without padding."""
    partitioned: Any = parameter
    if hasattr(parameter, "ds_tensor"):
        size: int = partitioned.ds_tensor.ds_numel
        return max(0, min(size, partitioned.ds_numel - size * partitioned.ds_zero_partition_rank))
    if hasattr(parameter, "to_local"):  # a DTensor, as FSDP makes them
        return int(partitioned.to_local().numel())
    return parameter.numel()


def _fixed_shape(layer: MoE, num_tokens: int) -> FixedShape | None:
    """As :func:`lightning_moe.nn.placing.place` pads, where all ranks have as many tokens."""
    config = layer.config
    if not config.pad_to_capacity or config.capacity_factor is None:
        return None
    if layer.router.fits_capacity:
        return FixedShape(num_tokens, int(layer.router.rows_per_expert(num_tokens, training=True)))
    settings = config.num_experts, config.top_k, config.capacity_factor, config.min_capacity
    return FixedShape(num_tokens, int(expert_capacity(num_tokens, *settings)))


def _weights_of_an_expert(layer: MoE) -> int:
    return sum(map(num_elements, layer.experts.parameters())) // layer.num_local_experts


def _weights_of_experts(layer: MoE, training: bool) -> int:
    """Of those that a token goes to."""
    return round(_weights_of_an_expert(layer) * experts_per_token(layer, training))


def _matrices(module: nn.Module, training: bool) -> Iterator[nn.Parameter]:
    for name, parameter in module.named_parameters(recurse=False):
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and not name.startswith("bias")
        is_idle = name == "noise_weight" and isinstance(module, NoisyTopKRouter) and not training
        if is_matrix and not is_idle:
            yield parameter

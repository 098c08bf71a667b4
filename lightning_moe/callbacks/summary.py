"""What a run is made of: a table of its MoE layers when it starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_moe.callbacks._layers import RoutingCallback, names_of
from lightning_moe.callbacks._summary_text import (
    common_name,
    counted,
    fill,
    layer_label,
    notes_of,
    scaled,
    shortened,
    table,
    wrapped,
)
from lightning_moe.dispatch.allgather import AllGatherDispatcher
from lightning_moe.dispatch.alltoall import AllToAllDispatcher
from lightning_moe.dispatch.deep_ep import DeepEPDispatcher, HopperDispatcher
from lightning_moe.dispatch.expected import ExpectedBytes
from lightning_moe.dispatch.fused import FusedDispatcher
from lightning_moe.dispatch.local import LocalDispatcher
from lightning_moe.nn import Decision, MoE
from lightning_moe.nn.accounting import (
    active_flops_per_token,
    dtype_of,
    expected_bytes_of,
    experts_per_token,
    parameter_counts,
)
from lightning_moe.parallel import Topology

_TOKENS = 1000
"""For which bytes are told before the number of a batch is known."""


class MoESummary(RoutingCallback):
    """Logs what the MoE layers of a model are and cost, on rank zero, once when ``fit`` starts.

    A line for each kind of layer (layers that are alike share one), then the dispatcher and why it is that one,
    parameters, FLOPs per token, the groups of ranks, and the bytes that 1,000 tokens are expected to send to other
    ranks. After the first optimizer step one more line tells how many tokens rank zero really had, and the bytes of a
    step with as many.

    Bytes are expectations, for experts drawn evenly and without what activation checkpointing sends again
    (:func:`~lightning_moe.nn.accounting.expected_bytes_of`); FLOPs are without attention scores
    (:func:`~lightning_moe.nn.accounting.active_flops_per_token`).

    Raises:
        MisconfigurationException: at fit start, where the model has no MoE layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counters: list[_TokenCounter] = []
        self._micro_batches = 0

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if trainer.is_global_zero:
            rank_zero_info(summary_of(pl_module, self.layers, trainer.world_size))

    @override
    def attach(self, pl_module: L.LightningModule) -> None:
        self._counters, self._micro_batches = [_TokenCounter() for _ in self.layers], 0
        for layer, counter in zip(self.layers, self._counters, strict=True):
            layer.tap.watchers.append(counter)

    @override
    def detach(self) -> None:
        for layer, counter in zip(self.layers, self._counters, strict=False):
            layer.tap.watchers.remove(counter)
        self._counters = []

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._micro_batches += 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._counters:
            return
        tokens_by_layer = [counter.tokens for counter in self._counters]
        if trainer.is_global_zero and any(tokens_by_layer):
            rank_zero_info(first_step_of(self.layers, tokens_by_layer, self._micro_batches))
        self.detach()


class _TokenCounter:
    """Keeps how many tokens a layer had in every micro-batch, padding included: a number of the host, not a tensor."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def look(self, decision: Decision) -> int:
        return decision.tokens.num_tokens

    def count(self, looked: int) -> None:
        self.tokens.append(looked)


@dataclass(frozen=True)
class _Kind:
    """What layers have in common that share a line.

    Args:
        cells: Of the line, behind index and name.
        dispatch: Dispatcher, why, and how tokens travel.
        overflow: What happens above capacity; empty where there is none.
    """

    cells: tuple[str, ...]
    dispatch: str
    overflow: str


_COLUMNS = ("layers", "module", "router", "top_k", "experts", "on rank 0", "ffn size", "capacity")


def summary_of(model: L.LightningModule, layers: Sequence[MoE], world_size: int) -> str:
    """The table and what is below it, as rank zero of so many sees it.

    Args:
        model: Whose layers they are.
        layers: In the order of the model's modules, at least one.
        world_size: Ranks that train it.
    """
    names = names_of(layers, model)
    by_kind: dict[_Kind, list[int]] = {}
    for index, layer in enumerate(layers):
        by_kind.setdefault(_kind_of(layer), []).append(index)
    labels = {kind: layer_label(indices) for kind, indices in by_kind.items()}
    lines = [(labels[kind], common_name([names[i] for i in indices]), *kind.cells) for kind, indices in by_kind.items()]
    flops = scaled(active_flops_per_token(model), "FLOPs")
    notes = [
        *notes_of("dispatcher", {labels[kind]: kind.dispatch for kind in by_kind}),
        *notes_of("above capacity", {labels[kind]: kind.overflow for kind in by_kind if kind.overflow}),
        *_groups(world_size, layers[0].groups.ep_size),
        ("compute", f"{flops} per token in training, without attention scores"),
        ("sent", _sent(layers)),
    ]
    title = f"MoESummary: {type(model).__name__} has {counted(len(layers), 'MoE layer')}."
    return "\n".join([title, "", *table([_COLUMNS, *lines]), "", *_parameters(model), "", *wrapped(notes)])


def _kind_of(layer: MoE) -> _Kind:
    config = layer.config
    top_k, beside = experts_per_token(layer), ""
    if config.num_shared_experts:
        beside = f" + {config.num_shared_experts} shared"
    elif config.residual:
        beside = " + dense MLP"
    cells = (
        shortened(config.router, 16),
        f"mean {top_k:.4g}" if layer.router.fits_capacity else str(top_k),
        f"{layer.num_experts}{beside}",
        str(layer.num_local_experts),
        str(config.intermediate_size or 4 * layer.hidden_size),
        _capacity(layer),
    )
    dispatch = f"{_name_of(layer)} ({_why(layer)})"
    if layer.groups.ep_size > 1:
        dispatch += f", in {config.overlap_chunks} parts (overlap_chunks)" * (config.overlap_chunks > 1)
        dispatch += f", as {config.dispatch_dtype} (dispatch_dtype)" * (config.dispatch_dtype is not None)
    return _Kind(cells, dispatch, _overflow(layer))


_NAMES: dict[type, str] = {
    LocalDispatcher: "local",
    AllGatherDispatcher: "allgather",
    AllToAllDispatcher: "alltoall",
    FusedDispatcher: "fused",
    HopperDispatcher: "fused",
    DeepEPDispatcher: "fused",
}


def _name_of(layer: MoE) -> str:
    return _NAMES.get(type(layer.dispatcher), layer.config.dispatcher)


def _why(layer: MoE) -> str:
    asked, size, tuner = layer.config.dispatcher, layer.groups.ep_size, layer.tuner
    if tuner is not None and tuner.chosen is not None:
        return "tune: the fastest in its trials"
    if tuner is not None:
        *others, last = tuner.candidates
        tried = f"{', '.join(others)} and {last}"
        return f"tune: for now; the fastest of {tried} once it has timed {tuner.TRIALS} micro-batches"
    if asked == "auto" and size > 1:
        return f"auto: expert_parallel_size {size} > 1"
    if asked != _name_of(layer):
        instead = asked if asked in ("auto", "tune") else f"in place of {asked}"
        return f"{instead}: expert_parallel_size 1, every rank holds all experts"
    return "as configured" + ", by DeepEP where it takes the tokens" * isinstance(layer.dispatcher, HopperDispatcher)


def _capacity(layer: MoE) -> str:
    """Factors in training and, where it is another, at evaluation."""
    config = layer.config
    at_evaluation = config.eval_capacity_factor
    if layer.router.fits_capacity:
        at_evaluation = at_evaluation or config.capacity_factor
    train, evaluation = ("none" if f is None else f"{f:.4g}" for f in (config.capacity_factor, at_evaluation))
    return train if train == evaluation else f"{train}, eval {evaluation}"


def _overflow(layer: MoE) -> str:
    config = layer.config
    padded = "; experts' rows are padded to capacity" * config.pad_to_capacity
    if layer.router.fits_capacity:
        return f"nothing: experts choose as many tokens as they have room for{padded}"
    if config.capacity_factor is None and config.eval_capacity_factor is None:
        return ""
    which = {"score": "of lowest score", "position": "that come last", "random": "drawn by chance"}
    fate = "are dropped" if config.overflow == "drop" else "go to their token's next-best expert that has room"
    return f"assignments {which[config.drop_priority]} {fate}{padded}"


def _groups(world_size: int, ep_size: int) -> list[tuple[str, str]]:
    if world_size == 1:
        return [("ranks", "1: it holds all experts")]
    topology = Topology(world_size, ep_size)
    all_once = "A group holds all experts once; tokens travel inside it." if ep_size > 1 else "Each holds all experts."
    average = "Its ranks hold the same experts and average their gradients."
    if topology.edp_size == 1:
        average = "No other rank holds the same experts."
    return [
        ("EP groups", f"{_ranks(topology.ep_groups)}. {all_once}"),
        ("EDP groups", f"{_ranks(topology.edp_groups)}. {average}"),
    ]


def _ranks(groups: Sequence[Sequence[int]]) -> str:
    shown = [f"({_members(group)})" for group in groups]
    if len(shown) > 4:
        shown = [*shown[:2], "...", shown[-1]]
    return f"{counted(len(groups), 'group')} of {counted(len(groups[0]), 'rank')}: {' '.join(shown)}"


def _members(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return " ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]} {ranks[1]} ... {ranks[-1]}"


def _parameters(model: L.LightningModule) -> list[str]:
    counts = parameter_counts(model)
    lines = [
        ("parameters", "total", "active per token", "on rank 0"),
        ("all", *(f"{n:,}" for n in (counts.total, counts.active, counts.local))),
        ("routed experts", *(f"{n:,}" for n in (counts.expert_total, counts.expert_active, counts.expert_local))),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]


_NOT_SENT = "The MoE layers send nothing to other ranks"
_UNKNOWN = "is not known: the dispatcher is one of your own"


def _sent(layers: Sequence[MoE]) -> str:
    if layers[0].groups.ep_size == 1:
        return f"{_NOT_SENT}: every rank holds all experts."
    sent = _sum_of((layer, _TOKENS) for layer in layers)
    if sent is None:
        return f"What is sent {_UNKNOWN}."
    dtypes = " and ".join(dict.fromkeys(layer.config.dispatch_dtype or str(dtype_of(layer))[6:] for layer in layers))
    less = ", and less with router='group_limited'" * any(layer.config.router == "group_limited" for layer in layers)
    return (
        f"With {_TOKENS:,} tokens on each rank, each is expected to send {scaled(sent.forward, 'B')} to others in "
        f"forward and {scaled(sent.backward, 'B')} in backward: all layers, {dtypes}, experts drawn evenly{less}."
    )


def first_step_of(layers: Sequence[MoE], tokens_by_layer: Sequence[Sequence[int]], micro_batches: int) -> str:
    """What rank zero's first step had, and what it sends in a step like it.

    Args:
        layers: All.
        tokens_by_layer: Tokens of every micro-batch.
        micro_batches: How many the step had.
    """
    seen = [number for tokens in tokens_by_layer for number in tokens]
    numbers = f"{min(seen):,}" if min(seen) == max(seen) else f"{min(seen):,} to {max(seen):,}"
    had = f"MoESummary: the first step of rank 0 had {counted(micro_batches, 'micro-batch', 'es')} of {numbers} tokens."
    if layers[0].groups.ep_size == 1:
        return fill(f"{had} {_NOT_SENT}.")
    pairs = zip(layers, tokens_by_layer, strict=True)
    sent = _sum_of((layer, number) for layer, tokens in pairs for number in tokens)
    if sent is None:
        return fill(f"{had} What such a step sends {_UNKNOWN}.")
    return fill(f"{had} In such a step it is expected to send {scaled(sent.total, 'B')} to other ranks.")


def _sum_of(tokens: Iterable[tuple[MoE, int]]) -> ExpectedBytes | None:
    """Of micro-batches of so many tokens; ``None`` where nobody here knows the dispatcher."""
    forward = backward = 0.0
    for layer, num_tokens in tokens:
        if type(layer.dispatcher) not in _NAMES:
            return None
        sent = expected_bytes_of(layer, num_tokens)
        forward, backward = forward + sent.forward, backward + sent.backward
    return ExpectedBytes(forward, backward)

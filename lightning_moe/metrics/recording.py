"""Feeds metrics with what the MoE layers of a model decide, in any loop.

Shapes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_moe.metrics._base import RoutingMetric
from lightning_moe.nn import Decision, MoE

Metrics = Metric | MetricCollection | Mapping[str, Metric]


@contextmanager
def recording(model: nn.Module, metrics: Metrics) -> Iterator[None]:
    """While inside, all MoE layers of a model update metrics, as layer 0, 1, ... in the order of its modules.

    In training a micro-batch counts in backward, once, whatever is recomputed; a forward without a backward does not
    count. In evaluation it counts in forward. What was decided inside counts also where its backward comes later.

    >>> import torch
    >>> from lightning_moe import MoEConfig
    >>> from lightning_moe.metrics import ExpertLoad
    >>> model = nn.Sequential(MoE(8, MoEConfig(num_experts=4, top_k=2, intermediate_size=16))).eval()
    >>> load = ExpertLoad(num_experts=4)
    >>> with recording(model, load):
    ...     _ = model(torch.randn(5, 8))
    >>> int(load.compute().sum())
    10

    Args:
        model: Has one MoE layer or more.
        metrics: One, several in a collection, or by name in a dictionary. They have to be on the model's device.

    Raises:
        ValueError: the model has no MoE layer, or a metric was made for others than its layers.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer. Give the model, or the part of it, that has some.")
    collection = _as_collection(metrics)
    _check_sizes(collection, tuple(layer.num_experts for layer in layers))
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            watcher = _MetricWatcher(collection, index)
            for watchers in (layer.tap.watchers, layer.tap.eval_watchers):
                watchers.append(watcher)
                stack.callback(watchers.remove, watcher)
        yield


_INPUTS: dict[str, Callable[[Decision], Any]] = {
    "topk_ids_TK": lambda decision: decision.chosen.topk_ids_TK,
    "placed_ids_TK": lambda decision: decision.placed_ids_TK,
    "kept_TK": lambda decision: decision.kept_TK,
    "assigned_TK": lambda decision: decision.chosen.assigned_TK,
    "probs_TE": lambda decision: decision.probs_TE,
    "valid_T": lambda decision: decision.tokens.valid_T,
    "capacity": lambda decision: decision.placed.capacity,
}
"""What updates take, by name."""


class _MetricWatcher:
    """Gives metrics what a layer decided."""

    def __init__(self, metrics: MetricCollection, layer: int) -> None:
        self.metrics = metrics
        self.layer = layer
        arguments = [signature(metric.update).parameters for metric in _members(metrics).values()]
        self.names = [name for name in _INPUTS if any(name in names for names in arguments)]

    def look(self, decision: Decision) -> dict[str, Any]:
        """Only what some metric asks for: the rest need not be kept until backward."""
        return {name: _INPUTS[name](decision) for name in self.names}

    def count(self, looked: dict[str, Any]) -> None:
        """Each metric takes from it what its ``update`` has an argument for."""
        self.metrics.update(**looked, layer=self.layer)


def _as_collection(metrics: Metrics) -> MetricCollection:
    if isinstance(metrics, MetricCollection):
        return metrics
    # Without groups: the metrics are the caller's, who resets and computes them one by one.
    if isinstance(metrics, Metric):
        return MetricCollection([metrics], compute_groups=False)
    return MetricCollection(dict(metrics), compute_groups=False)


def _check_sizes(collection: MetricCollection, num_experts: tuple[int, ...]) -> None:
    for name, metric in _members(collection).items():
        if isinstance(metric, RoutingMetric) and metric.num_experts != num_experts:
            raise ValueError(
                f"{name} has num_experts={list(metric.num_experts)}: the layers of the model have {list(num_experts)}. "
                "Give the metric these."
            )


def _members(collection: MetricCollection) -> dict[str, Metric]:
    return dict(collection.items(keep_base=True, copy_state=False))

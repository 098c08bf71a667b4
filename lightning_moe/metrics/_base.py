"""What the metrics share.

Shapes: T tokens, K experts per token, E experts of the layer with most, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_moe.metrics.functional import is_assigned, mean_over_layers


class RoutingMetric(Metric):
    """Base of the metrics: sums per layer, of fixed shapes, which add up over micro-batches and ranks.

    Updates take plain tensors, by the names that every metric uses for the same thing, so that a
    ``MetricCollection`` hands each metric what it needs.

    Args:
        num_experts: E; a sequence has one number per layer.
        num_layers: L, where ``num_experts`` is one number.
        per_layer: Compute one value per layer, [L], and not their mean over the layers that saw tokens.
        kwargs: Of :class:`torchmetrics.Metric`; ``compute_with_cache`` is off unless given.

    Attributes:
        num_experts: One number per layer.
        num_layers: L.

    Raises:
        ValueError: a number is below 1, or there are not ``num_layers`` of them.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    plot_legend_name: str | None = "layer"

    num_experts_L: Tensor

    def __init__(
        self, num_experts: int | Sequence[int], num_layers: int = 1, per_layer: bool = False, **kwargs: Any
    ) -> None:
        # With its cache, torchmetrics takes no part in the sum over ranks where this rank has had no update since the
        # last compute(), and ranks that had some wait for it for ever.
        super().__init__(**{"compute_with_cache": False, **kwargs})
        self.num_experts = _one_per_layer(num_experts, num_layers)
        self.num_layers = len(self.num_experts)
        self.per_layer = per_layer
        self.register_buffer("num_experts_L", torch.tensor(self.num_experts), persistent=False)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draws a value, or several as they follow each other.

        Args:
            val: What ``compute`` or ``forward`` returned, or a list of such; ``None`` computes.
            ax: Axes to draw on; ``None`` makes a figure.

        Returns:
            The figure, ``None`` where ``ax`` was given, and the axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return self._plot(val, ax)

    def _add_sums(self, **shapes: tuple[int, ...]) -> None:
        """Declares whole-number sums, [L, ...]."""
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros((self.num_layers, *shape), dtype=torch.int64), dist_reduce_fx="sum")

    def _add_to(self, name: str, layer: int, value: Tensor | int) -> None:
        """Adds to a layer's sum; ``value`` may be smaller where the layer has fewer experts.

        Out of place: a state that was made in inference mode cannot be written to outside of it.
        """
        total: Tensor = getattr(self, name)
        more = torch.zeros_like(total)
        part = more[layer]
        for dim, size in enumerate(torch.as_tensor(value).shape):
            part = part.narrow(dim, 0, size)
        part += value
        setattr(self, name, total + more)

    def _value_of(self, values_L: Tensor, seen_L: Tensor, empty: float = 0.0) -> Tensor:
        return values_L if self.per_layer else mean_over_layers(values_L, seen_L, empty)

    def _refuse_axes(self, ax: object) -> None:
        if ax is not None:
            raise ValueError(
                f"ax={ax}: {type(self).__name__} draws a heatmap in a figure of its own. Leave ax out, and plot the "
                "metrics of a collection one by one."
            )

    def _check(self, layer: int, **given: Tensor | None) -> None:
        """Whether an update fits this metric; on the CPU its values, too, for which one would wait on CUDA.

        Args:
            layer: Its index.
            given: By name, whose last letters say of what shape; the first has two dimensions, and the others' are as
                its own.

        Raises:
            ValueError: something does not fit.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(
                f"layer={layer}: {type(self).__name__} was made for {self.num_layers} layer"
                f"{'s' * (self.num_layers > 1)}, counted from 0. Give the number of MoE layers as num_layers."
            )
        (name_of_first, first), *_ = given.items()
        assert first is not None
        letters = name_of_first.rpartition("_")[2]
        if first.ndim != 2:
            raise ValueError(
                f"{name_of_first} has shape {list(first.shape)}: must be [{', '.join(letters)}]. Flatten the tokens."
            )
        for name, value in given.items():
            expected = first.shape if name.endswith(letters) else first.shape[:1]
            if value is not None and value.shape != expected:
                raise ValueError(
                    f"{name} has shape {list(value.shape)}: must be {list(expected)} as of {name_of_first}. Give one "
                    f"value per {'assignment' if name.endswith('_TK') else 'token'}."
                )
            if value is not None:
                _check_dtype(name, value)
        if first.device.type == "cpu" and "ids" in name_of_first:
            counts_TK = is_assigned(first, given.get("assigned_TK"), given.get("valid_T"))
            for name, value in given.items():
                if "ids" in name and value is not None:
                    _check_ids(name, value[counts_TK], self.num_experts[layer], layer)

    @override
    def extra_repr(self) -> str:
        """Shows the layers."""
        return f"num_experts={list(self.num_experts)}"


def _check_dtype(name: str, value: Tensor) -> None:
    is_whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if "ids" in name and not is_whole:
        raise ValueError(f"{name} has dtype {value.dtype}: must be whole numbers. Give the ids of experts as int64.")
    if "probs" in name and not value.is_floating_point():
        raise ValueError(f"{name} has dtype {value.dtype}: must be floating point. Give the router's probabilities.")
    if not ("ids" in name or "probs" in name or value.dtype == torch.bool):
        raise ValueError(f"{name} has dtype {value.dtype}: must be torch.bool. Use {name}.bool().")


def _check_ids(name: str, ids: Tensor, num_experts: int, layer: int) -> None:
    outside = ids[(ids < 0) | (ids >= num_experts)]
    if len(outside):
        raise ValueError(
            f"{name} has {int(outside[0])}: must be from 0 to {num_experts - 1}, since layer {layer} was said to have "
            f"{num_experts} experts. Give num_experts of every layer, and False in assigned_TK or valid_T where there "
            "is no assignment."
        )


def _one_per_layer(num_experts: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers}: must be at least 1. Give the number of MoE layers.")
    each = (num_experts,) * num_layers if isinstance(num_experts, int) else tuple(num_experts)
    if not each or min(each) < 1:
        raise ValueError(f"num_experts={num_experts}: must be at least 1. Give the experts of every layer.")
    if num_layers not in (1, len(each)):
        raise ValueError(
            f"num_layers={num_layers}: num_experts has {len(each)} entries. Give one a layer, or leave num_layers out."
        )
    return each

"""How evenly tokens spread over the experts.

All of these keep the same sums, which a ``MetricCollection`` then counts once for all of them.

Shapes: T tokens, K experts per token, E experts of the layer with most, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_moe.metrics import figures
from lightning_moe.metrics._base import RoutingMetric
from lightning_moe.metrics.functional import EVEN, dead_experts, is_assigned, load_cv, load_imbalance
from lightning_moe.nn.balance import tokens_per_expert


class _LoadMetric(RoutingMetric):
    tokens_per_expert: Tensor

    def __init__(
        self, num_experts: int | Sequence[int], num_layers: int = 1, per_layer: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_experts, num_layers, per_layer, **kwargs)
        self._add_sums(tokens_per_expert=(max(self.num_experts),))

    @override
    def update(
        self,
        topk_ids_TK: Tensor,
        assigned_TK: Tensor | None = None,
        valid_T: Tensor | None = None,
        layer: int = 0,
    ) -> None:
        """Counts the assignments of a batch, before any is dropped.

        Args:
            topk_ids_TK: The router's choice.
            assigned_TK: False where a place holds no assignment; ``None`` is nowhere.
            valid_T: False where a token is padding; ``None`` is nowhere.
            layer: Which layer chose.

        Raises:
            ValueError: a shape, dtype or id does not fit, or there is no such layer.
        """
        self._check(layer, topk_ids_TK=topk_ids_TK, assigned_TK=assigned_TK, valid_T=valid_T)
        mask_TK = is_assigned(topk_ids_TK, assigned_TK, valid_T)
        self._add_to("tokens_per_expert", layer, tokens_per_expert(topk_ids_TK, self.num_experts[layer], mask_TK)[0])


class ExpertLoad(_LoadMetric):
    """Tokens per expert: (token, expert) pairs before any is dropped, [L, E] int64; 0 beyond a layer's experts.

    >>> load = ExpertLoad(num_experts=4)
    >>> load.update(torch.tensor([[0, 2], [0, 1], [2, 0]]))
    >>> load.compute()
    tensor([[3, 1, 2, 0]])

    Args:
        num_experts: E; a sequence has one number per layer.
        num_layers: L, where ``num_experts`` is one number.
        kwargs: Of :class:`torchmetrics.Metric`.
    """

    def __init__(self, num_experts: int | Sequence[int], num_layers: int = 1, **kwargs: Any) -> None:
        super().__init__(num_experts, num_layers, per_layer=True, **kwargs)

    @override
    def compute(self) -> Tensor:
        """Counts since the last reset, over all ranks."""
        return self.tokens_per_expert

    @override
    def plot(
        self,
        val: Tensor | Sequence[Tensor] | None = None,
        ax: None = None,
        layer_names: Sequence[str] | None = None,
        title: str = "Load of the experts",
    ) -> Any:
        """Draws layers x experts, or for a list of values of one layer, experts x updates.

        Args:
            val: What ``compute`` or ``forward`` returned, or a list of such; ``None`` computes.
            ax: Must be ``None``: a heatmap has a figure of its own.
            layer_names: Names of the modules; ``None`` numbers them.
            title: Of the figure.

        Returns:
            The figure and its axes.

        Raises:
            ValueError: ``ax`` is given, or several values of several layers.
            ModuleNotFoundError: matplotlib is not installed.
        """
        self._refuse_axes(ax)
        if val is not None and not isinstance(val, Tensor):
            if self.num_layers > 1:
                raise ValueError(
                    f"val has {len(val)} values of {self.num_layers} layers: only one layer can be drawn over time. "
                    "Use lightning_moe.metrics.figures.load_over_time_figure with the rows of the layer."
                )
            loads_SE = torch.stack([value.reshape(-1) for value in val])
            figure = figures.load_over_time_figure(range(len(val)), loads_SE, title)
            figure.axes[0].set_xlabel("value")
            return figure, figure.axes[0]
        loads_LE = (self.compute() if val is None else val).reshape(self.num_layers, -1)
        counts = [load_E[:n] for load_E, n in zip(loads_LE, self.num_experts, strict=True)]
        names = layer_names or [f"layer_{index:02d}" for index in range(self.num_layers)]
        figure = figures.load_figure(counts, names, title)
        return figure, figure.axes[0]


class LoadImbalance(_LoadMetric):
    """Largest over mean number of tokens per expert: 1 is even, E / K the most that top-K routing can do.

    1 where no tokens were seen.

    >>> imbalance = LoadImbalance(num_experts=4)
    >>> imbalance.update(torch.tensor([[0, 2], [0, 1], [2, 0]]))
    >>> imbalance.compute()
    tensor(2., dtype=torch.float64)

    Args:
        num_experts: E; a sequence has one number per layer.
        num_layers: L, where ``num_experts`` is one number.
        per_layer: Compute one value per layer, [L], and not their mean over the layers that saw tokens.
        kwargs: Of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False
    plot_lower_bound = EVEN

    @override
    def compute(self) -> Tensor:
        """Since the last reset, over all ranks."""
        imbalance_L = load_imbalance(self.tokens_per_expert, self.num_experts_L)
        return self._value_of(imbalance_L, self.tokens_per_expert.sum(1), EVEN)


class LoadCV(_LoadMetric):
    """Standard deviation / mean of the number of tokens per expert: 0 is even. 0 where no tokens were seen.

    Unlike the imbalance it minds all experts, not only the busiest.

    Args:
        num_experts: E; a sequence has one number per layer.
        num_layers: L, where ``num_experts`` is one number.
        per_layer: Compute one value per layer, [L], and not their mean over the layers that saw tokens.
        kwargs: Of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False

    @override
    def compute(self) -> Tensor:
        """Since the last reset, over all ranks."""
        cv_L = load_cv(self.tokens_per_expert, self.num_experts_L)
        return self._value_of(cv_L, self.tokens_per_expert.sum(1))


class DeadExperts(_LoadMetric):
    """Number of experts without a token since the last reset; 0 where no expert got any, for want of tokens.

    Args:
        num_experts: E; a sequence has one number per layer.
        num_layers: L, where ``num_experts`` is one number.
        per_layer: Compute one value per layer, [L], and not their mean over the layers that saw tokens.
        kwargs: Of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False

    @override
    def compute(self) -> Tensor:
        """Since the last reset, over all ranks."""
        dead_L = dead_experts(self.tokens_per_expert, self.num_experts_L)
        return self._value_of(dead_L, self.tokens_per_expert.sum(1))

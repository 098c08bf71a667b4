"""What became of the router's choice under a capacity.

Shapes: T tokens, K experts per token, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_moe.metrics._base import RoutingMetric
from lightning_moe.metrics.functional import fraction, is_assigned


class DroppedFraction(RoutingMetric):
    """Share of the assignments that found no expert with room; 0 where there were none.

    Args:
        num_experts: E; a sequence has one number per layer.
        num_layers: L, where ``num_experts`` is one number.
        per_layer: Compute one value per layer, [L], and not their mean over the layers that saw tokens.
        kwargs: Of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False
    plot_upper_bound = 1.0
    num_dropped: Tensor
    num_assignments: Tensor

    def __init__(
        self, num_experts: int | Sequence[int], num_layers: int = 1, per_layer: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_experts, num_layers, per_layer, **kwargs)
        self._add_sums(num_dropped=(), num_assignments=())

    @override
    def update(
        self,
        topk_ids_TK: Tensor,
        kept_TK: Tensor | None = None,
        assigned_TK: Tensor | None = None,
        valid_T: Tensor | None = None,
        layer: int = 0,
    ) -> None:
        """Counts a batch.

        Args:
            topk_ids_TK: The router's choice.
            kept_TK: False where an assignment has no row; ``None`` is nowhere.
            assigned_TK: False where a place holds no assignment; ``None`` is nowhere.
            valid_T: False where a token is padding; ``None`` is nowhere.
            layer: Which layer chose.

        Raises:
            ValueError: a shape, dtype or id does not fit, or there is no such layer.
        """
        self._check(layer, topk_ids_TK=topk_ids_TK, kept_TK=kept_TK, assigned_TK=assigned_TK, valid_T=valid_T)
        mask_TK = is_assigned(topk_ids_TK, assigned_TK, valid_T)
        self._add_to("num_assignments", layer, mask_TK.sum())
        if kept_TK is not None:
            self._add_to("num_dropped", layer, (mask_TK & ~kept_TK).sum())

    @override
    def compute(self) -> Tensor:
        """Since the last reset, over all ranks."""
        return self._value_of(fraction(self.num_dropped, self.num_assignments), self.num_assignments)


class ReroutedFraction(RoutingMetric):
    """Share of the assignments that another expert took, because the chosen one was full; 0 where there were none.

    Args:
        num_experts: E; a sequence has one number per layer.
        num_layers: L, where ``num_experts`` is one number.
        per_layer: Compute one value per layer, [L], and not their mean over the layers that saw tokens.
        kwargs: Of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False
    plot_upper_bound = 1.0
    num_rerouted: Tensor
    num_assignments: Tensor

    def __init__(
        self, num_experts: int | Sequence[int], num_layers: int = 1, per_layer: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_experts, num_layers, per_layer, **kwargs)
        self._add_sums(num_rerouted=(), num_assignments=())

    @override
    def update(
        self,
        topk_ids_TK: Tensor,
        placed_ids_TK: Tensor | None = None,
        assigned_TK: Tensor | None = None,
        valid_T: Tensor | None = None,
        layer: int = 0,
    ) -> None:
        """Counts a batch.

        Args:
            topk_ids_TK: The router's choice.
            placed_ids_TK: The experts after some assignments were moved; ``None`` is as chosen.
            assigned_TK: False where a place holds no assignment; ``None`` is nowhere.
            valid_T: False where a token is padding; ``None`` is nowhere.
            layer: Which layer chose.

        Raises:
            ValueError: a shape, dtype or id does not fit, or there is no such layer.
        """
        self._check(
            layer, topk_ids_TK=topk_ids_TK, placed_ids_TK=placed_ids_TK, assigned_TK=assigned_TK, valid_T=valid_T
        )
        mask_TK = is_assigned(topk_ids_TK, assigned_TK, valid_T)
        self._add_to("num_assignments", layer, mask_TK.sum())
        if placed_ids_TK is not None:
            self._add_to("num_rerouted", layer, (mask_TK & (placed_ids_TK != topk_ids_TK)).sum())

    @override
    def compute(self) -> Tensor:
        """Since the last reset, over all ranks."""
        return self._value_of(fraction(self.num_rerouted, self.num_assignments), self.num_assignments)


class CapacityUtilization(RoutingMetric):
    """Share of the rows that the experts had room for which hold an assignment.

    The capacity is per expert and rank, so that both are summed over ranks and batches. 0 where there is no capacity.

    Args:
        num_experts: E; a sequence has one number per layer.
        num_layers: L, where ``num_experts`` is one number.
        per_layer: Compute one value per layer, [L], and not their mean over the layers that had a capacity.
        kwargs: Of :class:`torchmetrics.Metric`.
    """

    higher_is_better = None  # little is wasted, much is dropped
    plot_upper_bound = 1.0
    num_rows: Tensor
    num_rows_used: Tensor

    def __init__(
        self, num_experts: int | Sequence[int], num_layers: int = 1, per_layer: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_experts, num_layers, per_layer, **kwargs)
        self._add_sums(num_rows=(), num_rows_used=())

    @override
    def update(
        self,
        topk_ids_TK: Tensor,
        kept_TK: Tensor | None = None,
        assigned_TK: Tensor | None = None,
        valid_T: Tensor | None = None,
        capacity: Tensor | int | None = None,
        layer: int = 0,
    ) -> None:
        """Counts a batch.

        Args:
            topk_ids_TK: The router's choice.
            kept_TK: False where an assignment has no row; ``None`` is nowhere.
            assigned_TK: False where a place holds no assignment; ``None`` is nowhere.
            valid_T: False where a token is padding; ``None`` is nowhere.
            capacity: Rows that each expert has for these tokens; ``None`` is any number, and leaves the batch out.
            layer: Which layer chose.

        Raises:
            ValueError: a shape, dtype or id does not fit, or there is no such layer.
        """
        self._check(layer, topk_ids_TK=topk_ids_TK, kept_TK=kept_TK, assigned_TK=assigned_TK, valid_T=valid_T)
        if capacity is None:
            return
        mask_TK = is_assigned(topk_ids_TK, assigned_TK, valid_T)
        self._add_to("num_rows", layer, capacity * self.num_experts[layer])
        self._add_to("num_rows_used", layer, (mask_TK if kept_TK is None else mask_TK & kept_TK).sum())

    @override
    def compute(self) -> Tensor:
        """Since the last reset, over all ranks."""
        return self._value_of(fraction(self.num_rows_used, self.num_rows), self.num_rows)

"""How a router chooses: how surely, what together, and how lastingly.

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
from lightning_moe.metrics.functional import EVEN, affinity, chosen_together, entropy_sum, fraction, is_assigned

_NEVER = -1  # in place of a token's experts: padding, or nothing seen yet


class RouterEntropy(RoutingMetric):
    """Mean over tokens of the entropy of the router's probabilities, / log(E): 1 is undecided, 0 is certain.

    1 where no tokens were seen.

    Args:
        num_experts: E; a sequence has one number per layer.
        num_layers: L, where ``num_experts`` is one number.
        per_layer: Compute one value per layer, [L], and not their mean over the layers that saw tokens.
        kwargs: Of :class:`torchmetrics.Metric`.
    """

    plot_upper_bound = 1.0
    entropy: Tensor
    num_tokens: Tensor

    def __init__(
        self, num_experts: int | Sequence[int], num_layers: int = 1, per_layer: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_experts, num_layers, per_layer, **kwargs)
        self._add_sums(num_tokens=())
        self.add_state("entropy", torch.zeros(self.num_layers, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, probs_TE: Tensor, valid_T: Tensor | None = None, layer: int = 0) -> None:
        """Adds a batch.

        Args:
            probs_TE: Router probabilities, which sum to 1 over the experts.
            valid_T: False where a token is padding; ``None`` is nowhere.
            layer: Which layer chose.

        Raises:
            ValueError: a shape or dtype does not fit, on the CPU a value is below 0, or there is no such layer.
        """
        self._check(layer, probs_TE=probs_TE, valid_T=valid_T)
        if probs_TE.shape[1] != self.num_experts[layer]:
            raise ValueError(
                f"probs_TE has shape {list(probs_TE.shape)}: layer {layer} was said to have "
                f"{self.num_experts[layer]} experts. Give num_experts of every layer."
            )
        if probs_TE.device.type == "cpu" and bool((probs_TE if valid_T is None else probs_TE[valid_T]).lt(0).any()):
            raise ValueError("probs_TE has values below 0: must be probabilities. Use logits.softmax(-1).")
        entropy, num_tokens = entropy_sum(probs_TE, valid_T)
        self._add_to("entropy", layer, entropy)
        self._add_to("num_tokens", layer, num_tokens)

    @override
    def compute(self) -> Tensor:
        """Since the last reset, over all ranks."""
        return self._value_of(fraction(self.entropy, self.num_tokens, EVEN), self.num_tokens, EVEN)


class ExpertAffinity(RoutingMetric):
    """How often two experts are chosen together, [L, E, E] float64.

    Entry [l, i, j] is the share of the tokens that chose expert i of layer l which also chose j: 1 on the diagonal, 0
    in the rows of experts that nobody chose and beyond a layer's experts.

    >>> together = ExpertAffinity(num_experts=3)
    >>> together.update(torch.tensor([[0, 1], [0, 1], [1, 0], [1, 2]]))
    >>> together.compute()[0]
    tensor([[1.0000, 1.0000, 0.0000],
            [0.7500, 1.0000, 0.2500],
            [0.0000, 1.0000, 1.0000]], dtype=torch.float64)

    Args:
        num_experts: E; a sequence has one number per layer.
        num_layers: L, where ``num_experts`` is one number.
        kwargs: Of :class:`torchmetrics.Metric`.
    """

    chosen_together: Tensor

    def __init__(self, num_experts: int | Sequence[int], num_layers: int = 1, **kwargs: Any) -> None:
        super().__init__(num_experts, num_layers, per_layer=True, **kwargs)
        most = max(self.num_experts)
        self._add_sums(chosen_together=(most, most))

    @override
    def update(
        self,
        topk_ids_TK: Tensor,
        assigned_TK: Tensor | None = None,
        valid_T: Tensor | None = None,
        layer: int = 0,
    ) -> None:
        """Counts the pairs of a batch, before any assignment is dropped.

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
        self._add_to("chosen_together", layer, chosen_together(topk_ids_TK, self.num_experts[layer], mask_TK))

    @override
    def compute(self) -> Tensor:
        """Since the last reset, over all ranks."""
        return affinity(self.chosen_together)

    @override
    def plot(
        self,
        val: Tensor | None = None,
        ax: None = None,
        layer: int = 0,
        title: str = "Experts chosen together",
    ) -> Any:
        """Draws experts x experts of one layer.

        Args:
            val: What ``compute`` or ``forward`` returned; ``None`` computes.
            ax: Must be ``None``: a heatmap has a figure of its own.
            layer: Which layer.
            title: Of the figure.

        Returns:
            The figure and its axes.

        Raises:
            ValueError: ``ax`` is given, or ``val`` is a list.
            ModuleNotFoundError: matplotlib is not installed.
        """
        self._refuse_axes(ax)
        if val is not None and not isinstance(val, Tensor):
            raise ValueError(f"val is a {type(val).__name__}: only one value can be drawn. Choose one of the list.")
        num_experts, most = self.num_experts[layer], max(self.num_experts)
        values_LEE = (self.compute() if val is None else val).reshape(self.num_layers, most, most)
        suffix = f", layer_{layer:02d}" if self.num_layers > 1 else ""
        figure = figures.affinity_figure(values_LEE[layer, :num_experts, :num_experts], f"{title}{suffix}")
        return figure, figure.axes[0]


class RoutingStability(RoutingMetric):
    """Share of the tokens of a fixed probe batch whose set of experts changed since the last look.

    0 is a router that has settled. Every update is a look: give it the choice for the same tokens in the same order,
    on every rank its own, as with a batch that is put aside and run in evaluation. The first look at a layer compares
    nothing, and fixes the shape. The last look outlives ``reset``, so that a metric which is read and reset at every
    validation compares each with the one before; it is not in the state that ranks sum or that checkpoints keep.

    >>> changed = RoutingStability(num_experts=4)
    >>> changed.update(torch.tensor([[0, 1], [2, 3]]))
    >>> changed.update(torch.tensor([[1, 0], [2, 0]]))  # the second token has another set
    >>> changed.compute()
    tensor(0.5000, dtype=torch.float64)

    Args:
        num_experts: E; a sequence has one number per layer.
        num_layers: L, where ``num_experts`` is one number.
        per_layer: Compute one value per layer, [L], and not their mean over the layers that compared tokens.
        kwargs: Of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False
    plot_upper_bound = 1.0
    num_changed: Tensor
    num_compared: Tensor

    def __init__(
        self, num_experts: int | Sequence[int], num_layers: int = 1, per_layer: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_experts, num_layers, per_layer, **kwargs)
        self._add_sums(num_changed=(), num_compared=())
        self.forget()

    def forget(self) -> None:
        """Takes the next look for the first, as with another probe batch."""
        for layer in range(self.num_layers):
            self.register_buffer(f"last_ids_{layer}", None, persistent=False)

    @override
    def update(
        self,
        topk_ids_TK: Tensor,
        assigned_TK: Tensor | None = None,
        valid_T: Tensor | None = None,
        layer: int = 0,
    ) -> None:
        """Looks at the probe batch.

        Args:
            topk_ids_TK: The router's choice for its tokens.
            assigned_TK: False where a place holds no assignment; ``None`` is nowhere.
            valid_T: False where a token is padding, which is not compared; ``None`` is nowhere.
            layer: Which layer chose.

        Raises:
            ValueError: a shape does not fit or is not that of the first look, or there is no such layer.
        """
        self._check(layer, topk_ids_TK=topk_ids_TK, assigned_TK=assigned_TK, valid_T=valid_T)
        last_TK: Tensor | None = getattr(self, f"last_ids_{layer}")
        if last_TK is not None and last_TK.shape != topk_ids_TK.shape:
            raise ValueError(
                f"topk_ids_TK has shape {list(topk_ids_TK.shape)}: the first look at layer {layer} was at "
                f"{list(last_TK.shape)}. Look at the same tokens each time, or call forget() before another batch."
            )
        mask_TK = is_assigned(topk_ids_TK, assigned_TK)
        ids_TK = torch.where(mask_TK, topk_ids_TK, self.num_experts[layer]).sort(1).values  # as sets
        if valid_T is not None:
            ids_TK = torch.where(valid_T.unsqueeze(1), ids_TK, _NEVER)
        setattr(self, f"last_ids_{layer}", ids_TK)
        if last_TK is not None:
            compared_T = ((ids_TK != _NEVER) & (last_TK != _NEVER)).all(1)
            self._add_to("num_compared", layer, compared_T.sum())
            self._add_to("num_changed", layer, ((ids_TK != last_TK).any(1) & compared_T).sum())

    @override
    def compute(self) -> Tensor:
        """Since the last reset, over all ranks."""
        return self._value_of(fraction(self.num_changed, self.num_compared), self.num_compared)

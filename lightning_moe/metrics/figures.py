"""Heatmaps of what experts get. Pure functions to matplotlib figures, which no pyplot keeps.

Shapes: L layers, E experts, S logged steps, C classes of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from lightning_moe.metrics._drawing import (
    Panel,
    Values,
    heatmaps,
    ratio_scale,
    require_matplotlib,
    share_scale,
)
from lightning_moe.metrics._names import printable, short_names, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHER_CLASS = "other"  # of ids that are in no named one
_LOAD_LABEL = "load / mean load; 1 = even"
_NO_TOKENS = "no tokens"
_MAX_COLUMNS = 500  # more steps than a screen has pixels for are drawn as sums of several


def load_figure(tokens_per_expert: Sequence[Tensor], layer_names: Sequence[str], title: str) -> Figure:
    """Load of every expert of every layer, as a multiple of the mean load of its layer.

    Args:
        tokens_per_expert: Assignments of every expert, [E] for each layer; layers may differ in E.
        layer_names: Names of the modules; what they share is left out of the axis and said below the title.
        title: Of the figure.

    Raises:
        ValueError: there is no layer, or not one name per layer.
        ModuleNotFoundError: matplotlib is not installed.
    """
    _check("layer_names", layer_names, "tokens_per_expert", len(tokens_per_expert))
    require_matplotlib()
    counts = [_numbers(counts_E) for counts_E in tokens_per_expert]
    ratios_LE = np.full((len(counts), max(map(len, counts))), np.nan)
    dead_LE = np.zeros(ratios_LE.shape, dtype=bool)
    for layer, counts_E in enumerate(counts):
        if counts_E.sum() > 0:
            ratios_LE[layer, : len(counts_E)] = counts_E / counts_E.mean()
            dead_LE[layer, : len(counts_E)] = counts_E == 0
    names, pattern = short_names(layer_names)
    sizes = {len(counts_E) for counts_E in counts}
    reasons = {"no such expert": len(sizes) > 1, _NO_TOKENS: any(counts_E.sum() == 0 for counts_E in counts)}
    figure, _ = heatmaps(
        [Panel(ratios_LE, dead_LE, names)],
        ratio_scale([ratios_LE], _LOAD_LABEL),
        title,
        "expert",
        "layer",
        note=pattern,
        absent_note=" or ".join(reason for reason, is_one in reasons.items() if is_one),
    )
    return figure


def load_over_time_figure(steps: Sequence[int], loads_SE: Tensor, title: str) -> Figure:
    """Load of every expert of one layer over time, as a multiple of the mean load at the step.

    Where there are more steps than fit, neighbours are drawn as their sum.

    Args:
        steps: Optimizer steps at which was counted, ascending.
        loads_SE: Assignments of every expert since the step before.
        title: Of the figure.

    Raises:
        ValueError: there is no step, or not one row of loads per step.
        ModuleNotFoundError: matplotlib is not installed.
    """
    _check("steps", steps, "loads_SE", len(loads_SE))
    require_matplotlib()
    counts_SE = _numbers(loads_SE)
    per_column = -(-len(steps) // _MAX_COLUMNS)
    first = list(range(0, len(steps), per_column))
    counts_SE = np.add.reduceat(counts_SE, first, axis=0)
    ratios_SE = np.full(counts_SE.shape, np.nan)
    np.divide(counts_SE, counts_SE.mean(1, keepdims=True), out=ratios_SE, where=counts_SE.sum(1, keepdims=True) > 0)
    dead_SE = (counts_SE == 0) & np.isfinite(ratios_SE)
    experts = [str(expert) for expert in range(counts_SE.shape[1])]
    figure, (axes,) = heatmaps(
        [Panel(ratios_SE.T, dead_SE.T, experts)],
        ratio_scale([ratios_SE], _LOAD_LABEL),
        title,
        "optimizer step",
        "expert",
        note=f"a column is the sum of {per_column} counts" if per_column > 1 else "",
        absent_note=_NO_TOKENS,
        wide=8.0,
    )
    starts = [int(steps[i]) for i in first]
    ticks = np.unique(np.linspace(0, len(starts) - 1, min(len(starts), 9)).round().astype(int))
    axes.set_xticks(ticks, [str(starts[i]) for i in ticks])
    return figure


def class_figure(
    assignments_LCE: Tensor | Sequence[Tensor], class_names: Sequence[str], layer_names: Sequence[str], title: str
) -> Figure:
    """Which classes of tokens an expert gets, one panel per layer: how many times as often as on average (lift).

    The lift of class c and expert e is the share of e among the assignments of c, divided by its share among all.

    Args:
        assignments_LCE: Assignments of every class to every expert, [C, E] for each layer; layers may differ in E.
        class_names: Of the C classes. A last one, "other", is left out where it has no assignments.
        layer_names: Names of the modules.
        title: Of the figure.

    Raises:
        ValueError: there is no layer, or not one name per layer and class.
        ModuleNotFoundError: matplotlib is not installed.
    """
    _check("layer_names", layer_names, "assignments_LCE", len(assignments_LCE))
    require_matplotlib()
    if list(class_names[1:][-1:]) == [OTHER_CLASS] and not any(counts_CE[-1].any() for counts_CE in assignments_LCE):
        class_names, assignments_LCE = class_names[:-1], [counts_CE[:-1] for counts_CE in assignments_LCE]
    names, pattern = short_names(layer_names)
    labels = [shortened(printable(name), 18) for name in class_names]
    panels = []
    for name, assignments_CE in zip(names, assignments_LCE, strict=True):
        _check("class_names", class_names, "a layer of assignments_LCE", len(assignments_CE))
        counts_CE = _numbers(assignments_CE)
        by_class_C1, by_expert_1E = counts_CE.sum(1, keepdims=True), counts_CE.sum(0, keepdims=True)
        expected_CE = by_class_C1 * by_expert_1E / max(counts_CE.sum(), 1)
        lift_CE = np.full(counts_CE.shape, np.nan)
        np.divide(counts_CE, expected_CE, out=lift_CE, where=expected_CE > 0)
        dead_CE = np.broadcast_to((by_expert_1E == 0) & (counts_CE.sum() > 0), counts_CE.shape)
        panels.append(Panel(lift_CE, dead_CE, labels, title=f"layer {name}"))
    lifts = [panel.values_RC for panel in panels]
    figure, _ = heatmaps(
        panels,
        ratio_scale(lifts, "how many times as often as on average; 1 = as often"),
        title,
        "expert",
        "class of token",
        note=pattern,
        absent_note=_NO_TOKENS,
    )
    return figure


def affinity_figure(affinity_EE: Tensor, title: str) -> Figure:
    """How often two experts of one layer are chosen together.

    Args:
        affinity_EE: Share of the tokens that chose the row's expert which also chose the column's; the diagonal is 1,
            or 0 where an expert was never chosen.
        title: Of the figure.

    Raises:
        ValueError: the matrix is not square.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if affinity_EE.ndim != 2 or affinity_EE.shape[0] != affinity_EE.shape[1] or not len(affinity_EE):
        raise ValueError(
            f"affinity_EE has shape {list(affinity_EE.shape)}: must be [E, E]. Give one layer of what ExpertAffinity "
            "computes."
        )
    require_matplotlib()
    values_EE = _numbers(affinity_EE).copy()
    dead_E = values_EE.diagonal() == 0
    dead_EE = dead_E[:, None] | dead_E[None, :]
    np.fill_diagonal(values_EE, np.nan)
    values_EE[dead_EE] = np.nan
    figure, _ = heatmaps(
        [Panel(values_EE, dead_EE, [str(expert) for expert in range(len(values_EE))])],
        share_scale(values_EE, "share of the tokens of expert A that also chose expert B"),
        title,
        "expert B",
        "expert A",
        absent_note="an expert with itself",
    )
    return figure


def _numbers(values: Tensor) -> Values:
    numbers: Values = values.detach().cpu().double().numpy()
    return numbers


def _check(name: str, given: Sequence[object], of: str, expected: int) -> None:
    if not expected or len(given) != expected:
        raise ValueError(f"{name} has {len(given)} entries and {of} has {expected}: must be the same, at least 1.")

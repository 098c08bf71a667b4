"""The sections of a report with heatmaps: the load of the experts over time, and the token classes they get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from html import escape

import torch

from lightning_moe.commands.description import count
from lightning_moe.commands.report.data import Load
from lightning_moe.commands.report.figures import heatmap_png
from lightning_moe.commands.report.find import Run
from lightning_moe.commands.report.parts import Part, Section, missing

_MAX_SNAPSHOTS = 20
_MAX_OPEN_LAYERS = 8
_MAX_OPEN_EXPERTS = 128  # of these layers together: a figure has a row for each
_LAYERS_PER_FIGURE = 8


def dead_experts(load: Load) -> dict[int, list[int]]:
    """Experts without a token, by layer; only of layers that got any."""
    dead = {i: [e for e, n in enumerate(of) if n == 0] for i, of in enumerate(load.tokens_per_expert) if any(of)}
    return {layer: experts for layer, experts in dead.items() if experts}


def latest_interval(loads: Sequence[Load]) -> Load:
    """The last steps, as many as a figure usually has: the last figure of a run may be of few, and few tokens."""
    latest = loads[-1]
    if latest.first_step is None:
        return latest
    spans = [load.step - load.first_step + 1 for load in loads if load.first_step is not None]
    for load in reversed(loads[:-1]):
        enough = latest.step - (latest.first_step or 0) + 1 >= max(spans)
        follows = load.first_step is not None and load.step + 1 == latest.first_step
        if enough or not follows or _sizes(load) != _sizes(latest):
            break
        pairs = zip(load.tokens_per_expert, latest.tokens_per_expert, strict=True)
        summed = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
        latest = replace(latest, tokens_per_expert=summed, first_step=load.first_step)
    return latest


def _sizes(load: Load) -> list[int]:
    return [len(of_layer) for of_layer in load.tokens_per_expert]


def expert_section(run: Run) -> Section:
    """The load of every expert: now, at earlier steps, and of each layer over time."""
    meaning = (
        "Each field is the load of one expert over the mean of its layer: 1 is even, below 2 is good, and a dead "
        "expert got no token."
    )
    if run.loads:
        meaning += " Steps are counted from 1 here, and by the loggers from 0: step 120 is their step 119."
    section = Section("Experts", meaning)
    if not run.loads:
        remedy = "No heatmaps: add lightning_moe.ExpertHeatmap to trainer.callbacks."
        section.parts.append(missing(remedy))
        return section
    latest = run.loads[-1]
    shown = spread(run.loads, _MAX_SNAPSHOTS)
    last = len(shown) - 1
    section.parts.append('<div class="snapshots">')
    if last:
        section.parts.append(
            f'<p class="control" hidden><label>Step <input type="range" min="0" max="{last}" value="{last}" step="1" '
            f'aria-label="Step of the heatmap"></label> <output>{latest.step:,}</output> '
            f"<small>{last + 1} of {count(len(run.loads), 'heatmap')}; drag, or use the arrow keys</small></p>"
            f"<noscript><p>The latest heatmap; the slider to earlier ones needs scripts.</p></noscript>"
        )
    for i, load in enumerate(shown):
        hidden = "" if i == last else " hidden"
        section.parts.append(partial(_load_image, load, hidden))
    section.parts += [
        "</div>",
        _in_words(latest_interval(run.loads)),
        "<h3>Load over time</h3>",
        *_over_time(run.loads),
    ]
    return section


def _over_time(loads: Sequence[Load]) -> list[Part]:
    latest = loads[-1].tokens_per_expert
    most = min(max(_MAX_OPEN_EXPERTS // max(map(len, latest)), 1), _MAX_OPEN_LAYERS)
    uneven_first = sorted(range(len(latest)), key=lambda i: -_imbalance(latest[i]))
    chosen = sorted(uneven_first[:most])
    parts: list[Part] = []
    if len(chosen) < len(latest):
        parts.append(f'<p class="soft">Of {len(latest)} layers, the {most} that are the most uneven now.</p>')
    shown: list[Part] = [partial(_over_time_image, loads, i) for i in chosen]
    shown += [partial(_over_time_image, loads, i) for i in range(len(latest)) if i not in chosen]
    return [*parts, *_open_and_others(shown, most, "more layer")]


def _imbalance(tokens_per_expert: Sequence[int]) -> float:
    return max(tokens_per_expert) * len(tokens_per_expert) / max(sum(tokens_per_expert), 1)


def spread(items: Sequence[Load], most: int) -> list[Load]:
    """At most so many, evenly over all, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _open_and_others(images: list[Part], most: int, what: str) -> list[Part]:
    first: list[Part] = ['<div class="heatmaps">', *images[:most], "</div>"]
    if len(images) <= most:
        return first
    summary = f"<details><summary>{count(len(images) - most, what)}</summary>"
    return [*first, f'{summary}<div class="heatmaps">', *images[most:], "</div></details>"]


def _load_image(load: Load, hidden: str) -> str:
    from lightning_moe.metrics.figures import load_figure

    tensors = [torch.tensor(of_layer, dtype=torch.float64) for of_layer in load.tokens_per_expert]
    figure = load_figure(tensors, load.layers, f"Load of the experts, {load.span}")
    label = f"Load of every expert of {count(len(load.layers), 'layer')}, {load.span}"
    return heatmap_png(figure, label, f' data-step="{load.step:,}"{hidden}')


def _over_time_image(loads: Sequence[Load], layer: int) -> str:
    from lightning_moe.metrics.figures import load_over_time_figure

    name = loads[-1].layers[layer]
    size = len(loads[-1].tokens_per_expert[layer])
    rows = [
        (load.step, load.tokens_per_expert[layer])
        for load in loads
        if load.layers[layer : layer + 1] == [name] and len(load.tokens_per_expert[layer]) == size
    ]
    loads_SE = torch.tensor([row for _, row in rows], dtype=torch.float64)
    title = f"layer_{layer:02d}: {name}"
    figure = load_over_time_figure([step for step, _ in rows], loads_SE, title)
    return heatmap_png(figure, f"Load of every expert of {title} over the steps")


def _in_words(load: Load) -> str:
    """The busiest expert and the dead ones, for who cannot see the figure, too."""
    ratios = [
        (_imbalance(of_layer), layer, of_layer.index(max(of_layer)))
        for layer, of_layer in enumerate(load.tokens_per_expert)
        if sum(of_layer)
    ]
    if not ratios:
        return f"<p>In {load.span} no expert got a token.</p>"
    ratio, layer, expert = max(ratios)
    text = f"In {load.span} the busiest is expert {expert} of layer_{layer:02d}, with {ratio:.2f} times the mean."
    dead = dead_experts(load)
    if not dead:
        return f"<p>{text} No expert is dead.</p>"
    places = [f"layer_{i:02d} ({load.layers[i]}): {', '.join(map(str, experts))}" for i, experts in dead.items()]
    items = "".join(f"<li>{escape(place)}</li>" for place in places)
    number = count(sum(map(len, dead.values())), "expert")
    return f"<p>{text} <strong>{number} got no token:</strong></p><ul>{items}</ul>"


def class_section(run: Run) -> Section:
    """Which classes of tokens the experts get."""
    section = Section(
        "Token classes",
        "How many times as often as on average an expert gets a class of tokens: 1 is as often as the others, and "
        "experts that differ have specialised.",
    )
    if not run.classes:
        section.parts.append(missing("No token classes: set token_classes of ExpertHeatmap, to bytes for example."))
        return section
    latest = run.classes[-1]
    figures: list[Part] = [
        partial(_class_image, run, first) for first in range(0, len(latest.layers), _LAYERS_PER_FIGURE)
    ]
    section.parts += _open_and_others(figures, 1, "more figure")
    return section


def _class_image(run: Run, first: int) -> str:
    from lightning_moe.metrics.figures import class_figure

    latest, layers = run.classes[-1], slice(first, first + _LAYERS_PER_FIGURE)
    names = latest.layers
    if len(names) > _LAYERS_PER_FIGURE:  # a figure counts its layers from 0
        names = [f"layer_{i:02d}" for i in range(len(names))]
    names = names[layers]
    tensors = [torch.tensor(of_layer, dtype=torch.float64) for of_layer in latest.assignments[layers]]
    title = f"Token classes of the experts at step {latest.step:,}"
    figure = class_figure(tensors, latest.classes, names, title)
    return heatmap_png(figure, f"{title}: {', '.join(names)}")

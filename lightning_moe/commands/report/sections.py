"""What a report says: its sections, from what a run has logged."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from lightning_moe.commands.description import count
from lightning_moe.commands.report.data import Scalars, is_of_test, is_of_validation
from lightning_moe.commands.report.experts import class_section, expert_section
from lightning_moe.commands.report.figures import Chart, Format
from lightning_moe.commands.report.find import Run
from lightning_moe.commands.report.parts import Section, charts, in_bytes, missing, percent, plain, seconds, table

_TRAIN, _VALIDATION = "moe/", "val_moe/"
PER_LAYER = re.compile(r"(val_)?moe/layer_(\d+)/(.+)")  # validation's, layer, metric
_LOSS = re.compile(r"(?:^|[/_.-])loss(?:$|[/_.-])", re.I)
_MONITOR = "add lightning_moe.ExpertLoadMonitor to trainer.callbacks"
_NOTHING_TRAVELLED = (
    "nothing travels where each rank has all experts, and batches of several optimizer steps are not measured"
)
_MAX_OTHER_CHARTS = 12
_MAX_CONFIG = 200_000  # characters


@dataclass(frozen=True)
class _About:
    """A chart of metrics under ``moe/`` and ``val_moe/``."""

    title: str
    names: tuple[str, ...]
    caption: str
    write: Format = plain
    healthy: float | None = None
    expected: bool = True
    from_zero: bool = False


_BALANCE = (
    _About("Load imbalance", ("load_imbalance",),
           "Tokens of the busiest expert over the mean of all: 1 is even, below 2 is good.", healthy=2.0),
    _About("Router entropy", ("router_entropy",),
           "1: the router is undecided. 0: it is certain of the experts of each token."),
    _About("Dead experts", ("dead_experts",),
           "Experts without any token since the value before, as a mean over the layers. Should be 0.",
           from_zero=True),
    _About("Collapsed layers", ("collapsed_layers",),
           "Layers for which RouterCollapseGuard has raised the alarm. Should be 0.", expected=False, from_zero=True),
    _About("Load-balancing loss", ("load_balancing_loss",), "Before its weight. 1 is even."),
    _About("Load-balancing weight", ("load_balancing_weight",),
           "In force, with warm-up, decay and what RouterCollapseGuard has raised.", expected=False, from_zero=True),
    _About("Router z-loss", ("router_z_loss",), "Before its weight. It keeps the router's logits small."),
    _About("Importance and load loss", ("importance_loss", "load_loss"), "Before their weights.", expected=False),
    _About("Auxiliary loss", ("aux_loss",), "What is added to the task's loss: all of them, weighted."),
)  # fmt: skip
_DROPS = (
    _About("Dropped and rerouted", ("dropped_fraction", "rerouted_fraction"),
           "Shares of the assignments of tokens to experts.", percent, 0.01, from_zero=True),
)  # fmt: skip
_COMMUNICATION = (
    _About("Share of the step", ("dispatch_share",),
           "Of the time of a step, spent waiting for the wire.", percent, 0.25, from_zero=True),
    _About("Time", ("dispatch_seconds", "dispatch_seconds_slowest"),
           "A step's time waiting for the wire: mean over ranks, and the rank with most.", seconds,
           from_zero=True),
    _About("Bytes", ("dispatch_bytes", "dispatch_bytes_received"),
           "Sent in a step, mean over ranks, and received by the rank that gets most.", in_bytes,
           from_zero=True),
)  # fmt: skip


def sections(run: Run) -> list[Section]:
    """Everything that follows the head of the page."""
    found = [_loss(run.scalars)]
    found.append(
        _of_metrics(
            "Balance",
            "An even load makes use of all experts; a router that sends everything to few of them wastes the others.",
            _BALANCE,
            run.scalars,
            f"{_MONITOR}, and AuxLossCallback for the losses",
        )
    )
    found.append(
        _of_metrics(
            "Drops",
            "A dropped assignment found no expert with room, and a rerouted one another expert than its first choice; "
            "below 1 % dropped is healthy, and without a capacity factor both are 0.",
            _DROPS,
            run.scalars,
            _MONITOR,
        )
    )
    found += [expert_section(run), class_section(run)]
    found.append(
        _of_metrics(
            "Communication",
            "What moving tokens to their experts and back costs; below a quarter of the step is healthy, and one "
            "process by itself sends nothing.",
            _COMMUNICATION,
            run.scalars,
            _NOTHING_TRAVELLED if f"{_TRAIN}load_imbalance" in run.scalars else _MONITOR,
        )
    )
    found += [_others(run.scalars), _config(run)]
    return [section for section in found if section.parts]


def loss_names(scalars: Scalars) -> tuple[list[str], list[str], list[str]]:
    """Names of the losses of training, of validation, and others that are called a loss."""
    names = [n for n in scalars if _LOSS.search(n) and not n.startswith((_TRAIN, _VALIDATION))]
    validation = [name for name in names if is_of_validation(name)]
    others = [name for name in names if is_of_test(name)]
    return [name for name in names if name not in validation + others], validation, others


def _loss(scalars: Scalars) -> Section:
    training, validation, others = loss_names(scalars)
    section = Section(
        "Loss", "The loss should fall, and validation with it; where only training falls, the model learns by heart."
    )
    if not training:
        section.parts.append(missing('No training loss: log one in training_step, as in self.log("train_loss", loss).'))
    if not validation:
        section.parts.append(
            missing(
                "No validation loss: where the run validates, log one in validation_step, as in "
                'self.log("val_loss", loss).'
            )
        )
    if names := [*training, *validation, *others]:
        lines = {name: scalars[name] for name in names}
        drawn = [Chart("All losses" if len(names) > 1 else names[0], lines, plain)]
        section.parts += [*charts(drawn, "loss"), table(lines, lambda _: plain)]
    return section


def _of_metrics(name: str, meaning: str, abouts: Iterable[_About], scalars: Scalars, remedy: str) -> Section:
    section = Section(name, meaning)
    drawn: list[Chart] = []
    per_layer: list[Chart] = []
    absent: list[str] = []
    writes: dict[str, Format] = {}
    for about in abouts:
        names = [f"{prefix}{metric}" for prefix in (_TRAIN, _VALIDATION) for metric in about.names]
        shown = {full: scalars[full] for full in names if full in scalars}
        layers = [chart for metric in about.names for chart in _layer_charts(scalars, metric, about)]
        if shown:
            drawn.append(Chart(about.title, shown, about.write, about.healthy, about.caption, about.from_zero))
        if about.expected and not layers:
            absent += [f"{_TRAIN}{metric}" for metric in about.names if f"{_TRAIN}{metric}" not in scalars]
        writes.update(dict.fromkeys(shown, about.write))
        per_layer += layers
    if absent:
        said = f"Not logged: {', '.join(absent)}" if writes or per_layer else f"No {name.lower()}"
        section.parts.append(missing(f"{said}: {remedy}."))
    section.parts += charts(drawn, name.lower())
    if writes:
        section.parts.append(table({full: scalars[full] for full in writes}, lambda full: writes[full]))
    if per_layer:
        heading = f"<details open><summary>By layer ({count(len(per_layer), 'chart')})</summary>"
        section.parts += [heading, *charts(per_layer, f"{name.lower()}-layers"), "</details>"]
    return section


def _layer_charts(scalars: Scalars, metric: str, about: _About) -> Iterable[Chart]:
    for prefix, of in (("", "training"), ("val_", "validation")):
        found = {
            int(match[2]): series
            for name, series in scalars.items()
            if (match := PER_LAYER.fullmatch(name)) and match[3] == metric and (match[1] or "") == prefix
        }
        if found:
            lines = {f"layer_{layer:02d}": found[layer] for layer in sorted(found)}
            title = f"{metric.replace('_', ' ')} by layer, {of}"
            yield Chart(
                title[0].upper() + title[1:], lines, about.write, about.healthy, "", about.from_zero, ordered=True
            )


def _others(scalars: Scalars) -> Section:
    metrics = {metric for about in (*_BALANCE, *_DROPS, *_COMMUNICATION) for metric in about.names}
    told = {f"{prefix}{metric}" for metric in metrics for prefix in (_TRAIN, _VALIDATION)}
    told |= {name for names in loss_names(scalars) for name in names}
    told |= {name for name in scalars if (match := PER_LAYER.fullmatch(name)) and match[3] in metrics}
    lines = {name: series for name, series in sorted(scalars.items()) if name not in told}
    section = Section("Other metrics", "What else the run logged.")
    if lines:
        drawn = [Chart(name, {name: series}, plain) for name, series in lines.items()][:_MAX_OTHER_CHARTS]
        summary = f"<details><summary>{count(len(lines), 'metric')}</summary>"
        section.parts += [summary, *charts(drawn, "others"), table(lines, lambda _: plain), "</details>"]
    return section


def _config(run: Run) -> Section:
    section = Section("Config", "What the run was started with.")
    if run.config is None:
        remedy = (
            "No config: the command writes config.yaml, and self.save_hyperparameters() in the module hparams.yaml."
        )
        section.parts.append(missing(remedy))
        return section
    path, text = run.config
    cut = "\n... (cut)" if len(text) > _MAX_CONFIG else ""
    shown = escape(text[:_MAX_CONFIG] + cut)
    section.parts.append(f"<details open><summary>{escape(str(path))}</summary><pre>{shown}</pre></details>")
    return section

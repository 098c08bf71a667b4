"""The numbers at the head of a report, and a word on each: is it healthy?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from lightning_moe.commands.report.data import Scalars, Series
from lightning_moe.commands.report.experts import dead_experts, latest_interval
from lightning_moe.commands.report.find import Run
from lightning_moe.commands.report.parts import Format, percent, plain
from lightning_moe.commands.report.sections import PER_LAYER, loss_names

GOOD, WATCH, BAD = _STATES = "good", "watch", "bad"
# From docs/monitoring.md: values up to the first are good, and up to the second to be watched.
_IMBALANCE = (2.0, 4.0)
_DROPPED = (0.01, 0.1)
_SHARE = (0.25, 0.5)
_ENTROPY = (0.05, 0.2)  # below the first is bad, and below the second to be watched


@dataclass(frozen=True)
class Tile:
    """A number of the run.

    Args:
        label: What it is.
        value: As it is read.
        note: At which step, and the like.
        state: ``good``, ``watch``, ``bad``, or nothing where there is no rule.
        verdict: The state in a word or a few.
    """

    label: str
    value: str
    note: str
    state: str = ""
    verdict: str = ""


_RECENT = 9  # values that a metric is judged by: one alone, of one logged step, may be an outlier


def tiles(run: Run) -> list[Tile]:
    """Those for which the run has values, with the latest of each."""
    scalars = run.scalars
    training, validation, _ = loss_names(scalars)
    found = [_loss(name, scalars[name]) for name in (training[:1] + validation[:1])]
    found += _metric(
        scalars, "load_imbalance", "Load imbalance", plain, lambda v: _up_to(v, _IMBALANCE, "even", "uneven")
    )
    found += _metric(scalars, "router_entropy", "Router entropy", plain, _entropy)
    found += _dead(run)
    found += _collapsed(scalars)
    found += _metric(
        scalars, "dropped_fraction", "Dropped", percent, lambda v: _up_to(v, _DROPPED, "few" if v else "none", "many")
    )
    found += _metric(
        scalars, "dispatch_share", "Communication", percent, lambda v: _up_to(v, _SHARE, "cheap", "costly")
    )
    return found


def _loss(name: str, series: Series) -> Tile:
    value, step = series.values[-1], series.steps[-1]
    note = f"at step {step:,}"
    finite = [v for v in series.values if math.isfinite(v)]
    if not math.isfinite(value):
        return Tile(name, plain(value), note, BAD, "bad: training has diverged")
    note += f"; lowest {plain(min(finite))}"
    if len(finite) < 2:
        return Tile(name, plain(value), note)
    tenth = max(1, len(finite) // 10)
    now, before = (sum(part) / tenth for part in (finite[-tenth:], finite[:tenth]))
    if now < before:
        return Tile(name, plain(value), note, GOOD, "good: fell")
    return Tile(name, plain(value), note, WATCH, "watch: has not fallen")


def _metric(
    scalars: Scalars, metric: str, label: str, write: Format, judge: Callable[[float], tuple[str, str]]
) -> list[Tile]:
    series = scalars.get(f"moe/{metric}")
    if series is None:
        return []
    value, last = series.values[-1], series.steps[-1]
    if not math.isfinite(value):
        return [Tile(label, write(value), f"at step {last:,}", BAD, "bad: not a number")]
    value = _median(series)
    since = series.steps[-_RECENT:][0]
    note = f"median of steps {since:,} to {last:,}" if len(series.values) > 1 else f"at step {last:,}"
    state, verdict = judge(value)
    # A mean over layers hides one that has collapsed.
    for name in sorted(scalars):
        if (match := PER_LAYER.fullmatch(name)) and match[1] is None and match[3] == metric:
            of_layer = _median(scalars[name])
            its_state, its_verdict = judge(of_layer)
            if _STATES.index(its_state) > _STATES.index(state):
                state, verdict = its_state, f"{its_verdict} in layer_{match[2]}, {write(of_layer)}"
    return [Tile(label, write(value), note, state, verdict)]


def _median(series: Series) -> float:
    """Of the last values."""
    return statistics.median([v for v in series.values[-_RECENT:] if math.isfinite(v)] or series.values[-1:])


def _up_to(value: float, bounds: tuple[float, float], low: str, high: str) -> tuple[str, str]:
    good, watched = bounds
    if value < good:
        return GOOD, f"good: {low}"
    return (WATCH, f"watch: {high}") if value < watched else (BAD, f"bad: very {high}")


def _entropy(value: float) -> tuple[str, str]:
    bad, watched = _ENTROPY
    if value >= watched:
        return GOOD, "good: not certain yet"
    return (WATCH, "watch: nearly certain") if value >= bad else (BAD, "bad: certain")


def _dead(run: Run) -> list[Tile]:
    if run.loads:
        latest = latest_interval(run.loads)
        if not any(map(sum, latest.tokens_per_expert)):
            return []
        dead = sum(map(len, dead_experts(latest).values()))
        total = sum(map(len, latest.tokens_per_expert))
        state, verdict = (BAD, "bad: wasted") if dead else (GOOD, "good: none")
        return [Tile("Dead experts", f"{dead:,} of {total:,}", f"in {latest.span}", state, verdict)]
    judge = lambda value: (BAD, "bad: wasted") if value > 0 else (GOOD, "good: none")
    return _metric(run.scalars, "dead_experts", "Dead experts a layer", plain, judge)


def _collapsed(scalars: Scalars) -> list[Tile]:
    """What RouterCollapseGuard said last; it has judged many steps together already."""
    series = scalars.get("moe/collapsed_layers")
    if series is None:
        return []
    number = series.values[-1]
    state, verdict = (BAD, "bad: collapsed") if number else (GOOD, "good: none")
    return [Tile("Collapsed layers", plain(number), f"at step {series.steps[-1]:,}", state, verdict)]

"""Figures of a report as pieces of HTML: curves as SVG, heatmaps as PNG."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_moe.commands.report.data import Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 1500  # of a chart's curves together; one has more of them than pixels
_MIN_POINTS = 200  # of each of many
_MAX_NAMED = 8  # curves in one chart that a legend can tell apart
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#000000", "#7a5195")  # after Okabe-Ito
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_SIZE = (5.6, 2.7)  # inches
_MARKED = 40  # points up to which each gets a mark
_STEPS_OF_TICKS = (1, 2, 2.5, 5, 10)
_SMOOTHED = 400  # points of a curve from which a mean is drawn over it
_WINDOWS = 50  # what the mean is over: such a part of the curve
_ZERO_WIDTH = "\u200b"  # before underscores, as matplotlib leaves names that begin with one out of legends
_HEATMAP_DPI = 100
_HEATMAP_COLOURS = 256

Format = Callable[..., str]  # of a number, and how many digits of it matter


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps.

    Args:
        title: Heading.
        lines: Names and values.
        write: How a value is written.
        healthy: Values below are healthy; ``None`` where there is no such bound.
        caption: What the numbers mean.
        from_zero: The axis of the values begins there.
        ordered: The curves are those of layers, from first to last.
    """

    title: str
    lines: dict[str, Series]
    write: Format
    healthy: float | None = None
    caption: str = ""
    from_zero: bool = False
    ordered: bool = field(default=False, kw_only=True)


def thinned(
    steps: Sequence[int], values: Sequence[float] | NDArray[np.float64], most: int = MAX_POINTS
) -> tuple[list[int], list[float]]:
    """At most so many points of a curve, which looks the same: the lowest and the highest of each stretch.

    The first and the last point stay. Of a stretch without a finite value its first one stays, as a gap.

    >>> thinned(range(8), [0, 1, 9, 1, 1, -5, 1, 2], most=4)
    ([0, 2, 5, 7], [0.0, 9.0, -5.0, 2.0])
    """
    array = np.asarray(values, dtype=np.float64)
    if len(steps) <= most:
        return list(steps), array.tolist()
    kept = {0, len(steps) - 1}
    edges = np.linspace(1, len(steps) - 1, (most - 2) // 2 + 1).round().astype(int)
    for start, end in pairwise(edges):
        finite = np.flatnonzero(np.isfinite(array[start:end]))
        if finite.size:
            inner = array[start:end][finite]
            kept |= {start + int(finite[inner.argmin()]), start + int(finite[inner.argmax()])}
        elif end > start:
            kept.add(int(start))
    chosen = sorted(int(index) for index in kept)
    return [steps[i] for i in chosen], array[chosen].tolist()


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of the finite values among so many around each; of fewer at the ends. Not a number where there are none.

    >>> running_mean(np.array([1.0, 2.0, 6.0, np.nan]), 3).tolist()
    [1.5, 3.0, 4.0, 6.0]
    """
    finite = np.isfinite(values)
    sums, numbers = (np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(finite, values, 0.0), finite))
    at = np.arange(len(values))
    first, last = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    number = numbers[last] - numbers[first]
    return np.where(number > 0, (sums[last] - sums[first]) / np.maximum(number, 1), np.nan)


def smoothing_note(chart: Chart) -> str:
    """What is faint and what is bold in a chart, if anything is."""
    windows = {_window(series) for series in chart.lines.values()} - {1}
    if not windows:
        return ""
    most = f"mean of {'up to ' if len(windows) > 1 else ''}{max(windows):,}"
    return f"Lines: {most}." if _is_crowded(chart) else f"Faint: every value; bold: {most}."


def _window(series: Series) -> int:
    return len(series.steps) // _WINDOWS // 2 * 2 + 1 if len(series.steps) >= _SMOOTHED else 1


def _is_crowded(chart: Chart) -> bool:
    return chart.ordered and len(chart.lines) > _MAX_NAMED


def chart_svg(chart: Chart, key: str) -> str:
    """A chart as an SVG element.

    Args:
        chart: What to draw.
        key: Unique in the page; letters, digits and hyphens.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with mpl.rc_context(
        {"svg.fonttype": "path", "svg.hashsalt": key, "font.size": 9, "axes.formatter.useoffset": False}
    ):
        figure = Figure(figsize=_SIZE, facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        _draw_lines(axes, chart)
        lowest, highest = _limits(axes, chart)
        if chart.healthy is not None and lowest <= chart.healthy <= highest:
            axes.axhline(chart.healthy, color="#666666", linewidth=0.8, linestyle=(0, (2, 2)))
            axes.annotate(
                f"healthy below {chart.write(chart.healthy)}",
                (0.995, chart.healthy),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                color="#666666",
                size=7.5,
                zorder=5,  # before the curves
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
            )
        axes.set_ylim(lowest, highest)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS_OF_TICKS, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS_OF_TICKS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(chart, value, highest - lowest)))
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return _for_html(stream.getvalue(), key, f"{chart.title}: {', '.join(chart.lines)}")


def _tick(chart: Chart, value: float, extent: float) -> str:
    """With as many digits as tell neighbours apart."""
    return chart.write(0.0 if abs(value) < 1e-6 * extent else value, 8)


def _limits(axes: Any, chart: Chart) -> tuple[float, float]:
    """Of the values; where all are 0, from there to what would not be healthy any more."""
    lowest, highest = axes.get_ylim()
    values = [value for series in chart.lines.values() for value in series.values if math.isfinite(value)]
    if values and not any(values):
        top = 1.2 * (chart.healthy or 1.0)
        return -0.04 * top, top
    if chart.from_zero and values:
        return -0.04 * max(values), 1.08 * max(values)
    return lowest, highest


def _draw_lines(axes: Any, chart: Chart) -> None:
    from matplotlib import colormaps

    crowded = _is_crowded(chart)
    gradient = colormaps["viridis"]
    for i, (name, series) in enumerate(chart.lines.items()):
        values = np.asarray(series.values, dtype=np.float64)
        values[~np.isfinite(values)] = np.nan
        colour = gradient(0.95 * i / (len(chart.lines) - 1)) if crowded else _COLOURS[i % len(_COLOURS)]
        most = max(MAX_POINTS // len(chart.lines), _MIN_POINTS)
        window = _window(series)
        if window > 1 and not crowded:
            axes.plot(*thinned(series.steps, values, most), color=colour, linewidth=0.6, alpha=0.3)
        if window > 1:
            values, most = running_mean(values, window), _MIN_POINTS  # it is smooth
        axes.plot(
            *thinned(series.steps, values, most),
            color=colour,
            linestyle="-" if crowded else _DASHES[i % len(_DASHES)],
            linewidth=0.8 if crowded else 1.5,
            marker="o" if len(series.steps) <= _MARKED else None,
            markersize=2.5,
            label=_ZERO_WIDTH * name.startswith("_") + name.replace("$", r"\$"),
        )
    if crowded:
        _draw_layers_bar(axes, list(chart.lines), gradient)
    elif len(chart.lines) > 1:
        few = len(chart.lines) <= 4
        axes.legend(frameon=True, framealpha=0.8, edgecolor="none", fontsize=8, ncols=1 if few else 2)


def _draw_layers_bar(axes: Any, names: Sequence[str], gradient: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = axes.figure.colorbar(ScalarMappable(Normalize(0, (len(names) - 1) / 0.95), gradient), ax=axes, pad=0.02)
    bar.ax.set_ylim(0, len(names) - 1)
    bar.set_ticks([0, len(names) - 1], labels=[names[0], names[-1]])
    bar.ax.tick_params(labelsize=8)


def _for_html(svg: str, key: str, label: str) -> str:
    """Only the element, with ids that no other figure has, and as wide as there is room."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)  # it would hold for the whole page; the page has its own
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = svg.replace("url(#", f"url(#{key}-").replace('href="#', f'href="#{key}-')
    head, _, rest = svg.partition(">")
    head = re.sub(r' (?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", head)
    rest = rest.replace("xlink:href=", "href=")
    text = escape(label)
    rest = re.sub(r"^([ML] -?\d+\.\d\d)\d*( -?\d+\.\d\d)\d*", r"\1\2", rest, flags=re.M)  # a hundredth of a point
    squeezed = re.sub(r"\s*\n\s*", "\n", rest)
    return f'{head} class="chart" role="img" aria-label="{text}"><title>{text}</title>{squeezed}'


def heatmap_png(figure: Figure, label: str, attributes: str = "") -> str:
    """A figure as an image element with the PNG in it.

    Args:
        figure: What to draw.
        label: What is seen on it, in words.
        attributes: Further ones of the element.
    """
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_HEATMAP_DPI)
    image = Image.open(drawn).convert("RGB")
    small = io.BytesIO()
    few = image.quantize(_HEATMAP_COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(small, format="PNG", optimize=True)
    content = base64.b64encode(small.getvalue()).decode()
    text = escape(label)
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img src="data:image/png;base64,{content}" {size} alt="{text}" title="{text}"{attributes}>'

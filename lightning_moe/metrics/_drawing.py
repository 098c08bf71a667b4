"""How the figures are laid out and coloured.

Everything is placed by hand, in inches: matplotlib's own layouts draw a figure several times to find out how large its
texts are, and figures are drawn while a model trains.

Shapes: R rows, C columns of a heatmap.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_moe.metrics._names import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Values = NDArray[np.float64]

DEAD_COLOUR = "black"
ABSENT_COLOUR = "0.87"
DEAD_NOTE = "dead: no token"
_UNDER_TO_OVER = ("#2166ac", "#92c5de", "#ffffff", "#ef8a62", "#b2182b")  # ColorBrewer's RdBu without its ends
_NONE_TO_ALL = ("#ffffff", "#c7e9c0", "#41ab5d", "#00441b")
_TOP = 4.0  # of every figure, so that those of different steps and layers compare
_TITLE_POINTS, _POINTS, _SMALL_POINTS = 11, 8, 7
_TITLE_LINE, _LINE = 0.19, 0.16  # inches
_CHARACTER = 0.068  # inches at _POINTS, as most letters are
_LEGEND_CHARACTER = 0.072
_GAP = 0.3  # inches between panels


class Scale(NamedTuple):
    """What colours mean."""

    colours: tuple[str, ...]
    centre: float | None
    top: float
    extends: bool
    label: str


def ratio_scale(values: Sequence[Values], label: str) -> Scale:
    """Blue below 1, white at 1, red above; up to 4, and an arrow for what is more."""
    largest = max((float(np.nanmax(v)) for v in values if np.isfinite(v).any()), default=1.0)
    return Scale(_UNDER_TO_OVER, 1.0, _TOP, largest > _TOP, label)


def share_scale(values: Values, label: str) -> Scale:
    """White at 0, darker above, up to the largest value, rounded up."""
    largest = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    top = next(top for top in (0.05, 0.1, 0.2, 0.5, 1.0) if largest <= top or top == 1.0)
    return Scale(_NONE_TO_ALL, None, top, False, label)


class Panel(NamedTuple):
    """One heatmap.

    Args:
        values_RC: Not a number where there is nothing to show.
        dead_RC: True where an expert got no token.
        row_labels: One a row.
        title: Above it.
    """

    values_RC: Values
    dead_RC: NDArray[np.bool_]
    row_labels: Sequence[str]
    title: str = ""


def require_matplotlib() -> None:
    """Says how to get matplotlib where it is missing.

    Raises:
        ModuleNotFoundError: it is.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Figures are drawn by matplotlib, which is not installed. Run: pip install "lightning_moe[plots]"'
        ) from error


def heatmaps(
    panels: Sequence[Panel],
    scale: Scale,
    title: str,
    x_label: str,
    y_label: str,
    note: str = "",
    absent_note: str = "",
    wide: float | None = None,
) -> tuple[Figure, list[Axes]]:
    """Draws panels below each other, in as many columns as make a page, with one colour bar.

    Args:
        panels: One or more.
        scale: Of all of them.
        title: Of the figure; long ones are wrapped.
        x_label: Of the columns.
        y_label: Of the rows.
        note: A line below the title.
        absent_note: What a place without a value is, where there are any.
        wide: Width of a panel, in inches; ``None`` goes by the number of columns.

    Returns:
        The figure, and the axes of every panel.
    """
    from matplotlib.figure import Figure

    rows, columns = (max(p.values_RC.shape[axis] for p in panels) for axis in (0, 1))
    width = wide or _panel_width(columns, len(panels))
    height = _panel_height(rows, len(panels))
    labels_width = 0.45 + _CHARACTER * max(len(label) for panel in panels for label in panel.row_labels)
    across = _panels_across(len(panels), width + _GAP, height)
    down = -(-len(panels) // across)
    panel_top = 0.25 if any(panel.title for panel in panels) else 0.08
    panel_bottom = 0.45
    page_width = max(
        labels_width + across * width + (across - 1) * _GAP, labels_width + _CHARACTER * len(scale.label), 4.7
    )
    page_width += 0.25
    title_lines = _wrapped(title, page_width, _CHARACTER * _TITLE_POINTS / _POINTS)
    notes = _wrapped(note, page_width, _CHARACTER) if note else []
    legend = _legend(panels, absent_note)
    top = 0.12 + _TITLE_LINE * len(title_lines) + _LINE * len(notes) + (0.24 if legend else 0) + 0.06
    bottom = 0.58
    page_height = top + down * (panel_top + height + panel_bottom) + bottom
    figure = Figure(figsize=(page_width, page_height), dpi=100, facecolor="white")
    y = page_height - 0.12
    for lines, points, line in ((title_lines, _TITLE_POINTS, _TITLE_LINE), (notes, _POINTS, _LINE)):
        if lines:
            figure.text(0.12 / page_width, y / page_height, "\n".join(lines), va="top", size=points, parse_math=False,
                        linespacing=1.2, gid="note" if lines is notes else "title")  # fmt: skip
        y -= line * len(lines)
    if legend:
        _draw_legend(figure, legend, y - 0.14, page_width, page_height)
    all_axes = []
    for index, panel in enumerate(panels):
        row, column = divmod(index, across)
        left = labels_width + column * (width + _GAP)
        upper = page_height - top - row * (panel_top + height + panel_bottom) - panel_top
        box = left / page_width, (upper - height) / page_height, width / page_width, height / page_height
        axes = figure.add_axes(box)
        image = _draw_panel(axes, panel if column == 0 else panel._replace(row_labels=()), scale, (width, height))
        axes.set_xlabel(x_label, size=_POINTS, labelpad=2)
        axes.set_ylabel(y_label if column == 0 else "", size=_POINTS)
        all_axes.append(axes)
    _draw_colour_bar(figure, image, scale, labels_width, page_width, page_height)
    return figure, all_axes


def _panel_width(columns: int, panels: int) -> float:
    if panels > 1:
        return min(max(0.085 * columns, 2.4), 9.0)
    return min(max(0.5 * columns, 4.0), 5.2 + 0.08 * columns, 15.0)


def _panel_height(rows: int, panels: int) -> float:
    if rows == 1:
        return 0.6
    per_row = next(size for limit, size in ((4, 0.45), (12, 0.3), (24, 0.22), (math.inf, 0.17)) if rows <= limit)
    return min(rows * min(per_row, 0.2 if panels > 1 else 1.0), 12.0)


def _panels_across(panels: int, width: float, height: float) -> int:
    """The number that makes the page about as wide as high."""
    across = [n for n in range(1, panels + 1) if n * width <= 18] or [1]
    return min(across, key=lambda n: abs(math.log(n * width / (-(-panels // n) * (height + 0.7)))))


def _wrapped(text: str, page_width: float, character: float) -> list[str]:
    lines = textwrap.wrap(printable(text), max(int((page_width - 0.24) / character), 20))
    return lines if len(lines) <= 4 else [*lines[:3], f"{lines[3]}…"]


def _legend(panels: Sequence[Panel], absent_note: str) -> list[tuple[str, str]]:
    entries = []
    if any(panel.dead_RC.any() for panel in panels):
        entries.append((DEAD_COLOUR, DEAD_NOTE))
    if absent_note and any((np.isnan(panel.values_RC) & ~panel.dead_RC).any() for panel in panels):
        entries.append((ABSENT_COLOUR, absent_note))
    return entries


def _draw_legend(
    figure: Figure, entries: list[tuple[str, str]], y: float, page_width: float, page_height: float
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    x = 0.14
    for colour, text in entries:
        box = (x / page_width, (y - 0.07) / page_height), 0.2 / page_width, 0.14 / page_height
        figure.add_artist(Rectangle(*box, facecolor=colour, edgecolor="0.4", linewidth=0.5))
        if colour == DEAD_COLOUR:
            at = [(x + 0.1) / page_width], [y / page_height]
            figure.add_artist(Line2D(*at, marker="x", color="white", markersize=5, markeredgewidth=1.2))
        figure.text((x + 0.27) / page_width, y / page_height, text, va="center", size=_POINTS, gid="legend")
        x += 0.27 + _LEGEND_CHARACTER * len(text) + 0.3


def _draw_panel(axes: Axes, panel: Panel, scale: Scale, size: tuple[float, float]) -> AxesImage:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize, TwoSlopeNorm

    rows, columns = panel.values_RC.shape
    cell = size[0] / columns, size[1] / rows
    norm: Normalize = Normalize(0, scale.top)
    if scale.centre is not None:
        norm = TwoSlopeNorm(scale.centre, 0, scale.top)
    places = [i / (len(scale.colours) - 1) for i in range(len(scale.colours))]
    if scale.top > 2:
        places[3] = 0.5 + 0.5 / (scale.top - 1)  # twice the load is as striking as half of it, whatever the top
    colours = LinearSegmentedColormap.from_list("load", list(zip(places, scale.colours, strict=True)))
    axes.set_facecolor(ABSENT_COLOUR)
    shown = np.ma.masked_invalid(panel.values_RC)
    image = axes.imshow(shown, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    if panel.dead_RC.any():
        mask = np.ma.masked_equal(panel.dead_RC, False)
        axes.imshow(mask, cmap=ListedColormap([DEAD_COLOUR]), aspect="auto", interpolation="nearest", gid="dead")
        if min(cell) >= 0.07:
            y, x = panel.dead_RC.nonzero()
            points = min(min(cell) * 72 * 0.5, 9)
            axes.scatter(x, y, s=points**2, c="white", marker="x", linewidths=min(points / 5, 1.5), gid="dead marks")
    if min(cell) >= 0.09:
        lines = [[(c - 0.5, -0.5), (c - 0.5, rows - 0.5)] for c in range(1, columns)]
        lines += [[(-0.5, r - 0.5), (columns - 0.5, r - 0.5)] for r in range(1, rows)]
        axes.add_collection(LineCollection(lines, colors="0.75", linewidths=0.4), autolim=False)
    if cell[0] >= 0.38 and cell[1] >= 0.18 and rows * columns <= 64:
        _write_values(axes, panel, scale)
    step = _tick_step(cell[0], 0.05 + _CHARACTER * len(str(columns - 1)))
    axes.set_xticks(range(0, columns, step))
    step = _tick_step(cell[1], 0.125)
    axes.set_yticks(
        range(0, rows, step), panel.row_labels[::step] or [""] * len(range(0, rows, step)), parse_math=False
    )
    axes.tick_params(labelsize=_POINTS, length=2, pad=2)
    axes.set_title(panel.title, size=_POINTS, loc="left", pad=3, parse_math=False)
    return image


def _write_values(axes: Axes, panel: Panel, scale: Scale) -> None:
    for (row, column), value in np.ndenumerate(panel.values_RC):
        if np.isfinite(value) and not panel.dead_RC[row, column]:
            dark = value > 0.75 * scale.top or (scale.centre is not None and value < 0.3 * scale.centre)
            colour = "white" if dark else "black"
            text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
            axes.text(column, row, text, ha="center", va="center", size=_SMALL_POINTS, color=colour)


def _tick_step(cell: float, needed: float) -> int:
    """1, 2, 4, 8, ...: as experts are counted."""
    return int(2 ** max(math.ceil(math.log2(needed / cell)), 0))


def _draw_colour_bar(
    figure: Figure, image: AxesImage, scale: Scale, left: float, page_width: float, page_height: float
) -> None:
    """Below everything. Of plain rectangles and texts, in a tenth of the time that ``Figure.colorbar`` takes."""
    from matplotlib.collections import PolyCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Polygon, Rectangle

    width, bottom, height, steps = min(page_width - left - 0.4, 4.5), 0.42, 0.11, 128
    inches = figure.dpi_scale_trans
    edges = [left + width * i / steps for i in range(steps + 1)]
    boxes = [[(a, bottom), (a, bottom + height), (b, bottom + height), (b, bottom)] for a, b in pairwise(edges)]
    colours = image.cmap((np.arange(steps) + 0.5) / steps)
    figure.add_artist(PolyCollection(boxes, facecolors=colours, edgecolors="face", linewidths=0.3, transform=inches))
    shapes: list[Patch] = [Rectangle((left, bottom), width, height, facecolor="none")]
    if scale.extends:
        end = left + width
        tip = [(end, bottom), (end + 0.16, bottom + height / 2), (end, bottom + height)]
        shapes.append(Polygon(tip, facecolor=scale.colours[-1], gid="extends"))
    for shape in shapes:
        shape.set(edgecolor="black", linewidth=0.8, transform=inches)
        figure.add_artist(shape)
    if scale.centre is None:
        values = [scale.top * i / 4 for i in range(5)]
    else:
        values = [0, 0.5, 1, 1.5, 2] if scale.top == 2 else [0, 0.5, *range(1, int(scale.top) + 1)]
    for value, place in zip(values, np.asarray(image.norm(np.array(values))).tolist(), strict=True):
        x = left + width * place
        figure.add_artist(Line2D([x, x], [bottom - 0.03, bottom], color="black", linewidth=0.8, transform=inches))
        figure.text(x, bottom - 0.05, f"{value:g}", ha="center", va="top", size=_POINTS, transform=inches, gid="scale")
    figure.text(left, 0.08, scale.label, size=_POINTS, transform=inches, gid="scale label")

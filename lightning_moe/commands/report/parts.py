"""What the sections of a report are built of: numbers in words, tables, charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape

from lightning_moe.commands.description import count, size_text
from lightning_moe.commands.report.data import Series
from lightning_moe.commands.report.figures import Chart, Format, chart_svg, smoothing_note

# What draws takes its time, so that it is not drawn before its turn comes.
Part = str | Callable[[], str]


@dataclass
class Section:
    """A part of the page.

    Args:
        name: Heading.
        meaning: What the numbers mean and what is healthy, in a sentence.
        parts: HTML, or functions that draw it.
    """

    name: str
    meaning: str
    parts: list[Part] = field(default_factory=list)


def plain(value: float, digits: int = 4) -> str:
    """A number with so many digits that matter.

    >>> plain(3.14159), plain(1234567.0), plain(2.0)
    ('3.142', '1,234,567', '2')
    """
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{digits}g}"


def percent(value: float, digits: int = 3) -> str:
    """A share.

    >>> percent(0.01234), percent(0)
    ('1.23 %', '0 %')
    """
    return f"{100 * value:.{digits}g} %" if math.isfinite(value) else str(value)


def seconds(value: float, digits: int = 3) -> str:
    """A short time.

    >>> seconds(0.01234), seconds(2.5)
    ('12.3 ms', '2.5 s')
    """
    return f"{1000 * value:.{digits}g} ms" if abs(value) < 1 else f"{value:.{digits}g} s"


def in_bytes(value: float, digits: int = 0) -> str:
    """A number of bytes, which may be a mean; the unit says how many digits it has.

    >>> in_bytes(1536.5)
    '1.5 kB'
    """
    return size_text(round(value)) if math.isfinite(value) else str(value)


def missing(text: str) -> str:
    """A line in the place of what was not logged."""
    return f'<p class="missing">{escape(text)}</p>'


def table(lines: Mapping[str, Series], write: Callable[[str], Format]) -> str:
    """First, last, lowest and highest value of metrics, with their steps."""
    rows = []
    for name, series in lines.items():
        finite = [(v, s) for s, v in zip(series.steps, series.values, strict=True) if math.isfinite(v)]
        written = write(name)

        def cell(point: tuple[float, int], written: Format = written) -> str:
            return f"<td>{escape(written(point[0]))} <small>at {point[1]:,}</small></td>"

        ends = cell((series.values[0], series.steps[0])) + cell((series.values[-1], series.steps[-1]))
        extremes = cell(min(finite)) + cell(max(finite, key=lambda p: (p[0], -p[1]))) if finite else "<td>-</td>" * 2
        wrong = len(series.values) - len(finite)
        note = f" <strong>{count(wrong, 'value')} not finite</strong>" if wrong else ""
        rows.append(f'<tr><th scope="row"><code>{escape(name)}</code>{note}</th>{ends}{extremes}</tr>')
    head = "".join(f'<th scope="col">{text}</th>' for text in ("Metric", "First", "Last", "Lowest", "Highest"))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def charts(drawn: Sequence[Chart], key: str) -> list[Part]:
    """Charts beside each other.

    Args:
        drawn: What to draw.
        key: Unique in the page.
    """
    if not drawn:
        return []
    parts: list[Part] = ['<div class="charts">']
    for i, chart in enumerate(drawn):
        said = f"{chart.caption} {smoothing_note(chart)}".strip()
        head = f"<figure><figcaption><strong>{escape(chart.title)}</strong> {escape(said)}</figcaption>"
        parts += [head, partial(chart_svg, chart, f"{key}-{i}"), "</figure>"]
    return [*parts, "</div>"]

"""Text of a summary: names, numbers, columns and lines that fit a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise

WIDTH = 120
"""Columns of a terminal that everything fits into."""


def layer_label(indices: Sequence[int]) -> str:
    """Names of layers by index, as metrics have them: ``layer_00 to layer_31``."""
    shown, step = [f"{index:02}" for index in indices], step_between(indices)
    if step == 1:
        return f"layer_{shown[0]} to layer_{shown[-1]}"
    if len(shown) > 3:
        shown = [f"{shown[0]}, {shown[1]} ... {shown[-1]}"] if step else [f"{shown[0]} ... {shown[-1]} (some)"]
    return f"layer_{', '.join(shown)}"


def step_between(numbers: Sequence[int]) -> int | None:
    """Of numbers that are equally far apart."""
    steps = {after - before for before, after in pairwise(numbers)}
    return steps.pop() if len(steps) == 1 else None


def common_name(names: Sequence[str]) -> str:
    """One name for all: ``blocks.0.moe`` to ``blocks.3.moe`` are ``blocks.[0-3].moe``."""
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) > 1:
        return f"{names[0]} ..."
    return ".".join(common_part(column) for column in zip(*parts, strict=True))


def common_part(column: Sequence[str]) -> str:
    if len(set(column)) == 1:
        return column[0]
    step = step_between([int(part) for part in column]) if all(part.isdecimal() for part in column) else None
    if step == 1:
        return f"[{column[0]}-{column[-1]}]"
    if step is not None and len(column) < 4:
        return f"[{','.join(column)}]"
    return "*" if step is None else f"[{column[0]},{column[1]}..{column[-1]}]"


def table(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of one width, the first line at the head; the second column gives way where all are too wide."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    too_wide = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    widths[1] = max(widths[1] - max(too_wide, 0), 12)
    cells = [(line[0], shortened(line[1], widths[1]), *line[2:]) for line in lines]
    made = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return [made[0], "-" * max(map(len, made)), *made[1:]]


def shortened(name: str, width: int) -> str:
    """Without the modules on the outside: what tells layers apart is inside."""
    if len(name) <= width:
        return name
    _, dot, inside = name.partition(".")
    while dot and len(inside) > width - 3:
        _, dot, inside = inside.partition(".")
    return f"...{inside or name[3 - width :]}"


def notes_of(name: str, by_label: dict[str, str]) -> list[tuple[str, str]]:
    """One where all layers have the same to say, otherwise one for each kind."""
    if len(said := set(by_label.values())) == 1:
        return [(name, said.pop())]
    return [(name * (i == 0), f"{label}: {text}") for i, (label, text) in enumerate(by_label.items())]


def wrapped(notes: Sequence[tuple[str, str]]) -> list[str]:
    """Texts beside their names."""
    indent = max(len(name) for name, _ in notes) + 2
    return [fill(f"{name:{indent}}{text}", indent) for name, text in notes]


def fill(text: str, indent: int = 0) -> str:
    """Broken into lines."""
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def scaled(number: float, unit: str) -> str:
    """To four digits: ``1.573 MB``."""
    prefixes = ["", "k", "M", "G", "T"]
    power = min(max(len(str(int(number))) - 1, 0) // 3, len(prefixes) - 1)
    return f"{number / 1000**power:.4g} {prefixes[power]}{unit}"


def counted(count: int, noun: str, plural: str = "s") -> str:
    """``1,000 tokens``."""
    return f"{count:,} {noun}{plural * (count != 1)}"

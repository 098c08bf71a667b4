"""What MoESummary says, caught and taken apart."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightning_moe.callbacks._summary_text import WIDTH as COLUMNS
from lightning_moe.parallel import ExpertGroups

LOGGER = "lightning.pytorch.utilities.rank_zero"


@contextmanager
def heard() -> Iterator[list[str]]:
    """What the summary says meanwhile, on this rank."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        said[:] = [text for text in said if text.startswith("MoESummary")]


SCALE = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}


def scaled(text: str, unit: str) -> list[float]:
    """All numbers of this unit."""
    found = re.findall(rf"([\d.e+]+) ([kMG]?){unit}\b", text)
    return [float(number) * SCALE[prefix] for number, prefix in found]


@dataclass
class Read:
    """A summary, taken apart."""

    title: str
    layers: list[dict[str, str]]
    parameters: dict[str, tuple[int, ...]]
    notes: dict[str, str]


def read(text: str) -> Read:
    assert max(map(len, text.splitlines())) <= COLUMNS
    title, table, parameters, notes = text.split("\n\n")
    header, _, *lines = table.splitlines()
    names = re.split(r"\s{2,}", header)
    starts = [header.index(name) for name in names]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    counts = [re.split(r"\s{2,}", line) for line in parameters.splitlines()[1:]]
    by_name: dict[str, str] = {}
    indent = len(re.match(r"\S+( \S+)*\s+", notes).group())  # type: ignore[union-attr]
    for line in notes.splitlines():
        name, text = line[:indent].strip(), line[indent:]
        if name:
            by_name[name] = text
        else:  # the line before goes on
            by_name[[*by_name][-1]] += f" {text}"
    return Read(
        title,
        [dict(zip(names, line, strict=True)) for line in cells],
        {name: tuple(int(n.replace(",", "")) for n in numbers) for name, *numbers in counts},
        by_name,
    )


class _Group:
    """Stands for a process group."""


def groups(ep_size: int) -> ExpertGroups:
    return ExpertGroups(ep_size, 0, _Group() if ep_size > 1 else None)  # type: ignore[arg-type]

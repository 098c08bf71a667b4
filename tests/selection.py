"""Which cases of a grid are in the default run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def one_in(number: int, *factors: Sequence[Any]) -> list[Any]:
    """All combinations as parameters; by default those alone whose places add up to a multiple of ``number``.

    Every value of every factor is among these, and any two of different factors meet where a third factor has
    ``number`` values or more. A value that is a tuple stands for several parameters.
    """
    found = []
    for combination in itertools.product(*map(enumerate, factors)):
        places, values = zip(*combination, strict=True)
        flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        found.append(pytest.param(*flat, marks=[pytest.mark.grid] * (sum(places) % number > 0)))
    return found

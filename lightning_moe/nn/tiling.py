"""How an expert's rows are cut into tiles, and how what the tiles yield is summed by token.

Shapes: A tokens on this rank, K experts per token, R rows in expert order, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from lightning_moe.dispatch.permute import Permutation

TILE = 1024
"""Most rows of a tile: of more, what one product wrote has left the cache before the next reads it; with fewer, each
product's own preparation of its weights, once per tile, begins to count."""

_ROW_MULTIPLE = 8
"""Of the rows of a product in bf16: oneDNN compiles one for every number of rows, which takes as long as to run it."""

_RUN_BYTES = 16 * 2**20
"""Of rows that are kept until they are summed by token, and of their sums. glibc's malloc maps blocks above 32 MiB anew
each time."""

_MOST_RUNS = 8
"""Every run looks at all tokens, so that many rows are kept in a larger block rather than summed more often."""

_MOST_OF_MEAN = 1.25
"""Rows of the worker with most, as a multiple of the mean: with more, torch's own threads are as fast on each tile."""


@dataclass(frozen=True)
class Tile:
    """Rows [start, start + size) of one expert.

    Args:
        index: Of this tile.
        expert: Whose rows, by its index on this rank.
        start: The first of them.
        size: How many.
        place: Where the first stands if every tile before it has ``padded`` rows and there are no others.
        padded: Rows of a product.
        is_first: Whether it is the expert's first tile.
        is_last: Whether it is the expert's last tile.
    """

    index: int
    expert: int
    start: int
    size: int
    place: int
    padded: int
    is_first: bool
    is_last: bool

    @property
    def rows(self) -> slice:
        """The rows, without padding."""
        return slice(self.start, self.start + self.size)


def cut(plan: Permutation, dtype: torch.dtype) -> list[Tile]:
    """All tiles in the order of rows; an expert's are of about one size."""
    tiles: list[Tile] = []
    start = place = 0
    multiple = _ROW_MULTIPLE if dtype in (torch.bfloat16, torch.float16) else 1
    for expert, size in enumerate(plan.tokens_per_expert_E.tolist()):
        begin = start if plan.rows_per_expert is None else expert * plan.rows_per_expert
        start = begin + size
        number = -(-size // TILE)
        for i in range(number):
            first, end = size * i // number, size * (i + 1) // number
            padded = -(-(end - first) // multiple) * multiple
            at = len(tiles), expert, begin + first, end - first, place, padded
            tiles.append(Tile(*at, is_first=i == 0, is_last=i == number - 1))
            place += padded
    return tiles


@dataclass(frozen=True)
class Run:
    """Tiles whose rows are summed together.

    Args:
        tiles: In the order of rows.
        shares: The same tiles, divided among workers.
    """

    tiles: list[Tile]
    shares: list[list[Tile]]

    @property
    def place(self) -> int:
        """Of the first row."""
        return self.tiles[0].place

    @property
    def size(self) -> int:
        """Rows of all tiles, padding included."""
        return self.tiles[-1].place + self.tiles[-1].padded - self.place

    def place_of(self, tile: Tile) -> slice:
        """The rows that a product writes, from the start of the run."""
        return slice(tile.place - self.place, tile.place - self.place + tile.padded)


def runs_of(tiles: list[Tile], bytes_per_row: int, workers: int) -> list[Run]:
    """At most ``_MOST_RUNS`` of about one size."""
    total = _rows(tiles)
    number = min(-(-total * bytes_per_row // _RUN_BYTES), _MOST_RUNS)
    runs: list[list[Tile]] = [[] for _ in range(number)]
    done = 0
    for tile in tiles:
        runs[done * number // total].append(tile)
        done += tile.size
    return [Run(run, _shares(run, workers)) for run in runs if run]


def _shares(tiles: list[Tile], workers: int) -> list[list[Tile]]:
    """An expert's tiles all go to one worker, and all tiles to one where others would have too little to do."""
    by_expert = [list(group) for _, group in groupby(tiles, key=lambda tile: tile.expert)]
    shares: list[list[Tile]] = [[] for _ in range(workers)]
    for group in sorted(by_expert, key=_rows, reverse=True):
        min(shares, key=_rows).extend(group)
    is_even = max(map(_rows, shares)) * workers <= _MOST_OF_MEAN * _rows(tiles)
    return shares if is_even and workers > 1 else [tiles]


def _rows(tiles: list[Tile]) -> int:
    return sum(tile.size for tile in tiles)


class SumByToken:
    """Sum of the rows of every token, a run at a time.

    Args:
        like_AD: A tensor like the sum.
        weights_AK: Of the rows; ``None`` is 1.
        plan: Which rows belong to a token.
        runs: All there will be.
    """

    def __init__(self, like_AD: Tensor, weights_AK: Tensor | None, plan: Permutation, runs: list[Run]) -> None:
        self._like_AD, self._place_AK, self._is_divided = like_AD, _places(plan, runs), len(runs) > 1
        self._weights_AK = weights_AK
        if weights_AK is not None:  # where there is no row they may be anything, NaN included
            has_row_AK = plan.row_TK < len(plan.assignment_R)
            self._weights_AK = torch.where(has_row_AK, weights_AK, 0).to(like_AD.dtype)
        longest = max((run.size for run in runs), default=0)
        self._rows = like_AD.new_empty(longest + 1, like_AD.shape[1])
        # A sum of two is rounded once either way.
        self._wide = wide(like_AD.dtype) if len(runs) > 2 else like_AD.dtype
        self._total_AD: Tensor | None = None
        self._tokens = max(_RUN_BYTES // (like_AD.shape[1] * like_AD.element_size()), 1)  # whose sums are made at once

    def rows_of(self, run: Run, tile: Tile) -> Tensor:
        """Where a tile is to be written."""
        return self._rows[run.place_of(tile)]

    def add(self, run: Run) -> None:
        """Adds what was written."""
        rows = self._rows[: run.size + 1]
        rows[run.size].zero_()  # for assignments that have no row in this run
        index_AK = self._place_AK
        if self._is_divided:
            index_AK = index_AK - run.place
            index_AK.masked_fill_((index_AK < 0) | (index_AK >= run.size), run.size)
        if self._total_AD is None and len(index_AK) <= self._tokens:
            self._total_AD = self._sum(rows, index_AK, slice(None)).to(self._wide)
            return
        if self._total_AD is None:
            self._total_AD = torch.zeros_like(self._like_AD, dtype=self._wide)
        for start in range(0, len(index_AK), self._tokens):
            tokens = slice(start, start + self._tokens)
            self._total_AD[tokens].add_(self._sum(rows, index_AK, tokens))

    def _sum(self, rows: Tensor, index_AK: Tensor, tokens: slice) -> Tensor:
        weights_AK = None if self._weights_AK is None else self._weights_AK[tokens]
        return functional.embedding_bag(index_AK[tokens], rows, mode="sum", per_sample_weights=weights_AK)

    def result(self) -> Tensor:
        """[A, D]."""
        if self._total_AD is None:
            return torch.zeros_like(self._like_AD)
        return self._total_AD.to(self._like_AD.dtype)


def _places(plan: Permutation, runs: list[Run]) -> Tensor:
    """Of the row of every assignment, [A, K]; the first beyond all tiles, padding included, where it has none."""
    num_rows, tiles = len(plan.assignment_R), [tile for run in runs for tile in run.tiles]
    beyond = tiles[-1].place + tiles[-1].padded if tiles else 0
    if all(tile.place == tile.start and tile.padded == tile.size for tile in tiles):
        return plan.row_TK.clamp(max=beyond)
    places = plan.row_TK.new_full((num_rows + 1,), beyond)
    for tile in tiles:
        torch.arange(tile.place, tile.place + tile.size, out=places[tile.rows])
    return places[plan.row_TK.clamp(max=num_rows)]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is summed over several tiles is summed in fp32 at least."""
    return torch.promote_types(dtype, torch.float32)

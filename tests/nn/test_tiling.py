"""How rows are cut into tiles, runs and shares, written out by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.dispatch.permute import Permutation, plan_permutation
from lightning_moe.nn import tiling

L, TILE, RUN_BYTES, BYTES_PER_ROW = 4, 8, 512, 32


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE", TILE)
    monkeypatch.setattr(tiling, "_RUN_BYTES", RUN_BYTES)


def test_tiles_by_hand() -> None:
    """(expert, first row, rows, rows of a product)."""
    ids = torch.tensor([0] * 20 + [2] * 3 + [3] * 8).unsqueeze(1)
    fp32 = [(0, 0, 6, 6), (0, 6, 7, 7), (0, 13, 7, 7), (2, 20, 3, 3), (3, 23, 8, 8)]

    def found(plan: Permutation, dtype: torch.dtype) -> list[tuple[int, int, int, int]]:
        return [(t.expert, t.start, t.size, t.padded) for t in tiling.cut(plan, dtype)]

    assert found(plan_permutation(ids, L), torch.float32) == fp32
    assert found(plan_permutation(ids, L), torch.bfloat16) == [(*tile[:3], 8) for tile in fp32]
    starts = [0, 6, 13, 50, 75]
    gaps = [(tile[0], start, *tile[2:]) for tile, start in zip(fp32, starts, strict=True)]
    assert found(plan_permutation(ids, L, rows_per_expert=25), torch.float32) == gaps


def test_many_rows_are_kept_in_larger_runs() -> None:
    plan = plan_permutation(torch.arange(L).repeat(1000).unsqueeze(1), L)
    runs = tiling.runs_of(tiling.cut(plan, torch.float32), BYTES_PER_ROW, 1)
    assert len(runs) == 8
    assert max(run.size for run in runs) <= 500 + TILE


def test_shares_by_hand() -> None:
    """Rows of the experts, to be divided between two: who gets which tiles; all tiles in one where that is too uneven."""

    def shares(*rows: int) -> list[list[tuple[int, int]]]:
        ids = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)).unsqueeze(1)
        tiles = tiling.cut(plan_permutation(ids, len(rows)), torch.float32)
        (run,) = tiling.runs_of(tiles, 1, 2)
        return [[(tile.expert, tile.size) for tile in share] for share in run.shares]

    assert shares(3, 12, 5) == [[(1, 6), (1, 6)], [(2, 5), (0, 3)]]
    assert shares(1, 6, 1) == [[(0, 1), (1, 6), (2, 1)]]
    assert shares(7) == [[(0, 7)]]
    assert shares(5, 3) == [[(0, 5)], [(1, 3)]]
    assert shares(6, 3) == [[(0, 6), (1, 3)]]

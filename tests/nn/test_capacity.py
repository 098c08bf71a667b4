"""How many rows an expert takes, and which assignments stay: against a table and against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.nn import expert_capacity, keep_within_capacity


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "factor", "min_capacity", "expected"),
    [
        (1024, 8, 2, 1.25, 4, 320),
        (1024, 8, 1, 1.0, 4, 128),
        (10, 4, 2, 1.25, 4, 7),  # 6.25 is rounded up
        (7, 4, 2, 1.0, 1, 4),  # 3.5
        (8, 4, 2, 1.0, 1, 4),  # even as it is
        (9, 4, 2, 0.5, 1, 3),  # 2.25
        (3, 8, 1, 1.0, 1, 1),  # fewer tokens than experts: 0.375
        (3, 8, 1, 1.0, 4, 4),
        (3, 8, 8, 1.0, 1, 3),  # every expert is asked by every token
        (1, 64, 1, 2.0, 1, 1),
        (0, 4, 2, 1.25, 4, 4),
        (0, 4, 2, 1.25, 1, 1),
        (16, 4, 1, 1.0, 4, 4),
        (16, 4, 1, 1.0, 5, 5),  # the lower bound is above the share
        (200_000_000, 3, 1, 1.0, 4, 66_666_667),  # fp32 could not tell this from its neighbours
    ],
)
def test_table(num_tokens: int, num_experts: int, top_k: int, factor: float, min_capacity: int, expected: int) -> None:
    for tokens in (num_tokens, torch.tensor(num_tokens)):
        capacity = expert_capacity(tokens, num_experts, top_k, factor, min_capacity)
        assert capacity.shape == ()
        assert capacity.dtype == torch.int64
        assert capacity.item() == expected


def kept_by_loops(ids: list[list[int]], scores: list[list[float]], num_experts: int, capacity: int) -> list[list[bool]]:
    """Every expert goes through those that ask for it, the best first, and takes as many as it can."""
    kept = [[False] * len(row) for row in ids]
    for expert in range(num_experts):
        asking = [(-scores[t][k], t, k) for t, row in enumerate(ids) for k, e in enumerate(row) if e == expert]
        for _, t, k in sorted(asking)[:capacity]:
            kept[t][k] = True
    return kept


@st.composite
def routes(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], int, int]:
    num_experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, min(3, num_experts)))
    experts = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    ids = draw(st.lists(experts, min_size=1, max_size=14))
    # From a few values, so that there are ties.
    score = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])
    scores = [draw(st.lists(score, min_size=top_k, max_size=top_k)) for _ in ids]
    return ids, scores, num_experts, draw(st.integers(1, 6))


@given(routes())
@settings(max_examples=200, deadline=None)
def test_as_by_plain_loops(case: tuple[list[list[int]], list[list[float]], int, int]) -> None:
    ids, scores, num_experts, capacity = case
    ids_TK, scores_TK = torch.tensor(ids), torch.tensor(scores)
    kept_TK = keep_within_capacity(ids_TK, scores_TK, num_experts, capacity)
    assert kept_TK.tolist() == kept_by_loops(ids, scores, num_experts, capacity)
    told_by_tensor = keep_within_capacity(ids_TK, scores_TK, num_experts, torch.tensor(capacity))
    assert torch.equal(told_by_tensor, kept_TK)

    # The properties themselves, so that the loops need not be trusted.
    assert int(kept_TK.sum()) + int((~kept_TK).sum()) == ids_TK.numel()
    token_TK = torch.arange(len(ids)).unsqueeze(1).expand_as(ids_TK)
    for expert in range(num_experts):
        asking = ids_TK == expert
        kept, dropped = asking & kept_TK, asking & ~kept_TK
        assert int(kept.sum()) == min(capacity, int(asking.sum()))
        if dropped.any():
            lowest_kept, highest_dropped = scores_TK[kept].min(), scores_TK[dropped].max()
            assert lowest_kept >= highest_dropped
            if lowest_kept == highest_dropped:
                tied = scores_TK == lowest_kept
                assert token_TK[kept & tied].max() < token_TK[dropped & tied].min()


def test_example() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])
    scores = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2]])
    kept = keep_within_capacity(ids, scores, num_experts=3, capacity=2)
    assert kept.tolist() == [[True, False], [False, True], [True, True], [True, False]]


def test_ties_keep_token_order_also_in_long_batches() -> None:
    ids = torch.zeros(5000, 1, dtype=torch.long)
    kept = keep_within_capacity(ids, torch.full((5000, 1), 0.5), num_experts=2, capacity=1234)
    assert kept.flatten().tolist() == [True] * 1234 + [False] * (5000 - 1234)


def test_no_tokens() -> None:
    kept = keep_within_capacity(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), 4, 3)
    assert kept.shape == (0, 2)
    assert kept.dtype == torch.bool


def test_it_is_outside_the_graph() -> None:
    scores = torch.rand(4, 1, requires_grad=True)
    assert not keep_within_capacity(torch.zeros(4, 1, dtype=torch.long), scores, 2, 1).requires_grad

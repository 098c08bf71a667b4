"""How many rows an expert takes, and which assignments stay: against a table and against plain loops."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.nn import expert_capacity, keep_within_capacity, move_to_next_expert

Route = list[list[int]]
Mask = list[list[bool]]


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
        (1, 1, 1, 1.0, 1, 1),
        (2, 16, 2, 1.0, 1, 1),  # 0.25: nobody is left without a row
        (2, 16, 2, 8.0, 1, 2),
        (5, 8, 2, 1.25, 1, 2),  # 1.5625
        (6, 3, 3, 1.0, 1, 6),  # all tokens at all experts
        (6, 3, 3, 2.0, 1, 12),  # more rows than could ever come
        (1000, 10, 1, 1.1, 1, 110),  # 1.1 is a little more in binary than it looks
        (50, 4, 4, 1.1, 1, 55),
        (1000, 10, 1, 1.101, 1, 111),
        (10_000_000, 10, 1, 1.0000001, 1, 1_000_001),  # 0.1 of a row too many
        (12, 4, 1, 1 / 3, 1, 1),
        (13, 4, 1, 1 / 3, 1, 2),  # 1.083
        (100, 7, 2, 1.0, 4, 29),  # 28.57
        (100, 7, 2, 1e-6, 4, 4),
        (200_000_000, 3, 1, 1.0, 4, 66_666_667),  # fp32 could not tell this from its neighbours
    ],
)
def test_table(num_tokens: int, num_experts: int, top_k: int, factor: float, min_capacity: int, expected: int) -> None:
    for tokens in (num_tokens, torch.tensor(num_tokens)):
        capacity = expert_capacity(tokens, num_experts, top_k, factor, min_capacity)
        assert capacity.shape == ()
        assert capacity.dtype == torch.int64
        assert capacity.item() == expected


def kept_by_loops(
    ids: Route, scores: list[list[float]], capacities: list[int], assigned: Mask | None = None
) -> list[list[bool]]:
    """Every expert goes through those that ask for it, the best first, and takes as many as it can."""
    kept = [[False] * len(row) for row in ids]
    for expert, capacity in enumerate(capacities):
        asking = [
            (-scores[t][k], t, k)
            for t, row in enumerate(ids)
            for k, e in enumerate(row)
            if e == expert and (assigned is None or assigned[t][k])
        ]
        for _, t, k in sorted(asking)[:capacity]:
            kept[t][k] = True
    return kept


class Case(NamedTuple):
    ids: Route
    scores: list[list[float]]
    num_experts: int
    capacity: int
    assigned: Mask
    choice: list[list[float]]


@st.composite
def routes(draw: st.DrawFn, padding_is_whole_tokens: bool = False) -> Case:
    num_experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, min(3, num_experts)))
    experts = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    ids = draw(st.lists(experts, min_size=1, max_size=14))
    # From a few values, so that there are ties.
    score = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])
    scores = [draw(st.lists(score, min_size=top_k, max_size=top_k)) for _ in ids]
    flags = st.booleans() if draw(st.booleans()) else st.just(True)
    if padding_is_whole_tokens:
        assigned = [[draw(flags)] * top_k for _ in ids]
    else:
        assigned = [draw(st.lists(flags, min_size=top_k, max_size=top_k)) for _ in ids]
    choice = [draw(st.lists(score, min_size=num_experts, max_size=num_experts)) for _ in ids]
    return Case(ids, scores, num_experts, draw(st.integers(1, 6)), assigned, choice)


@given(routes())
@settings(max_examples=200, deadline=None)
def test_as_by_plain_loops(case: Case) -> None:
    ids, scores, num_experts, capacity, *_ = case
    ids_TK, scores_TK = torch.tensor(ids), torch.tensor(scores)
    kept_TK = keep_within_capacity(ids_TK, scores_TK, num_experts, capacity)
    assert kept_TK.tolist() == kept_by_loops(ids, scores, [capacity] * num_experts)
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


@given(routes(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_mask_and_a_capacity_of_every_expert(case: Case, data: st.DataObject) -> None:
    ids, scores, num_experts, _, assigned, _ = case
    capacities = data.draw(st.lists(st.integers(0, 5), min_size=num_experts, max_size=num_experts))
    ids_TK, assigned_TK = torch.tensor(ids), torch.tensor(assigned)
    kept_TK = keep_within_capacity(ids_TK, torch.tensor(scores), num_experts, torch.tensor(capacities), assigned_TK)
    assert kept_TK.tolist() == kept_by_loops(ids, scores, capacities, assigned)
    assert not bool((kept_TK & ~assigned_TK).any())
    for expert, capacity in enumerate(capacities):
        asking = int(((ids_TK == expert) & assigned_TK).sum())
        assert int((kept_TK & (ids_TK == expert)).sum()) == min(capacity, asking)


def moved_by_loops(case: Case, kept: Mask) -> tuple[Route, Mask, Mask]:
    """Round by round, token by token; the experts, what is kept, and what moved."""
    ids, kept = [list(row) for row in case.ids], [list(row) for row in kept]
    top_k, moved = len(ids[0]), [[False] * len(row) for row in ids]
    homeless = {(t, k) for t, row in enumerate(ids) for k in range(top_k) if case.assigned[t][k] and not kept[t][k]}
    while True:
        room = dict.fromkeys(range(case.num_experts), case.capacity)
        for t, row in enumerate(ids):
            for k, e in enumerate(row):
                room[e] -= kept[t][k]
        asking: dict[int, list[tuple[float, int, int]]] = {e: [] for e in room}
        for t, row in enumerate(ids):
            wanting = [k for k in range(top_k) if (t, k) in homeless]
            open_ones = [e for e in room if room[e] > 0 and e not in row]
            preferred = sorted(open_ones, key=lambda e: (-case.choice[t][e], e))
            for k, e in zip(wanting, preferred, strict=False):
                asking[e].append((-case.scores[t][k], t * top_k + k, k))
        found = [(e, at // top_k, k) for e, those in asking.items() for _, at, k in sorted(those)[: room[e]]]
        for e, t, k in found:
            ids[t][k], kept[t][k], moved[t][k] = e, True, True
            homeless.remove((t, k))
        if not found:
            return ids, kept, moved


@given(routes())
@settings(max_examples=250, deadline=None)
def test_moving_as_by_plain_loops(case: Case) -> None:
    kept = kept_by_loops(case.ids, case.scores, [case.capacity] * case.num_experts, case.assigned)
    ids_TK, kept_TK, assigned_TK = torch.tensor(case.ids), torch.tensor(kept), torch.tensor(case.assigned)
    arguments = torch.tensor(case.choice), torch.tensor(case.scores)
    moved_TK, found_TK = move_to_next_expert(ids_TK, kept_TK, *arguments, case.capacity, assigned_TK)
    ids, found, _ = moved_by_loops(case, kept)
    assert found_TK.tolist() == found
    assert moved_TK.tolist() == ids
    by_tensor = move_to_next_expert(ids_TK, kept_TK, *arguments, torch.tensor(case.capacity), assigned_TK)
    assert torch.equal(by_tensor[0], moved_TK)
    assert torch.equal(by_tensor[1], found_TK)
    if assigned_TK.all():
        unmasked = move_to_next_expert(ids_TK, kept_TK, *arguments, case.capacity)
        assert torch.equal(unmasked[0], moved_TK)
        assert torch.equal(unmasked[1], found_TK)


@given(routes(padding_is_whole_tokens=True))
@settings(max_examples=150, deadline=None)
def test_moving_finds_all_the_room_there_is(case: Case) -> None:
    """The properties themselves, so that the loops need not be trusted."""
    ids_TK, assigned_TK = torch.tensor(case.ids), torch.tensor(case.assigned)
    priority_TK = torch.tensor(case.scores)
    kept_TK = keep_within_capacity(ids_TK, priority_TK, case.num_experts, case.capacity, assigned_TK)
    new_TK, has_row_TK = move_to_next_expert(
        ids_TK, kept_TK, torch.tensor(case.choice), priority_TK, case.capacity, assigned_TK
    )
    is_moved_TK = has_row_TK & ~kept_TK
    is_dropped_TK = assigned_TK & ~has_row_TK
    assert int(kept_TK.sum() + is_moved_TK.sum() + is_dropped_TK.sum()) == int(assigned_TK.sum())
    assert not bool((has_row_TK & ~assigned_TK).any())
    # Nobody who had a place loses it, and what found none stands where it was.
    assert bool(has_row_TK[kept_TK].all())
    assert torch.equal(new_TK[~is_moved_TK], ids_TK[~is_moved_TK])
    used = [int((has_row_TK & (new_TK == e)).sum()) for e in range(case.num_experts)]
    assert max(used) <= case.capacity
    for row, has_row in zip(new_TK.tolist(), has_row_TK.tolist(), strict=True):
        held = [e for e, has in zip(row, has_row, strict=True) if has]
        assert len(held) == len(set(held))
    for t in is_dropped_TK.any(1).nonzero().flatten().tolist():
        held = {int(e) for e in new_TK[t][has_row_TK[t]]}
        assert all(used[e] == case.capacity for e in range(case.num_experts) if e not in held)


def test_moving_by_hand() -> None:
    """Three tokens want experts 0 and 1, which have one row each; four experts, top-2."""
    ids = torch.tensor([[0, 1], [0, 1], [1, 0]])
    kept = keep_within_capacity(ids, torch.ones(3, 2), num_experts=4, capacity=1)
    assert kept.tolist() == [[True, True], [False, False], [False, False]]
    choice = torch.tensor([[9.0, 8.0, 0.0, 0.0], [9.0, 8.0, 1.0, 2.0], [8.0, 9.0, 2.0, 2.0]])
    # Token 1 asks 3 and 2, token 2 asks 2 and 3; the earlier goes first, and no round is left for token 2.
    moved, found = move_to_next_expert(ids, kept, choice, torch.ones(3, 2), capacity=1)
    assert moved.tolist() == [[0, 1], [3, 2], [1, 0]]
    assert found.tolist() == [[True, True], [True, True], [False, False]]
    # Expert 2 prefers token 2, while expert 3 sees no difference.
    moved, found = move_to_next_expert(ids, kept, choice, torch.tensor([[1.0, 1], [1, 2], [3, 1]]), capacity=1)
    assert moved.tolist() == [[0, 1], [3, 1], [2, 0]]
    assert found.tolist() == [[True, True], [True, False], [True, False]]


def test_nothing_to_move() -> None:
    ids, kept = torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2, dtype=torch.bool)
    moved, found = move_to_next_expert(ids, kept, torch.rand(2, 3), torch.rand(2, 2), capacity=2)
    assert torch.equal(moved, ids)
    assert torch.equal(found, kept)
    none = torch.zeros(0, 2, dtype=torch.long)
    moved, found = move_to_next_expert(none, none.bool(), torch.rand(0, 3), torch.rand(0, 2), capacity=2)
    assert (moved.shape, found.shape, found.dtype) == ((0, 2), (0, 2), torch.bool)


def test_long_batches_fill_every_row() -> None:
    """All want expert 0 most; every other expert fills up in the tokens' order."""
    num_tokens, num_experts = 400, 8
    ids = torch.zeros(num_tokens, 1, dtype=torch.long)
    choice = torch.arange(num_experts, 0, -1).float().expand(num_tokens, -1)
    kept = keep_within_capacity(ids, torch.ones(num_tokens, 1), num_experts, 50)
    moved, found = move_to_next_expert(ids, kept, choice, torch.ones(num_tokens, 1), capacity=50)
    assert bool(found.all())
    assert moved.flatten().tolist() == [t // 50 for t in range(num_tokens)]


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
    ids = torch.zeros(4, 1, dtype=torch.long)
    kept = keep_within_capacity(ids, scores, 2, 1)
    assert not kept.requires_grad
    assert not any(t.requires_grad for t in move_to_next_expert(ids, kept, torch.rand(4, 2).add(scores), scores, 1))

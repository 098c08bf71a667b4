"""Padding to a fixed shape: rows by hand, the same numbers as without, and no size that depends on the routing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moe.dispatch import FixedShape, make_dispatcher
from lightning_moe.dispatch.permute import permute, plan_permutation, unpermute
from lightning_moe.nn import GroupedExperts, keep_within_capacity
from lightning_moe.nn import experts as experts_module
from lightning_moe.nn.activation import activate
from lightning_moe.nn.experts import linear_by_expert
from lightning_moe.parallel import SINGLE_RANK
from lightning_moe.testing import RankPool
from tests.dispatch.test_dispatchers import (
    LAYOUTS,
    LIMIT,
    NAMES,
    D,
    E,
    Part,
    bring_back,
    groups_of,
    identity,
    layouts,
    make_experts,
    names,
    routes,
    send,
    warm_up,
)
from tests.selection import one_in

# (name, ids, experts, kept, rows per expert, assignment of every row, row of every assignment)
BY_HAND: list[tuple[str, list[list[int]], int, list[list[bool]] | None, int, list[int], list[list[int]]]] = [
    ("top1", [[2], [0], [2], [1]], 3, None, 2, [1, 4, 3, 4, 0, 2], [[4], [0], [5], [2]]),
    (
        "top2",
        [[1, 0], [1, 2], [0, 2]],
        4,
        None,
        3,
        [1, 4, 6, 0, 2, 6, 3, 5, 6, 6, 6, 6],
        [[3, 0], [4, 6], [1, 7]],
    ),
    ("just enough", [[1], [0], [1], [0]], 2, None, 2, [1, 3, 0, 2], [[2], [0], [3], [1]]),
    (
        "dropped",
        [[1, 0], [1, 2], [0, 2]],
        3,
        [[True, False], [False, True], [True, True]],
        2,
        [4, 6, 0, 6, 3, 5],
        [[2, 6], [6, 4], [0, 5]],
    ),
    ("all dropped", [[0, 1]], 2, [[False, False]], 1, [2, 2], [[2, 2]]),
    ("foreign ids", [[-3], [7], [1]], 2, [[False], [False], [True]], 2, [3, 3, 2, 3], [[4], [4], [2]]),
]


@pytest.mark.parametrize(
    ("ids", "num_experts", "kept", "rows", "assignment", "row"),
    [case[1:] for case in BY_HAND],
    ids=[case[0] for case in BY_HAND],
)
def test_plan_by_hand(
    ids: list[list[int]],
    num_experts: int,
    kept: list[list[bool]] | None,
    rows: int,
    assignment: list[int],
    row: list[list[int]],
) -> None:
    kept_TK = None if kept is None else torch.tensor(kept)
    plan = plan_permutation(torch.tensor(ids), num_experts, kept_TK, rows_per_expert=rows)
    assert plan.assignment_R.tolist() == assignment
    assert plan.row_TK.tolist() == row
    assert plan.rows_E.tolist() == [rows] * num_experts
    assert plan.tokens_per_expert_E.tolist() == [
        sum(a < len(ids) * len(ids[0]) for a in assignment[e * rows :][:rows]) for e in range(num_experts)
    ]
    assert plan.has_gaps


def test_plan_of_no_tokens() -> None:
    plan = plan_permutation(torch.zeros(0, 2, dtype=torch.long), 3, rows_per_expert=2)
    assert plan.assignment_R.tolist() == [0] * 6  # there is no assignment 0
    assert plan.row_TK.shape == (0, 2)
    assert torch.equal(permute(torch.zeros(0, 4), plan), torch.zeros(6, 4))
    y = torch.randn(6, 4, requires_grad=True)
    unpermute(y, torch.zeros(0, 2), plan).sum().backward()
    assert y.grad is not None
    assert torch.equal(y.grad, torch.zeros(6, 4))


@st.composite
def fitting(draw: st.DrawFn) -> tuple[Tensor, int, Tensor, int]:
    """Ids, the number of experts, what is kept within so many rows, and these rows."""
    num_experts = draw(st.integers(1, 6))
    top_k, rows = draw(st.integers(1, min(3, num_experts))), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores_TE = torch.rand(draw(st.integers(0, 10)), num_experts, generator=generator)
    ids_TK = scores_TE.argsort(-1)[:, :top_k].contiguous()
    assigned_TK = torch.rand(ids_TK.shape, generator=generator) < draw(st.sampled_from([0.5, 2.0]))
    kept_TK = keep_within_capacity(ids_TK, scores_TE[:, :top_k], num_experts, rows, assigned_TK)
    return ids_TK, num_experts, kept_TK, rows


@given(fitting())
@settings(max_examples=100, deadline=None)
def test_gaps_stand_behind_and_change_nothing(case: tuple[Tensor, int, Tensor, int]) -> None:
    ids_TK, num_experts, kept_TK, rows = case
    dense = plan_permutation(ids_TK, num_experts, kept_TK)
    padded = plan_permutation(ids_TK, num_experts, kept_TK, rows_per_expert=rows)
    runs = padded.assignment_R.view(num_experts, rows).tolist()
    nothing = ids_TK.numel()
    filled = [[a for a in run if a != nothing] for run in runs]
    assert [a for run in filled for a in run] == dense.assignment_R.tolist()
    assert runs == [run + [nothing] * (rows - len(run)) for run in filled]
    for a, row in enumerate(padded.row_TK.flatten().tolist()):
        is_kept = kept_TK.flatten()[a].item()
        assert (padded.assignment_R[row].item() == a) if is_kept else (row >= num_experts * rows)

    generator = torch.Generator().manual_seed(1)
    x, scores, upstream = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((len(ids_TK), 3), ids_TK.shape, (len(ids_TK), 3))
    )
    found = []
    for plan in (dense, padded):
        leaves = [x.clone().requires_grad_(), scores.clone().requires_grad_()]
        y = unpermute(permute(leaves[0], plan).sin() + 1, leaves[1], plan)  # gaps give 1 and must not count
        y.backward(upstream)
        found.append([y, *(leaf.grad for leaf in leaves)])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("ids", "num_experts", "kept", "rows"), [case[1:5] for case in BY_HAND], ids=[case[0] for case in BY_HAND]
)
def test_gradcheck(ids: list[list[int]], num_experts: int, kept: list[list[bool]] | None, rows: int) -> None:
    kept_TK = None if kept is None else torch.tensor(kept)
    plan = plan_permutation(torch.tensor(ids), num_experts, kept_TK, rows_per_expert=rows)
    x = torch.randn(len(ids), 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(num_experts * rows, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(len(ids), len(ids[0]), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, plan), (x,))
    assert torch.autograd.gradcheck(lambda y, scores: unpermute(y, scores, plan), (y, scores))


# On running ranks.

ROWS = 2
CASES = ["random", "dropped", "one rank empty", "one rank short", "one rank drops all", "all empty", "to one rank"]


def fitted(case: str, ep_size: int, top_k: int = 2) -> tuple[Tensor, Tensor, torch.Generator]:
    """As `routes`, within ROWS rows of this rank for every expert."""
    ids_TK, kept_TK, generator = routes(case, dist.get_rank(), ep_size, top_k)
    priority_TK = torch.rand(ids_TK.shape, generator=generator)
    return ids_TK, keep_within_capacity(ids_TK, priority_TK, E, ROWS, kept_TK), generator


class NoWaiting(TorchDispatchMode):
    """Fails where a value would have to come from the device, or a size to depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if any(name.startswith((f"aten::{forbidden}", f"aten::_{forbidden}")) for forbidden in self.FORBIDDEN):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    def refuse(*_: Any) -> Any:
        raise AssertionError("tolist() waits for the device")

    original = torch.Tensor.tolist
    torch.Tensor.tolist = refuse  # type: ignore[method-assign,assignment]
    try:
        with NoWaiting():
            yield
    finally:
        torch.Tensor.tolist = original  # type: ignore[method-assign]


def by_tiles(experts: GroupedExperts, part: Part) -> Tensor:
    return experts(part.x_AD, part.weights_AK, part.plan)


def by_rows(experts: GroupedExperts, part: Part) -> Tensor:
    """As on an accelerator, and with something in the gaps of the experts' outputs."""
    linear = linear_by_expert(part.plan, part.x_AD.dtype, experts.w1, experts.w2)
    y_RD = linear(activate(linear(permute(part.x_AD, part.plan), experts.w1), "swiglu"), experts.w2)
    gap_R = part.plan.assignment_R == part.plan.row_TK.numel()
    return unpermute(y_RD + gap_R.unsqueeze(1), part.weights_AK, part.plan)


def by_batched_products(experts: GroupedExperts, part: Part) -> Tensor:
    """As on an accelerator in a dtype that grouped_mm does not take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_module, "_grouped_mm_takes", lambda *_: False)
        return by_rows(experts, part)


def with_and_without(name: str, ep_size: int, case: str, chunks: int, work: Callable[..., Tensor]) -> None:
    groups = SINGLE_RANK if name == "local" else groups_of(ep_size)
    ids_TK, kept_TK, generator = fitted(case, ep_size)
    x_TD = torch.randn(len(ids_TK), D, generator=generator)
    scores_TK = torch.rand(ids_TK.shape, generator=generator)
    upstream_TD = torch.randn(len(ids_TK), D, generator=generator)
    dispatcher = make_dispatcher(name, E, groups)
    num_tokens = int(dispatcher.largest([len(ids_TK)], torch.device("cpu")))
    found: list[dict[str, Tensor | None]] = []
    for shape in (None, FixedShape(num_tokens, ROWS), FixedShape(num_tokens + 3, ROWS + 1)):
        experts: GroupedExperts = make_experts(groups)
        x, scores = x_TD.clone().requires_grad_(), scores_TK.clone().requires_grad_()
        parts = send(dispatcher, x, ids_TK, scores, kept_TK, shape, chunks)
        for part in parts if shape is not None else []:
            num_local, per_chunk = len(groups.local_experts(E)), shape.of_chunk(len(parts))
            each = per_chunk.rows_per_expert * groups.ep_size
            assert part.plan.rows_E.tolist() == [each] * num_local
            assert permute(part.x_AD, part.plan).shape == (each * num_local, D)
        y = bring_back(dispatcher, parts, partial(work, experts))
        y.backward(upstream_TD)
        found.append({"y": y, "x": x.grad, "scores": scores.grad, "w1": experts.w1.grad, "w2": experts.w2.grad})
    for padded in found[1:]:
        for what, value in found[0].items():
            assert value is not None, what
            assert_close(padded[what], value, rtol=1e-6, atol=1e-6, msg=partial("{}: {}".format, what))


@pytest.mark.parametrize(
    ("work", "chunks", "case", "name", "world", "ep_size"),
    one_in(3, [(by_rows, 1), (by_tiles, 2), (by_batched_products, 1)], CASES, NAMES, LAYOUTS),
)
def test_as_without(
    world: int,
    ep_size: int,
    name: str,
    case: str,
    work: Callable[..., Tensor],
    chunks: int,
    get_pool: Callable[..., RankPool],
) -> None:
    pool = get_pool(world)
    pool.run(warm_up, ep_size)
    pool.run(with_and_without, name, ep_size, case, chunks, work, timeout=LIMIT)


@pytest.mark.parametrize("case", CASES)
def test_as_without_on_ranks_that_hold_all(case: str, get_pool: Callable[..., RankPool]) -> None:
    get_pool(2).run(with_and_without, "local", 1, case, 1, by_rows, timeout=LIMIT)


def arrived(name: str, ep_size: int, case: str) -> tuple[list[list[tuple[int, int]]], list[list[tuple[int, int]]]]:
    """(rank, token) that stand in every local expert's rows, and what this rank kept for every expert."""
    rank, groups = dist.get_rank(), groups_of(ep_size)
    ids_TK, kept_TK, _ = fitted(case, ep_size)
    token_T = torch.arange(len(ids_TK))
    x_TD = torch.stack([torch.full_like(token_T, rank + 1), token_T + 1, *[token_T] * (D - 2)], dim=1).float()
    dispatcher = make_dispatcher(name, E, groups)
    shape = FixedShape(int(dispatcher.largest([len(ids_TK)], x_TD.device)), ROWS)
    (state,) = send(dispatcher, x_TD, ids_TK, torch.ones(ids_TK.shape), kept_TK, shape)
    runs = permute(state.x_AD, state.plan).view(E // ep_size, ROWS * ep_size, D)
    rows = [[(int(row[0]) - 1, int(row[1]) - 1) for row in run if row.any()] for run in runs]
    return rows, [[(rank, t) for t in range(len(ids_TK)) if (kept_TK & (ids_TK == e))[t].any()] for e in range(E)]


@layouts
@names
@pytest.mark.parametrize("case", ["random", "one rank empty"])
def test_every_row_arrives_and_the_rest_is_zero(
    world: int, ep_size: int, name: str, case: str, get_pool: Callable[..., RankPool]
) -> None:
    answers = get_pool(world).run(arrived, name, ep_size, case, timeout=LIMIT)
    for rank, (by_expert, _) in enumerate(answers):
        first_peer, local = rank - rank % ep_size, E // ep_size
        for local_id, rows in enumerate(by_expert):
            expert = (rank - first_peer) * local + local_id
            peers = range(first_peer, first_peer + ep_size)
            assert rows == [row for peer in peers for row in answers[peer][1][expert]]
    assert sum(len(rows) for by_expert, _ in answers for rows in by_expert) > world  # some did travel


def without_a_look(name: str, ep_size: int, shaped: bool) -> list[list[int]]:
    """Sizes of all that is allocated for the rows, of two routings."""
    sizes = []
    for case in ("random", "dropped"):
        ids_TK, kept_TK, generator = fitted(case, ep_size)
        x = torch.randn(len(ids_TK), D, generator=generator, requires_grad=True)
        scores = torch.rand(ids_TK.shape, generator=generator, requires_grad=True)
        dispatcher = make_dispatcher(name, E, groups_of(ep_size))
        with no_waiting():
            (part,) = send(dispatcher, x, ids_TK, scores, kept_TK, FixedShape(6, ROWS) if shaped else None)
            y = bring_back(dispatcher, [part], identity)
            y.sum().backward()
        sizes.append([*part.plan.assignment_R.shape, *part.x_AD.shape, *y.shape])
    return sizes


@layouts
@names
def test_no_size_depends_on_the_routing(world: int, ep_size: int, name: str, get_pool: Callable[..., RankPool]) -> None:
    for first, second in get_pool(world).run(without_a_look, name, ep_size, True, timeout=LIMIT):
        assert first == second
        assert first[0] == E * ROWS


def refused(name: str, ep_size: int) -> None:
    with pytest.raises(AssertionError, match="waits for the device"):
        without_a_look(name, ep_size, False)


@names
def test_without_a_fixed_shape_somebody_has_to_look(name: str, pool2: RankPool) -> None:
    """The test above can fail."""
    pool2.run(refused, name, 2, timeout=LIMIT)


def test_local_knows_all_sizes_beforehand() -> None:
    with FakeTensorMode():  # there are no values to look at
        x, scores = torch.randn(6, D, requires_grad=True), torch.rand(6, 2, requires_grad=True)
        ids, kept = torch.randint(E, (6, 2)), torch.rand(6, 2) < 0.5
        dispatcher = make_dispatcher("local", E, SINGLE_RANK)
        (part,) = send(dispatcher, x, ids, scores, kept, FixedShape(6, ROWS))
        assert permute(part.x_AD, part.plan).shape == (E * ROWS, D)
        bring_back(dispatcher, [part], identity).sum().backward()
        with pytest.raises(DataDependentOutputException):
            send(dispatcher, x, ids, scores, kept)

"""What travels: how many rows, how many bytes, in how many collectives, and what rounding costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from lightning_moe.dispatch import Dispatcher, FixedShape, make_dispatcher
from lightning_moe.parallel import collectives
from lightning_moe.testing import RankPool
from tests.dispatch.test_dispatchers import (
    LIMIT,
    NAMES,
    D,
    E,
    F,
    bring_back,
    cases,
    groups_of,
    identity,
    layouts,
    make_experts,
    names,
    routes,
    send,
)

WIDE = 64


@contextmanager
def watched() -> Iterator[list[tuple[torch.dtype, int, int]]]:
    """(dtype, rows, bytes of a row) of what this rank puts into every collective."""
    seen: list[tuple[torch.dtype, int, int]] = []

    def spy(collective: Callable[..., Any], received: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
        row_bytes = sent.nbytes // len(sent) if len(sent) else 0
        seen.append((sent.dtype, len(sent), row_bytes))
        return collective(received, sent, *args, **kwargs)

    patch = pytest.MonkeyPatch()
    for module, name in (
        (dist, "all_to_all_single"),
        (collectives, "_all_gather_single"),
        (collectives, "_reduce_scatter_single"),
    ):
        patch.setattr(module, name, partial(spy, getattr(module, name)))
    try:
        yield seen
    finally:
        patch.undo()


def batch(case: str, ep_size: int, top_k: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Tokens, experts, weights, what is kept, and the gradient of the result; of this rank."""
    ids_TK, kept_TK, generator = routes(case, dist.get_rank(), ep_size, top_k)
    x_TD, upstream_TD = (torch.randn(len(ids_TK), width, generator=generator) for _ in "12")
    return x_TD, ids_TK, torch.rand(ids_TK.shape, generator=generator), kept_TK, upstream_TD


def rounded_once_a_way(
    name: str, ep_size: int, case: str, dtype: torch.dtype, wire: torch.dtype, chunks: int, shaped: bool
) -> None:
    """Errors are at most those of one rounding on the way there and one on the way back, of each number."""
    x_TD, ids_TK, scores_TK, kept_TK, upstream_TD = batch(case, ep_size, 2, D)
    x_TD, upstream_TD = x_TD.to(dtype), upstream_TD.to(dtype)
    dispatcher = make_dispatcher(name, E, groups_of(ep_size), wire)
    x, scores = x_TD.clone().requires_grad_(), scores_TK.clone().requires_grad_()
    shape = None if not shaped else FixedShape(8, 8)
    parts = send(dispatcher, x, ids_TK, scores, kept_TK, shape, chunks)
    assert {(part.x_AD.dtype, part.weights_AK.dtype) for part in parts} == {(dtype, torch.float32)}
    y = bring_back(dispatcher, parts, identity)
    y.backward(upstream_TD)
    assert x.grad is not None
    assert scores.grad is not None
    assert (y.dtype, x.grad.dtype, scores.grad.dtype) == (dtype, dtype, torch.float32)

    kept = torch.ones(ids_TK.shape) if kept_TK is None else kept_TK
    weight_T1 = (scores_TK * kept).sum(1, keepdim=True).double()
    product_T1 = (x_TD.double() * upstream_TD.double()).sum(1, keepdim=True)
    sizes_T1 = (x_TD.double() * upstream_TD.double()).abs().sum(1, keepdim=True)
    step = torch.finfo(wire).eps / 2  # of one rounding
    found = [
        (y, weight_T1 * x_TD, weight_T1 * x_TD.abs()),
        (x.grad, weight_T1 * upstream_TD, weight_T1 * upstream_TD.abs()),
        (scores.grad, product_T1 * kept, sizes_T1 * kept),
    ]
    for ours, exact, size in found:
        error = (ours.detach().double() - exact).abs()
        assert bool((error <= (2.02 * step + 4e-7) * size + 1e-9).all())
        assert not len(x) or kept_TK is not None or float(error.max()) > step / 8  # it was rounded at all


@layouts
@names
@cases
def test_gradients_and_outputs_are_rounded_once_a_way(
    world: int, ep_size: int, name: str, case: str, get_pool: Callable[..., RankPool]
) -> None:
    pool = get_pool(world)
    pool.run(rounded_once_a_way, name, ep_size, case, torch.float32, torch.bfloat16, 1, False, timeout=LIMIT)


@names
@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize(("dtype", "wire"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
def test_rounding_with_chunks_and_padding(
    dtype: torch.dtype, wire: torch.dtype, shaped: bool, name: str, pool2: RankPool
) -> None:
    pool2.run(rounded_once_a_way, name, 2, "random", dtype, wire, 2, shaped, timeout=LIMIT)


def nothing_is_rounded_at_home() -> None:
    x_TD, ids_TK, *_ = batch("random", 1, 1, D)
    dispatcher = make_dispatcher("auto", E, groups_of(1), torch.bfloat16)
    y = bring_back(dispatcher, send(dispatcher, x_TD, ids_TK, torch.ones(len(x_TD), 1), None), identity)
    assert torch.equal(y, x_TD)


def test_what_does_not_travel_is_not_rounded(pool2: RankPool) -> None:
    pool2.run(nothing_is_rounded_at_home)


def bytes_of_rows(name: str, dtype: torch.dtype, wire: torch.dtype | None) -> list[tuple[torch.dtype, int]]:
    """Of every collective after the plan, there, back, and both ways of the gradients."""
    x_TD, ids_TK, scores_TK, _, _ = batch("random", 2, 2, WIDE)
    dispatcher = make_dispatcher(name, E, groups_of(2), wire)
    x, scores = x_TD.to(dtype).requires_grad_(), scores_TK.requires_grad_()
    routes = dispatcher.plan(ids_TK, None)
    with watched() as seen:
        parts = [*dispatcher.dispatch(x, scores, routes)]
        bring_back(dispatcher, parts, identity).sum().backward()
    return [(dtype, row_bytes) for dtype, _, row_bytes in seen]


WIRES = pytest.mark.parametrize(
    ("dtype", "wire", "sent"),
    [
        (torch.float32, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16),
    ],
    ids=["fp32", "fp32 as bf16", "bf16"],
)


@WIRES
@pytest.mark.parametrize(("name", "experts_of_a_row"), [("alltoall", 1), ("fused", 2)])
def test_bytes_of_messages(
    name: str, experts_of_a_row: int, dtype: torch.dtype, wire: torch.dtype | None, sent: torch.dtype, pool2: RankPool
) -> None:
    """A row is its activations, an fp32 weight and an int32 id for each of its experts, in words of 16 bytes."""
    x = WIDE * sent.itemsize
    there, gradient = (-(-(x + each * experts_of_a_row) // 16) * 16 for each in (8, 4))
    expected = [(torch.uint8, there), (sent, x), (sent, x), (torch.uint8, gradient)]
    assert pool2.run(bytes_of_rows, name, dtype, wire, timeout=LIMIT) == [expected] * 2


@WIRES
def test_bytes_of_an_all_gather(
    dtype: torch.dtype, wire: torch.dtype | None, sent: torch.dtype, pool2: RankPool
) -> None:
    x = WIDE * sent.itemsize
    expected = [(torch.uint8, x + 2 * 4 + 2 * 4), (sent, x), (sent, x), (sent, x), (torch.float32, 2 * 4)]
    assert pool2.run(bytes_of_rows, "allgather", dtype, wire, timeout=LIMIT) == [expected] * 2


class Looks(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts how often the host looks at numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Looks:
        original = Tensor.tolist

        def looks(tensor: Tensor) -> Any:
            self.number += 1
            return original(tensor)

        self.patch.setattr(Tensor, "tolist", looks)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.patch.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.name() == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def talks(name: str, chunks: int, shaped: bool) -> tuple[list[torch.dtype], int, int]:
    """Dtypes of the collectives of the plan, the number of the others, and how often the host looks at numbers."""
    x_TD, ids_TK, scores_TK, _, upstream_TD = batch("random", 2, 2, D)
    dispatcher = make_dispatcher(name, E, groups_of(2))
    x, scores = x_TD.requires_grad_(), scores_TK.requires_grad_()
    with Looks() as looks, watched() as seen:
        routes = dispatcher.plan(ids_TK, None, FixedShape(8, 8) if shaped else None, chunks)
        of_plan = [dtype for dtype, *_ in seen]
        y = bring_back(dispatcher, [*dispatcher.dispatch(x, scores, routes)], identity)
    with watched() as in_backward:
        y.backward(upstream_TD)
    assert len(in_backward) == (3 if name == "allgather" else 2) * chunks
    return of_plan, len(seen) - len(of_plan), looks.number


@names
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("shaped", [False, True])
def test_sizes_are_exchanged_and_looked_at_once(name: str, chunks: int, shaped: bool, pool2: RankPool) -> None:
    """Or not at all, where they are known."""
    plan, once = ([], 0) if shaped else ([torch.int64], 1)
    assert pool2.run(talks, name, chunks, shaped, timeout=LIMIT) == [(plan, 2 * chunks, once)] * 2


def sent_rows(name: str, ep_size: int, case: str, chunks: int) -> tuple[list[list[int]], list[list[int]]]:
    ids_TK, kept_TK, _ = routes(case, dist.get_rank(), ep_size, top_k=4)
    found = make_dispatcher(name, E, groups_of(ep_size)).plan(ids_TK, kept_TK, None, chunks)
    return [route.input_splits for route in found], [route.output_splits for route in found]


@layouts
@cases
@pytest.mark.parametrize("chunks", [1, 3])
def test_fused_sends_a_token_to_a_rank_once(
    world: int, ep_size: int, case: str, chunks: int, get_pool: Callable[..., RankPool]
) -> None:
    if case == "to one rank" and ep_size == 4:
        case = "random"  # there are not four experts on one rank
    pool = get_pool(world)
    answers = {name: pool.run(sent_rows, name, ep_size, case, chunks, timeout=LIMIT) for name in ("fused", "alltoall")}
    saved = 0
    for rank in range(world):
        ids_TK, kept_TK, _ = routes(case, rank, ep_size, top_k=4)
        kept = [[True] * 4] * len(ids_TK) if kept_TK is None else kept_TK.tolist()
        ranks = [
            [e // (E // ep_size) for e, is_kept in zip(experts, row, strict=True) if is_kept]
            for experts, row in zip(ids_TK.tolist(), kept, strict=True)
        ]
        expected = {
            "fused": [sum(peer in of_token for of_token in ranks) for peer in range(ep_size)],
            "alltoall": [sum(of_token.count(peer) for of_token in ranks) for peer in range(ep_size)],
        }
        for name, by_peer in expected.items():
            splits = answers[name][rank][0]
            assert len(splits) == chunks
            assert [sum(chunk[peer] for chunk in splits) for peer in range(ep_size)] == by_peer
            first = rank - rank % ep_size
            for peer in range(ep_size):  # what one sends is what the other expects
                received = [chunk[rank - first] for chunk in answers[name][first + peer][1]]
                assert received == [chunk[peer] for chunk in splits]
        saved += sum(expected["alltoall"]) - sum(expected["fused"])
    assert saved > 0 or case == "all empty"


def through_all(ep_size: int) -> None:
    """All dispatchers and numbers of chunks, on tokens of which some have all their experts on one rank."""
    groups, top_k = groups_of(ep_size), 2
    x_TD, ids_TK, scores_TK, _, upstream_TD = batch("random", ep_size, top_k, D)
    local = E // ep_size
    ids_TK[0] = torch.tensor([local, local + 1])
    ids_TK[1] = torch.tensor([E - 1, E - 2])

    def run(dispatcher: Dispatcher[Any], chunks: int) -> list[Tensor | None]:
        experts = make_experts(groups)
        x, scores = x_TD.clone().requires_grad_(), scores_TK.clone().requires_grad_()
        parts = send(dispatcher, x, ids_TK, scores, None, chunks=chunks)
        y = bring_back(dispatcher, parts, lambda part: experts(part.x_AD, part.weights_AK, part.plan))
        y.backward(upstream_TD)
        return [y, x.grad, scores.grad, experts.w1.grad, experts.w2.grad]

    assert make_experts(groups).w2.shape == (local, D, F)
    found = [run(make_dispatcher(name, E, groups), chunks) for name in NAMES for chunks in (1, 2, 3)]
    for others in found[1:]:
        for ours, first in zip(others, found[0], strict=True):
            assert ours is not None
            assert_close(ours, first, rtol=1e-6, atol=1e-6)


@layouts
def test_all_agree(world: int, ep_size: int, get_pool: Callable[..., RankPool]) -> None:
    get_pool(world).run(through_all, ep_size, timeout=LIMIT)

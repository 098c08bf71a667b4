"""Dispatchers on running ranks: nothing gets lost, nothing is mixed up, nobody waits for ever."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from lightning_moe.dispatch import DISPATCHERS, Dispatcher, FixedShape, make_dispatcher
from lightning_moe.dispatch.allgather import AllGatherDispatcher
from lightning_moe.dispatch.alltoall import AllToAllDispatcher
from lightning_moe.dispatch.base import Dispatched
from lightning_moe.dispatch.fused import FusedDispatcher
from lightning_moe.dispatch.local import LocalDispatcher
from lightning_moe.dispatch.permute import permute, unpermute
from lightning_moe.nn import GroupedExperts
from lightning_moe.parallel import SINGLE_RANK, ExpertGroups, Topology
from lightning_moe.parallel.groups import new_expert_groups
from lightning_moe.testing import RankPool
from tests.selection import one_in

E, D, F = 8, 4, 8
LIMIT = 10.0  # seconds: a rank that waits for a peer would wait much longer
LAYOUTS = [(2, 2), (4, 2), (4, 4)]
CASES = [
    "random",
    "dropped",
    "to one rank",
    "one rank empty",
    "one rank short",
    "all empty",
    "one rank drops all",
]

layouts = pytest.mark.parametrize(("world", "ep_size"), LAYOUTS)
NAMES = ["allgather", "alltoall", "fused"]
names = pytest.mark.parametrize("name", NAMES)
cases = pytest.mark.parametrize("case", CASES)


@lru_cache
def groups_of(ep_size: int) -> ExpertGroups:
    """Made once in a rank process: each process group costs it threads and sockets."""
    return new_expert_groups(Topology(dist.get_world_size(), ep_size))


def warm_up(ep_size: int) -> None:
    dispatcher = make_dispatcher("auto", E, groups_of(ep_size))
    ids = torch.zeros(1, 1, dtype=torch.long)
    send(dispatcher, torch.zeros(1, D), ids, torch.ones(1, 1), None)


Part = Dispatched[Any]
Work = Callable[[Part], Tensor]


def send(
    dispatcher: Dispatcher[Any],
    x_TD: Tensor,
    ids_TK: Tensor,
    scores_TK: Tensor,
    kept_TK: Tensor | None,
    shape: FixedShape | None = None,
    chunks: int = 1,
) -> list[Part]:
    return list(dispatcher.dispatch(x_TD, scores_TK, dispatcher.plan(ids_TK, kept_TK, shape, chunks)))


def bring_back(dispatcher: Dispatcher[Any], parts: list[Part], work: Work) -> Tensor:
    return torch.cat([part.wait() for part in [dispatcher.combine(work(part), part) for part in parts]])


def identity(part: Part) -> Tensor:
    """Experts that return their input."""
    return unpermute(permute(part.x_AD, part.plan), part.weights_AK, part.plan)


def routes(case: str, rank: int, ep_size: int, top_k: int) -> tuple[Tensor, Tensor | None, torch.Generator]:
    """Experts of this rank's tokens, what is kept, and a generator that is this rank's own."""
    generator = torch.Generator().manual_seed(100 + rank)
    ep_rank = rank % ep_size
    num_tokens = 5 + rank % 2  # no two neighbours have the same number
    if case == "all empty" or (case == "one rank empty" and ep_rank == 0):
        num_tokens = 0
    elif case == "one rank short" and ep_rank == ep_size - 1:
        num_tokens = 1
    ids_TK = torch.rand(num_tokens, E, generator=generator).argsort(-1)[:, :top_k].contiguous()
    if case == "to one rank":  # the last of the EP group
        local = E // ep_size
        ids_TK = torch.rand(num_tokens, local, generator=generator).argsort(-1)[:, :top_k] + E - local
    kept_TK = None
    if case == "dropped":
        kept_TK = torch.rand(num_tokens, top_k, generator=generator) < 0.6
    elif case == "one rank drops all":
        kept_TK = torch.full((num_tokens, top_k), ep_rank != 0)
    return ids_TK, kept_TK, generator


def there_and_back(name: str, ep_size: int, case: str, dtype: torch.dtype, chunks: int) -> None:
    """Identity experts and the weight 1: bit for bit what was sent, the gradient too."""
    ids_T1, kept_T1, generator = routes(case, dist.get_rank(), ep_size, top_k=1)
    dispatcher = make_dispatcher(name, E, groups_of(ep_size))
    num_tokens = len(ids_T1)
    x = torch.randn(num_tokens, D, generator=generator).to(dtype).requires_grad_()
    parts = send(dispatcher, x, ids_T1, torch.ones(num_tokens, 1), kept_T1, chunks=chunks)
    assert len(parts) == (1 if name == "local" else chunks)
    assert all(part.x_AD.dtype == dtype for part in parts)
    y = bring_back(dispatcher, parts, identity)
    kept = torch.ones(num_tokens, 1) if kept_T1 is None else kept_T1
    assert y.dtype == dtype
    assert torch.equal(y, x * kept.to(dtype))
    upstream = torch.randn(num_tokens, D, generator=generator).to(dtype)
    y.backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream * kept.to(dtype))


@pytest.mark.parametrize(
    ("dtype", "chunks", "case", "name", "world", "ep_size"),
    one_in(3, [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 3)], CASES, NAMES, LAYOUTS),
    ids=str,
)
def test_identity_experts_return_the_input_bit_for_bit(
    world: int, ep_size: int, name: str, case: str, dtype: torch.dtype, chunks: int, get_pool: Callable[..., RankPool]
) -> None:
    pool = get_pool(world)
    pool.run(warm_up, ep_size)
    pool.run(there_and_back, name, ep_size, case, dtype, chunks, timeout=LIMIT)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identity_experts_on_ranks_that_hold_all(
    case: str, dtype: torch.dtype, get_pool: Callable[..., RankPool]
) -> None:
    get_pool(2).run(there_and_back, "local", 1, case, dtype, 2)


def arrivals(name: str, ep_size: int, case: str, top_k: int) -> list[list[tuple[int, int]]]:
    """(source rank, token) of every row that arrived here, by local expert."""
    rank = dist.get_rank()
    ids_TK, kept_TK, _ = routes(case, rank, ep_size, top_k)
    token_T = torch.arange(len(ids_TK))
    x_T4 = torch.stack([torch.full_like(token_T, rank), token_T, token_T, token_T], dim=1).float()
    dispatcher = make_dispatcher(name, E, groups_of(ep_size))
    (state,) = send(dispatcher, x_T4, ids_TK, torch.ones(ids_TK.shape), kept_TK)
    assert len(state.plan.tokens_per_expert_E) == E // ep_size
    runs = permute(state.x_AD, state.plan).split(state.plan.tokens_per_expert_E.tolist())
    return [[(int(row[0]), int(row[1])) for row in run] for run in runs]


@pytest.mark.parametrize(
    ("top_k", "case", "name", "world", "ep_size"), one_in(3, [1, 2], CASES, NAMES, LAYOUTS), ids=str
)
def test_every_row_arrives_at_its_expert(
    world: int, ep_size: int, name: str, case: str, top_k: int, get_pool: Callable[..., RankPool]
) -> None:
    routed = [routes(case, rank, ep_size, top_k)[:2] for rank in range(world)]
    arrived = get_pool(world).run(arrivals, name, ep_size, case, top_k, timeout=LIMIT)
    for rank, by_expert in enumerate(arrived):
        first_peer = rank - rank % ep_size
        local = E // ep_size
        for local_id, rows in enumerate(by_expert):
            expert = (rank - first_peer) * local + local_id
            expected = []
            for peer in range(first_peer, first_peer + ep_size):
                ids_TK, kept_TK = routed[peer]
                asking = ids_TK == expert if kept_TK is None else (ids_TK == expert) & kept_TK
                expected += [(peer, t) for t in range(len(ids_TK)) if asking[t].any()]
            assert rows == expected, f"rank {rank}, expert {expert}"
    if case == "to one rank":
        assert all(not rows for by_expert in arrived[: ep_size - 1] for rows in by_expert)


def make_experts(groups: ExpertGroups) -> GroupedExperts:
    torch.manual_seed(0)
    return GroupedExperts(D, F, E, "swiglu", groups)


def through_experts(name: str, ep_size: int, case: str, chunks: int) -> None:
    """Against the local dispatcher with whole experts in float64 on the same tokens; weight gradients are summed."""
    rank, groups = dist.get_rank(), groups_of(ep_size)
    ids_TK, kept_TK, generator = routes(case, rank, ep_size, top_k=2)
    x_TD = torch.randn(len(ids_TK), D, generator=generator)
    scores_TK = torch.rand(ids_TK.shape, generator=generator)
    upstream_TD = torch.randn(len(ids_TK), D, generator=generator)

    def run(name: str, groups: ExpertGroups, dtype: torch.dtype) -> dict[str, Tensor]:
        experts = make_experts(groups).to(dtype)
        x, scores = (value.to(dtype, copy=True).requires_grad_() for value in (x_TD, scores_TK))
        dispatcher = make_dispatcher(name, E, groups)
        parts = send(dispatcher, x, ids_TK, scores, kept_TK, chunks=chunks)
        y = bring_back(dispatcher, parts, lambda part: experts(part.x_AD, part.weights_AK, part.plan))
        y.backward(upstream_TD.to(dtype))
        grads = {"x": x.grad, "scores": scores.grad, "w1": experts.w1.grad, "w2": experts.w2.grad}
        assert all(grad is not None for grad in grads.values()), "the graph was cut"
        return {"y": y.detach(), **cast(dict[str, Tensor], grads)}

    ours = run(name, groups, torch.float32)
    expected = run("local", SINGLE_RANK, torch.float64)
    own = slice(groups.local_experts(E).start, groups.local_experts(E).stop)
    for weight in ("w1", "w2"):
        dist.all_reduce(expected[weight], group=groups.ep_group)
        expected[weight] = expected[weight][own]
    for what, value in expected.items():
        assert_close(ours[what].double(), value, rtol=1e-6, atol=1e-6, msg=partial("{}: {}".format, what))
    largest = max(float(value.abs().max()) if value.numel() else 0.0 for value in expected.values())
    assert largest > 0.1 or case in ("all empty", "one rank empty", "one rank drops all", "to one rank")


@pytest.mark.parametrize(
    ("chunks", "case", "name", "world", "ep_size"), one_in(3, [1, 2], CASES, NAMES, LAYOUTS), ids=str
)
def test_with_experts_as_one_process(
    world: int, ep_size: int, name: str, case: str, chunks: int, get_pool: Callable[..., RankPool]
) -> None:
    get_pool(world).run(through_experts, name, ep_size, case, chunks, timeout=LIMIT)


def in_bf16(name: str, ep_size: int) -> None:
    rank, groups = dist.get_rank(), groups_of(ep_size)
    ids_TK, _, generator = routes("random", rank, ep_size, top_k=2)
    x_TD = torch.randn(len(ids_TK), D, generator=generator)
    scores_TK = torch.rand(ids_TK.shape, generator=generator)
    outputs = []
    for name_, groups_, dtype in ((name, groups, torch.bfloat16), ("local", SINGLE_RANK, torch.float64)):
        dispatcher = make_dispatcher(name_, E, groups_)
        parts = send(dispatcher, x_TD.bfloat16().to(dtype), ids_TK, scores_TK, None)
        outputs.append(bring_back(dispatcher, parts, lambda part: 2 * identity(part)))
        assert outputs[-1].dtype == dtype
    # Each rank's share is rounded before the shares are summed: three roundings of 2^-9 at most.
    assert_close(outputs[0].double(), outputs[1], rtol=2**-7, atol=2**-7)


@layouts
@names
def test_bf16(world: int, ep_size: int, name: str, get_pool: Callable[..., RankPool]) -> None:
    get_pool(world).run(in_bf16, name, ep_size, timeout=LIMIT)


def largest(ep_size: int) -> list[int]:
    dispatcher = make_dispatcher("auto", E, groups_of(ep_size))
    rank = dist.get_rank()
    numbers = dispatcher.largest([10 + rank, torch.tensor(20 - rank), 7], torch.device("cpu"))
    assert (numbers.shape, numbers.dtype) == ((3,), torch.int64)
    return numbers.tolist()


@pytest.mark.parametrize(
    ("ep_size", "expected"),
    [
        (1, [[10, 20, 7], [11, 19, 7], [12, 18, 7], [13, 17, 7]]),
        (2, [[11, 20, 7], [11, 20, 7], [13, 18, 7], [13, 18, 7]]),
        (4, [[13, 20, 7]] * 4),
    ],
)
def test_largest_numbers_of_the_ep_group(ep_size: int, expected: list[list[int]], pool4: RankPool) -> None:
    assert pool4.run(largest, ep_size) == expected


def state_is_frozen_and_dispatcher_unchanged(name: str, ep_size: int) -> None:
    dispatcher = make_dispatcher(name, E, groups_of(ep_size))
    before = dict(vars(dispatcher))
    ids_TK, kept_TK, generator = routes("dropped", dist.get_rank(), ep_size, top_k=2)
    x, scores = torch.randn(len(ids_TK), D, generator=generator), torch.ones(ids_TK.shape)
    first = send(dispatcher, x, ids_TK, scores, kept_TK)
    second = send(dispatcher, -2 * x, ids_TK.flip(0), scores, None)
    # Interleaved calls do not disturb each other, because nothing is kept on the dispatcher.
    kept = cast(Tensor, kept_TK).sum(1, keepdim=True)
    assert_close(bring_back(dispatcher, second, identity), -4 * x, rtol=1e-6, atol=1e-6)
    assert_close(bring_back(dispatcher, first, identity), kept * x, rtol=1e-6, atol=1e-6)
    assert vars(dispatcher) == before
    with pytest.raises(AttributeError):
        first[0].x_AD = x  # type: ignore[misc]


@names
def test_state_passes_through_what_dispatch_returns(name: str, pool2: RankPool) -> None:
    pool2.run(state_is_frozen_and_dispatcher_unchanged, name, 2, timeout=LIMIT)


def fake_groups(ep_size: int) -> ExpertGroups:
    return ExpertGroups(ep_size, ep_rank=ep_size - 1, ep_group=cast(Any, object()))


@pytest.mark.parametrize(
    ("name", "ep_size", "expected"),
    [
        ("auto", 1, LocalDispatcher),
        ("auto", 2, FusedDispatcher),
        ("auto", 4, FusedDispatcher),
        ("auto", 8, FusedDispatcher),
        ("allgather", 1, LocalDispatcher),
        ("alltoall", 1, LocalDispatcher),
        ("fused", 1, LocalDispatcher),
        ("local", 1, LocalDispatcher),
        ("allgather", 8, AllGatherDispatcher),
        ("alltoall", 2, AllToAllDispatcher),
        ("fused", 2, FusedDispatcher),
    ],
)
def test_choice_by_name(name: str, ep_size: int, expected: type) -> None:
    dispatcher = make_dispatcher(name, 16, fake_groups(ep_size))
    assert type(dispatcher) is expected
    assert list(dispatcher.local_experts) == list(range(16))[-16 // ep_size :]


def test_an_unknown_name_lists_the_known() -> None:
    message = (
        "dispatcher='fancy': unknown. Known: allgather, alltoall, auto, fused, local, tune. One of your own has to be in "
        "lightning_moe.dispatch.DISPATCHERS before the model is built."
    )
    for groups in (SINGLE_RANK, fake_groups(2)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            make_dispatcher("fancy", 4, groups)


def test_a_registered_name_is_found_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(LocalDispatcher):
        pass

    monkeypatch.setitem(DISPATCHERS, "mine", Mine)
    assert type(make_dispatcher("mine", 4, SINGLE_RANK)) is Mine
    with pytest.raises(ValueError, match=r"Known: allgather, alltoall, auto, fused, local, mine, tune\. "):
        make_dispatcher("fancy", 4, SINGLE_RANK)


def test_local_is_refused_where_the_experts_are_spread() -> None:
    message = (
        "dispatcher='local': expert_parallel_size is 2, and this dispatcher sends nothing to other ranks. "
        "Use dispatcher='auto', or expert_parallel_size=1."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_dispatcher("local", 4, fake_groups(2))


@pytest.mark.parametrize("dispatcher", [AllGatherDispatcher, AllToAllDispatcher, FusedDispatcher])
def test_no_process_group_is_refused(dispatcher: type[Any]) -> None:
    message = (
        "dispatcher: this one needs an expert-parallel process group, and the layer has none. "
        "Use dispatcher='auto' or 'local', or run under ExpertParallelStrategy."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dispatcher(4, ExpertGroups(ep_size=2))


@pytest.mark.parametrize("name", [*NAMES, "auto"])
def test_experts_that_do_not_divide_are_refused(name: str) -> None:
    message = (
        "num_experts=6: must be divisible by expert_parallel_size=4. Use 8 experts, or another expert_parallel_size."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_dispatcher(name, 6, fake_groups(4))

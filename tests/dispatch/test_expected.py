"""Expected bytes against those that layers really send."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moe import MoE, MoEConfig
from lightning_moe.dispatch import Dispatcher, FixedShape, make_dispatcher
from lightning_moe.dispatch.deep_ep import DeepEPDispatcher, HopperDispatcher
from lightning_moe.dispatch.expected import NOTHING, ExpectedBytes, expected_bytes
from lightning_moe.dispatch.fused import FusedDispatcher
from lightning_moe.nn import expert_capacity
from lightning_moe.parallel import SINGLE_RANK, ExpertGroups, Topology, building_for
from lightning_moe.parallel.groups import new_expert_groups

D, E, T = 24, 16, 1024
FP32, BF16 = torch.float32, torch.bfloat16
NAMES = ["allgather", "alltoall", "fused"]
CONFIG = MoEConfig(num_experts=E, intermediate_size=16, router="random")

names = pytest.mark.parametrize("name", NAMES)


class WireBytes(TorchDispatchMode):
    """Sums what this rank sends to the others of its group, as collectives pass torch's dispatcher."""

    def __init__(self, groups: ExpertGroups) -> None:
        super().__init__()
        self.size, self.rank = groups.ep_size, groups.ep_rank
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name == "alltoall_base_":
                rows, splits = args[1], args[4]
                own = splits[self.rank] if splits else len(rows) // self.size
                self.total += (len(rows) - own) * rows[:1].nbytes
            elif name == "_allgather_base_":
                self.total += args[1].nbytes * (self.size - 1)
            elif name == "allreduce_":  # on a capacity, in a ring
                self.total += sum(2 * tensor.nbytes * (self.size - 1) / self.size for tensor in args[0])
            else:
                raise NotImplementedError(name)
        return func(*args, **(kwargs or {}))


@lru_cache
def groups_of(ep_size: int) -> ExpertGroups:
    return new_expert_groups(Topology(dist.get_world_size(), ep_size))


def sent(ep_size: int, config: MoEConfig, dtype: torch.dtype, num_tokens: list[int]) -> Any:
    """What a real layer sends in forward and backward, and what was expected, by rank."""
    rank, groups = dist.get_rank(), groups_of(ep_size)
    torch.manual_seed(rank)  # also of the routes: the key of random numbers is another on every rank
    with building_for(groups):
        layer = MoE(D, config).to(dtype)
    T = num_tokens[rank % len(num_tokens)]
    x = torch.randn(1, T, D, dtype=dtype, requires_grad=True)
    with WireBytes(groups) as there:
        y = layer(x)
    with WireBytes(groups) as back:
        y.sum().backward()
    shape = None
    if config.pad_to_capacity:
        assert config.capacity_factor is not None
        rows = expert_capacity(T, config.num_experts, config.top_k, config.capacity_factor, config.min_capacity)
        shape = FixedShape(T, int(rows))
    weights_dtype = getattr(torch, config.router_dtype)
    expected = expected_bytes(layer.dispatcher, T, D, config.top_k, dtype, shape, weights_dtype)
    return ExpectedBytes(there.total, back.total), expected


def assert_close(really: ExpectedBytes, expected: ExpectedBytes, within: float = 0.05) -> None:
    assert really.forward == pytest.approx(expected.forward, rel=within)
    assert really.backward == pytest.approx(expected.backward, rel=within)


LAYOUTS = [(2, 2), (4, 4), (4, 2)]
SETTINGS: list[tuple[dict[str, Any], torch.dtype]] = [
    ({"top_k": 1}, FP32),
    ({"top_k": 2}, BF16),
    ({"top_k": 8}, FP32),
    ({"top_k": 2, "dispatch_dtype": "bfloat16"}, FP32),
    ({"top_k": 3, "router_dtype": "float64"}, FP32),
    ({"top_k": E}, BF16),
]


@names
@pytest.mark.parametrize(
    ("layout", "setting"),
    [  # each setting with one layout by default
        pytest.param(layout, setting, marks=[pytest.mark.grid] * ((i + j) % 3 > 0))
        for (i, layout), (j, setting) in itertools.product(enumerate(LAYOUTS), enumerate(SETTINGS))
    ],
    ids=str,
)
def test_layers_send_what_is_expected(
    name: str, layout: tuple[int, int], setting: tuple[dict[str, Any], torch.dtype], get_pool: Callable[..., Any]
) -> None:
    (world, ep_size), (fields, dtype) = layout, setting
    results = get_pool(world).run(sent, ep_size, replace(CONFIG, dispatcher=name, **fields), dtype, [T])
    for really, expected in results:
        assert really.total > 0
        assert_close(really, expected)


@names
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_padded_layers_send_exactly_what_is_expected(
    name: str, dtype: torch.dtype, factor: float, get_pool: Callable[..., Any]
) -> None:
    """But for the two numbers by which ranks agree on a capacity."""
    config = replace(CONFIG, dispatcher=name, capacity_factor=factor, pad_to_capacity=True)
    agreement = 2 * 16 * 3 / 4
    for really, expected in get_pool(4).run(sent, 4, config, dtype, [60]):
        assert really == ExpectedBytes(expected.forward + agreement, expected.backward)


def test_allgather_sends_exactly_what_is_expected(get_pool: Callable[..., Any]) -> None:
    for really, expected in get_pool(2).run(sent, 2, replace(CONFIG, dispatcher="allgather"), FP32, [7]):
        assert really == expected


@pytest.mark.parametrize("name", ["alltoall", "fused"])
def test_ranks_with_different_numbers_of_tokens(name: str, get_pool: Callable[..., Any]) -> None:
    """In the mean over the ranks: what one sends too much there, others send too much back."""
    results = get_pool(4).run(sent, 4, replace(CONFIG, dispatcher=name), FP32, [T, T // 2, 2 * T, T // 4])
    mean = [ExpectedBytes(*(sum(v) / 4 for v in zip(*((b.forward, b.backward) for b in every), strict=True)))
            for every in zip(*results, strict=True)]  # fmt: skip
    assert_close(*mean)


def test_nothing_is_sent_where_all_experts_are_on_the_rank() -> None:
    for name in ("auto", "local", "fused", "tune"):
        assert expected_bytes(make_dispatcher(name, 4, SINGLE_RANK), 100, D, 2, FP32) == NOTHING
    assert NOTHING.total == 0


def test_local_sends_nothing_and_neither_does_a_layer_on_one_rank(get_pool: Callable[..., Any]) -> None:
    for really, expected in get_pool(2).run(sent, 1, replace(CONFIG, dispatcher="auto"), FP32, [T]):
        assert really == expected == NOTHING


# ------------------------------------------------------------------------------------ the numbers


class _Group:
    """Stands for a process group, of which only the size matters here."""


def dispatcher_of(kind: type[Dispatcher[Any]], ep_size: int, wire: torch.dtype | None = None) -> Dispatcher[Any]:
    groups = ExpertGroups(ep_size, 0, _Group())  # type: ignore[arg-type]
    return kind(E, groups, wire)


@pytest.mark.parametrize(("ep_size", "top_k"), [(2, 1), (2, 2), (4, 3), (8, 8), (16, 2), (4, 13)])
def test_distinct_ranks_against_every_set_of_experts(ep_size: int, top_k: int) -> None:
    owner = [expert // (E // ep_size) for expert in range(E)]
    sets = list(itertools.combinations(range(E), top_k))
    others = sum(len({owner[expert] for expert in chosen} - {0}) for chosen in sets) / len(sets)
    row = 4 * D + 8 * top_k
    row += -row % 16
    found = expected_bytes(dispatcher_of(FusedDispatcher, ep_size), 1000, D, top_k, FP32)
    counts = (ep_size - 1) * ep_size * 16
    assert found.forward == pytest.approx(1000 * others * (row + 4 * D) + counts)


def test_hopper_sends_the_rows_of_fused_in_bf16() -> None:
    wide = expected_bytes(dispatcher_of(FusedDispatcher, 4), T, D, 2, FP32)
    narrow = expected_bytes(dispatcher_of(FusedDispatcher, 4), T, D, 2, BF16)
    for kind in (HopperDispatcher, DeepEPDispatcher):
        assert expected_bytes(dispatcher_of(kind, 4), T, D, 2, BF16) == narrow
        assert expected_bytes(dispatcher_of(kind, 4, BF16), T, D, 2, FP32) == narrow
    # Its kernels take nothing else, and the collectives send what is in fp32.
    assert expected_bytes(dispatcher_of(HopperDispatcher, 4), T, D, 2, FP32) == wide


def test_no_tokens_send_counts_only() -> None:
    found = expected_bytes(dispatcher_of(FusedDispatcher, 4), 0, D, 2, FP32)
    assert found == ExpectedBytes(3 * 4 * 16, 0)


def test_a_dispatcher_of_your_own_is_refused() -> None:
    class Mine(Dispatcher[Any]):
        plan = send = combine = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match="dispatcher=Mine: what it sends is not known here"):
        expected_bytes(dispatcher_of(Mine, 2), T, D, 2, FP32)

"""The process groups that a layer gets, and the scope in which it finds them."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightning_moe.parallel import SINGLE_RANK, ExpertGroups, Topology, building_for, groups_in_scope
from lightning_moe.parallel.groups import new_expert_groups
from lightning_moe.testing import RankPool


@dataclass
class Made:
    """What one rank got."""

    ep_size: int
    ep_rank: int
    ranks: dict[str, list[int]]
    names: dict[str, str]
    order: list[list[int]]
    ep_sum: int
    edp_sum: int
    copy_is_itself: bool


def make_groups(ep_size: int) -> Made:
    order: list[list[int]] = []
    make = distributed_c10d.new_group

    def record(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        order.append(list(ranks))
        return make(ranks, *args, **kwargs)

    with patch.object(distributed_c10d, "new_group", record):
        groups = new_expert_groups(Topology(dist.get_world_size(), ep_size))
    assert groups.ep_group is not None
    assert groups.edp_group is not None
    by_kind = {"ep": groups.ep_group, "edp": groups.edp_group}
    sums = []
    for group in by_kind.values():
        total = torch.tensor(10 ** dist.get_rank())
        dist.all_reduce(total, group=group)
        sums.append(int(total))
    made = Made(
        groups.ep_size,
        groups.ep_rank,
        {kind: dist.get_process_group_ranks(group) for kind, group in by_kind.items()},
        {kind: group.group_name for kind, group in by_kind.items()},
        order,
        sums[0],
        sums[1],
        copy.deepcopy(groups) is groups and copy.deepcopy([groups])[0].ep_group is groups.ep_group,
    )
    for group in by_kind.values():
        dist.destroy_process_group(group)
    return made


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_every_rank_gets_its_groups(ep_size: int, get_pool: Callable[..., RankPool]) -> None:
    topology = Topology(4, ep_size)
    made = get_pool(4).run(make_groups, ep_size)
    names: dict[tuple[str, tuple[int, ...]], set[str]] = {}
    for rank, of_rank in enumerate(made):
        (ep_ranks,) = [ranks for ranks in topology.ep_groups if rank in ranks]
        (edp_ranks,) = [ranks for ranks in topology.edp_groups if rank in ranks]
        assert of_rank.ranks == {"ep": list(ep_ranks), "edp": list(edp_ranks)}
        assert (of_rank.ep_size, of_rank.ep_rank) == (ep_size, ep_ranks.index(rank))
        # And they communicate among these and nobody else.
        assert of_rank.ep_sum == sum(10**r for r in ep_ranks)
        assert of_rank.edp_sum == sum(10**r for r in edp_ranks)
        assert of_rank.copy_is_itself
        for kind, ranks in of_rank.ranks.items():
            names.setdefault((kind, tuple(ranks)), set()).add(of_rank.names[kind])
    assert all(len(known_as) == 1 for known_as in names.values()), names  # by all of its members


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_every_rank_makes_all_groups_in_the_same_order(ep_size: int, get_pool: Callable[..., RankPool]) -> None:
    topology = Topology(4, ep_size)
    expected = [list(ranks) for ranks in (*topology.edp_groups, *topology.ep_groups)]
    assert [made.order for made in get_pool(4).run(make_groups, ep_size)] == [expected] * 4


def make_groups_for_another_world() -> str:
    try:
        new_expert_groups(Topology(8, 2))
    except ValueError as error:
        return str(error)
    return ""


def test_a_topology_for_another_world_is_refused(pool2: RankPool) -> None:
    message = "world_size=8: the running process group has 2 ranks. Make the Topology for that number."
    assert pool2.run(make_groups_for_another_world) == [message] * 2


def test_scopes_nest_and_reset() -> None:
    outer, inner = ExpertGroups(ep_size=2, ep_rank=1), ExpertGroups(ep_size=4, ep_rank=3)
    assert groups_in_scope() is SINGLE_RANK
    with building_for(outer):
        assert groups_in_scope() is outer
        with building_for(inner):
            assert groups_in_scope() is inner
        assert groups_in_scope() is outer
    assert groups_in_scope() is SINGLE_RANK


def test_scopes_reset_on_exceptions() -> None:
    outer, inner = ExpertGroups(ep_size=2, ep_rank=1), ExpertGroups(ep_size=4, ep_rank=3)

    def fail() -> None:
        with building_for(outer):
            with contextlib.suppress(KeyError), building_for(inner):
                raise KeyError
            assert groups_in_scope() is outer
            raise RuntimeError("from the inside")

    with pytest.raises(RuntimeError, match=r"^from the inside$"):
        fail()
    assert groups_in_scope() is SINGLE_RANK


def test_single_rank_holds_everything() -> None:
    assert ExpertGroups(1, 0, None, None, None) == SINGLE_RANK
    assert SINGLE_RANK.local_experts(5) == range(5)


def test_local_experts_by_ep_rank() -> None:
    owned = [ExpertGroups(ep_size=4, ep_rank=rank).local_experts(8) for rank in range(4)]
    assert owned == [range(2), range(2, 4), range(4, 6), range(6, 8)]


def test_local_experts_that_do_not_divide_are_refused() -> None:
    message = (
        "num_experts=5: must be divisible by expert_parallel_size=2. Use 6 experts, or another expert_parallel_size."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ExpertGroups(ep_size=2).local_experts(5)

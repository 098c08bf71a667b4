"""The rank lists, for every world up to 64 and every divisor."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_moe.parallel import Topology, expert_range
from lightning_moe.testing import RankPool

LAYOUTS = [(world, ep) for world in range(1, 65) for ep in range(1, world + 1) if world % ep == 0]


def test_four_ranks_as_in_the_design() -> None:
    topology = Topology(world_size=4, ep_size=2)
    assert topology.ep_groups == ((0, 1), (2, 3))
    assert topology.edp_groups == ((0, 2), (1, 3))
    assert topology.edp_size == 2


def test_groups_partition_the_world() -> None:
    for world, ep in LAYOUTS:
        topology = Topology(world, ep)
        assert topology.edp_size * topology.ep_size == world
        for groups, size in ((topology.ep_groups, ep), (topology.edp_groups, world // ep)):
            assert sorted(rank for ranks in groups for rank in ranks) == list(range(world)), (world, ep)
            assert {len(ranks) for ranks in groups} == {size}
            assert all(list(ranks) == sorted(ranks) for ranks in groups)
        # The two kinds cross: each pair of an EP and an EDP group shares exactly one rank.
        for ep_ranks in topology.ep_groups:
            assert all(len(set(ep_ranks) & set(edp_ranks)) == 1 for edp_ranks in topology.edp_groups)


def test_experts_are_partitioned_inside_every_ep_group() -> None:
    for world, ep in LAYOUTS:
        topology = Topology(world, ep)
        for num_experts in (ep, 3 * ep):
            for ranks in topology.ep_groups:
                owned = [expert for r in ranks for expert in topology.local_experts(num_experts, r)]
                assert owned == list(range(num_experts)), (world, ep)
            for ranks in topology.edp_groups:
                assert len({topology.local_experts(num_experts, r) for r in ranks}) == 1, (world, ep)


def deepspeed_rank_lists(world: int, ep: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What DeepSpeed's own code makes groups of, in its order; its ``torch.distributed`` is a stand-in."""
    from deepspeed.utils import groups

    made: list[tuple[int, ...]] = []
    stand_in = SimpleNamespace(
        is_initialized=lambda: True,
        get_world_size=lambda: world,
        get_rank=lambda: world - 1,
        new_group=lambda ranks: made.append(tuple(ranks)),
    )
    with monkeypatch.context() as patch:
        patch.setattr(groups, "dist", stand_in)
        patch.setattr(groups, "log_dist", lambda *_, **__: None)
        patch.setattr(groups, "mpu", None)
        for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
            patch.setattr(groups, name, {})
            patch.setattr(groups, f"{name}_RANKS", {})
        groups._create_expert_and_data_parallel(ep)
    return made


def test_rank_lists_and_their_order_are_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    for world, ep in LAYOUTS:
        topology = Topology(world, ep)
        ours = [*topology.edp_groups, *topology.ep_groups]
        assert ours == deepspeed_rank_lists(world, ep, monkeypatch), (world, ep)


def test_rank_lists_are_those_of_deepspeeds_arithmetic() -> None:
    from deepspeed.utils import groups

    for world, ep in LAYOUTS:
        topology = Topology(world, ep)
        ep_lists, edp_lists = groups._get_expert_parallel_ranks(world, 1, ep)
        assert [list(ranks) for ranks in topology.ep_groups] == [list(ranks) for ranks in ep_lists]
        assert [list(ranks) for ranks in topology.edp_groups] == [list(ranks) for ranks in edp_lists]


def ranks_of_deepspeed(ep_size: int) -> tuple[list[int], list[int]]:
    import torch.distributed as dist
    from deepspeed import comm
    from deepspeed.utils import groups

    comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    groups._release_process_group_references()
    try:
        groups._create_expert_and_data_parallel(ep_size)
        made = [
            groups._get_expert_parallel_group(f"ep_size_{ep_size}"),
            groups._get_expert_data_parallel_group(f"ep_size_{ep_size}"),
        ]
        ranks = [dist.get_process_group_ranks(group) for group in made]
    finally:
        groups._release_process_group_references()
    for group in made:
        dist.destroy_process_group(group)
    return ranks[0], ranks[1]


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_running_groups_of_deepspeed_have_these_ranks(ep_size: int, get_pool: Callable[..., RankPool]) -> None:
    topology = Topology(4, ep_size)
    for rank, (ep_ranks, edp_ranks) in enumerate(get_pool(4).run(ranks_of_deepspeed, ep_size)):
        assert [tuple(ep_ranks)] == [ranks for ranks in topology.ep_groups if rank in ranks]
        assert [tuple(edp_ranks)] == [ranks for ranks in topology.edp_groups if rank in ranks]


@pytest.mark.parametrize(
    ("world_size", "ep_size", "message"),
    [
        (
            4,
            0,
            "expert_parallel_size=0: must be at least 1. Use 1 to keep every expert on every rank, or 'auto'.",
        ),
        (
            4,
            -2,
            "expert_parallel_size=-2: must be at least 1. Use 1 to keep every expert on every rank, or 'auto'.",
        ),
        (
            4,
            8,
            (
                "expert_parallel_size=8: must not be above the number of ranks, 4. Lower it, or start 8 ranks "
                "(devices x num_nodes)."
            ),
        ),
        (
            12,
            5,
            "expert_parallel_size=5: must divide the number of ranks, 12. Use one of 1, 2, 3, 4, 6, 12.",
        ),
        (7, 2, "expert_parallel_size=2: must divide the number of ranks, 7. Use one of 1, 7."),
    ],
)
def test_a_wrong_size_is_refused(world_size: int, ep_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Topology(world_size, ep_size)


@pytest.mark.parametrize(
    "call",
    [lambda: Topology(4, 4).local_experts(6, 0), lambda: expert_range(6, 4, 3)],
    ids=["topology", "range"],
)
def test_experts_that_do_not_divide_are_refused(call: Callable[[], Any]) -> None:
    message = (
        "num_experts=6: must be divisible by expert_parallel_size=4. Use 8 experts, or another expert_parallel_size."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()

"""Which ranks form which group: arithmetic only, no process group is touched here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """How a world of data-parallel ranks is divided for expert parallelism.

    Expert-parallel (EP) groups are consecutive ranks that together hold every expert once. Expert-data-parallel
    (EDP) groups are the ranks that hold the same experts, strided by ``ep_size``. Every rank is a data rank.

    Four ranks, ``ep_size=2``, four experts::

        rank        0      1      2      3
        EP group    0      0      1      1
        EDP group   0      1      0      1
        experts    0 1    2 3    0 1    2 3

    >>> topology = Topology(world_size=4, ep_size=2)
    >>> topology.ep_groups
    ((0, 1), (2, 3))
    >>> topology.edp_groups
    ((0, 2), (1, 3))
    >>> list(topology.local_experts(num_experts=4, rank=3))
    [2, 3]

    Args:
        world_size: Number of ranks.
        ep_size: Ranks in one EP group.

    Raises:
        ValueError: ``ep_size`` is below 1, above ``world_size`` or does not divide it.
    """

    world_size: int
    ep_size: int

    def __post_init__(self) -> None:
        if self.ep_size < 1:
            raise ValueError(
                f"expert_parallel_size={self.ep_size}: must be at least 1. "
                "Use 1 to keep every expert on every rank, or 'auto'."
            )
        if self.ep_size > self.world_size:
            raise ValueError(
                f"expert_parallel_size={self.ep_size}: must not be above the number of ranks, {self.world_size}. "
                f"Lower it, or start {self.ep_size} ranks (devices x num_nodes)."
            )
        if self.world_size % self.ep_size:
            divisors = ", ".join(str(n) for n in range(1, self.world_size + 1) if self.world_size % n == 0)
            raise ValueError(
                f"expert_parallel_size={self.ep_size}: must divide the number of ranks, {self.world_size}. "
                f"Use one of {divisors}."
            )

    @property
    def edp_size(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // self.ep_size

    @property
    def ep_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of every EP group, in the order in which the groups are made."""
        return tuple(tuple(range(start, start + self.ep_size)) for start in range(0, self.world_size, self.ep_size))

    @property
    def edp_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of every EDP group, in the order in which the groups are made."""
        return tuple(tuple(range(start, self.world_size, self.ep_size)) for start in range(self.ep_size))

    def local_experts(self, num_experts: int, rank: int) -> range:
        """Global ids of the experts that ``rank`` owns.

        Raises:
            ValueError: ``num_experts`` is not divisible by ``ep_size``.
        """
        return expert_range(num_experts, self.ep_size, rank % self.ep_size)


def expert_range(num_experts: int, ep_size: int, ep_rank: int) -> range:
    """Global ids of the experts of rank ``ep_rank`` in an EP group of ``ep_size``.

    >>> expert_range(num_experts=8, ep_size=4, ep_rank=1)
    range(2, 4)

    Raises:
        ValueError: ``num_experts`` is not divisible by ``ep_size``.
    """
    if num_experts % ep_size:
        raise ValueError(
            f"num_experts={num_experts}: must be divisible by expert_parallel_size={ep_size}. "
            f"Use {num_experts + ep_size - num_experts % ep_size} experts, or another expert_parallel_size."
        )
    num_local_experts = num_experts // ep_size
    return range(ep_rank * num_local_experts, (ep_rank + 1) * num_local_experts)

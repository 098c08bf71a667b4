"""What goes wrong on one rank is raised on all of them, instead of leaving the others to wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lightning_moe.checkpoint.errors import CheckpointError


@contextmanager
def agreed(group: dist.ProcessGroup) -> Iterator[None]:
    """A scope without collectives that ends on all ranks of a group alike. Collective.

    Raises:
        CheckpointError: on every rank, with the message of the first rank on which something failed inside.
    """
    problem = ""
    try:
        yield
    except CheckpointError as error:
        problem = str(error)
    except (RuntimeError, MemoryError, TypeError, ValueError, LookupError, AttributeError, OSError) as error:
        problem = f"{type(error).__name__}: {error}"
    problems = [""] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    failed = [rank for rank, text in enumerate(problems) if text]
    if failed:
        first = problems[failed[0]]
        everywhere = len(failed) == len(problems)
        raise CheckpointError(first if everywhere else f"on rank {', '.join(map(str, failed))}: {first}")

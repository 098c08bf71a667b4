"""What fails on one rank is raised on all."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from lightning_moe.checkpoint import CheckpointError
from lightning_moe.checkpoint.agreement import agreed
from lightning_moe.strategies import checkpointing
from lightning_moe.testing import RankPool
from tests.callbacks.runs import parallel
from tests.strategies.test_resume import Recording, of_rank


def failing_on(ranks: list[int]) -> str:
    try:
        with agreed(dist.group.WORLD):
            if dist.get_rank() in ranks:
                raise KeyError("there is no such name")
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([], ""),
        ([1], "on rank 1: KeyError: 'there is no such name'"),
        ([0, 1], "KeyError: 'there is no such name'"),
    ],
)
def test_agreed(ranks: list[int], said: str, pool2: RankPool) -> None:
    assert pool2.run(failing_on, ranks) == [said, said]


def unseen_by_one_rank(path: str) -> str:
    """As on a file system that shows a new folder to some ranks later than to others."""
    trainer = parallel(2, 2, max_steps=1)
    trainer.fit(Recording(), of_rank(2))
    trainer.save_checkpoint(path)
    opened = checkpointing.Checkpoint

    def see(given: Path) -> object:
        return opened(given if dist.get_rank() == 0 else given.with_name("nothing.ckpt"))

    with patch.object(checkpointing, "Checkpoint", see), pytest.raises(CheckpointError) as caught:
        parallel(2, 2, max_steps=2).fit(Recording(), of_rank(2), ckpt_path=path)
    return str(caught.value)


def test_a_checkpoint_that_one_rank_does_not_see(pool2: RankPool, tmp_path: Path) -> None:
    said = pool2.run(unseen_by_one_rank, str(tmp_path / "a.ckpt"), timeout=30)
    assert said[0] == said[1]
    assert said[0].startswith(f"on rank 1: {tmp_path}/nothing.ckpt: is not a checkpoint: it does not exist.")

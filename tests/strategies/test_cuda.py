"""What needs a GPU: one process, fp16 with loss scaling."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_moe import AuxLossCallback, ExpertParallelStrategy
from tests.commands import run_command
from tests.toy import BATCH, Toy, ToyData, loader, train_reference


def main(stage: str) -> None:
    """One plain SGD step at rate 1 in 16-mixed: what the weights move by is the gradient of the written objective."""
    from lightning_moe.testing.state import full_state

    def toy() -> Toy:
        return Toy(optimizer=torch.optim.SGD, learning_rate=1.0)

    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        precision="16-mixed",
        # A scale that does not overflow, so that the first step is taken.
        strategy=ExpertParallelStrategy(1, stage=int(stage), initial_scale_power=8),
        callbacks=[AuxLossCallback(0.5, 0.05)],
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(toy(), loader(ToyData(BATCH)))
    state = full_state(trainer)
    start = toy().half().float()
    reference = train_reference(start, ToyData(BATCH), 1, 1, load_balancing=0.5, router_z=0.05)
    for name, weight in start.named_parameters():
        moved, should = state[name] - weight.detach(), reference.state[name].float() - weight.detach()
        rounding = 2**-12 * reference.state[name].norm()
        assert (moved - should).norm() < 0.01 * should.norm() + rounding, name
    print("as written")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", range(4))
def test_aux_gradient_in_fp16(stage: int, project_root: Path) -> None:
    ended = run_command([sys.executable, "-m", "tests.strategies.test_cuda", str(stage)], project_root, timeout=110)
    assert ended.code == 0, ended.output
    assert "as written" in ended.output


if __name__ == "__main__":
    main(sys.argv[1])

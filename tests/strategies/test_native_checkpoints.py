"""Checkpoints of models that are made with DeepSpeed's own layer: its experts are modules that each rank numbers anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moe.checkpoint import Checkpoint, read_weights
from tests.strategies.test_checkpointing import Step, trainer_of
from tests.strategies.test_resume import Recording, of_rank


class Native(Recording):
    """Experts that are the same wherever they are: expert i from seed i."""

    def __init__(self, ep_size: int) -> None:
        self.ep_size = ep_size
        super().__init__()

    def build(self) -> None:
        from deepspeed.moe.layer import MoE as NativeMoE

        torch.manual_seed(0)
        self.inp = nn.Linear(8, 8)
        expert = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        layer = NativeMoE(8, expert, num_experts=4, ep_size=self.ep_size, k=1, capacity_factor=4.0, use_rts=False)
        local = 4 // self.ep_size
        for place, module in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            torch.manual_seed(1 + place + local * (dist.get_rank() % self.ep_size))
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
        self.blocks.append(layer)
        torch.manual_seed(9)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks[0](self.inp(x))[0])


def saved_and_resumed(folder: str, saved_in: tuple[int, int], to: tuple[int, int]) -> dict[str, Any]:
    path = str(Path(folder) / "a.ckpt")
    save = Step(lambda trainer: trainer.save_checkpoint(path), 4)
    trainer_of(ep_size=saved_in[0], stage=saved_in[1], max_steps=7, callbacks=[save]).fit(
        whole := Native(saved_in[0]), of_rank(2)
    )
    trainer_of(ep_size=to[0], stage=to[1], max_steps=7).fit(resumed := Native(to[0]), of_rank(2), ckpt_path=path)
    return {"whole": whole.losses[4:], "resumed": resumed.losses, "names": sorted(read_weights(path))}


@pytest.mark.parametrize(
    ("saved_in", "to"),
    [
        ((2, 2), (1, 1)),
        *(
            pytest.param(*pair, marks=pytest.mark.grid)
            for pair in [((2, 1), (2, 1)), ((1, 0), (2, 2)), ((2, 0), (2, 0))]
        ),
    ],
)
def test_native_experts_resume(saved_in: tuple[int, int], to: tuple[int, int], get_pool: Any, tmp_path: Path) -> None:
    found = get_pool(2).run(saved_and_resumed, str(tmp_path), saved_in, to)
    for rank in found:
        assert rank["resumed"] == (rank["whole"] if saved_in == to else pytest.approx(rank["whole"], abs=1e-5))
    experts = [name for name in found[0]["names"] if ".deepspeed_experts." in name]
    assert {int(name.split(".deepspeed_experts.")[1].split(".")[0]) for name in experts} == {0, 1, 2, 3}
    assert len(experts) == 4 * 4
    first = "blocks.0.deepspeed_moe.experts.deepspeed_experts.{}.0.weight"
    weights = read_weights(tmp_path / "a.ckpt")
    assert len({tuple(weights[first.format(i)].flatten().tolist()) for i in range(4)}) == 4
    assert len(Checkpoint(tmp_path / "a.ckpt").moments_of(first.format(3))) == 2

"""What is in a checkpoint: all that a module may have, weights alone, what DeepSpeed's own format has."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_moe import ExpertParallelStrategy
from lightning_moe.checkpoint import Checkpoint, CheckpointError, is_checkpoint, read_weights
from lightning_moe.engine import deepspeed as engine
from lightning_moe.testing.state import full_state
from tests.strategies.test_checkpointing import Step, trainer_of
from tests.strategies.test_resume import Recording, of_rank


class Unusual(Recording):
    """With buffers of several kinds, a frozen part, a tied and an empty parameter, a metric."""

    def __init__(self, with_empty: bool) -> None:
        self.with_empty = with_empty
        super().__init__()

    def build(self) -> None:
        super().build()
        self.norm = nn.BatchNorm1d(3)
        self.conv = nn.Conv2d(4, 4, 3)
        self.register_buffer("strided", torch.arange(6.0).view(2, 3).t())
        self.frozen = nn.Linear(4, 3)
        self.frozen.requires_grad_(False)
        self.again = self.out
        if self.with_empty:  # which DeepSpeed's ZeRO 3 cannot run
            self.empty = nn.Parameter(torch.zeros(0, 3), requires_grad=False)
        self.register_buffer("no_elements", torch.zeros(0))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("not_saved", torch.zeros(2), persistent=False)
        self.accuracy = MeanMetric()
        self.accuracy.persistent(True)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        image = self.conv(x.new_ones(1, 4, 4, 4)).sum()
        return self.norm(y.transpose(1, 2)).transpose(1, 2) + 0.01 * image + self.frozen(x[..., :4])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count += 1
        loss = super().training_step(batch, batch_idx)
        self.accuracy.update(loss.detach())
        return loss


def unusual(folder: str, stage: int, precision: Any, elsewhere: tuple[int, int]) -> dict[str, Any]:
    path, with_empty = str(Path(folder) / "a.ckpt"), 3 not in (stage, elsewhere[1])
    whole = trainer_of(
        stage=stage, max_steps=7, precision=precision, callbacks=[Step(lambda t: t.save_checkpoint(path), 4)]
    )
    whole.fit(model := Unusual(with_empty), of_rank(2))
    torch.manual_seed(9)
    other = Unusual(with_empty)
    for tensor in (other.frozen.weight, other.conv.weight, other.count, other.norm.running_mean, other.strided):
        tensor.data.fill_(7)
    resumed = trainer_of(ep_size=elsewhere[0], stage=elsewhere[1], max_steps=7, precision=precision)
    resumed.fit(other, of_rank(2), ckpt_path=path)
    saved = read_weights(path)
    return {
        "losses": (model.losses[4:], other.losses),
        "count": int(other.count),
        "strided": torch.equal(other.strided, model.strided) and not other.strided.is_contiguous(),
        "frozen": full_state(resumed)["frozen.weight"].tolist() == full_state(whole)["frozen.weight"].tolist(),
        "metric": (float(model.accuracy.mean_value), float(other.accuracy.mean_value)),
        "names": saved.keys() == Unusual(with_empty).state_dict().keys(),
        "strict": bool(Unusual(with_empty).load_state_dict(saved)),
        "dtypes": {str(saved[name].dtype) for name in ("conv.weight", "blocks.0.experts.w1")},
    }


@pytest.mark.parametrize(
    ("stage", "precision", "elsewhere"),
    [
        (0, "32-true", (2, 0)),
        (1, "bf16-true", (2, 1)),
        (3, "32-true", (2, 3)),
        (2, "32-true", (1, 3)),
        pytest.param(3, "32-true", (1, 0), marks=pytest.mark.grid),
        pytest.param(0, "bf16-true", (2, 0), marks=pytest.mark.grid),
    ],
)
def test_everything_that_a_module_may_have(
    stage: int, precision: str, elsewhere: tuple[int, int], get_pool: Any, tmp_path: Path
) -> None:
    found = get_pool(2).run(unusual, str(tmp_path), stage, precision, elsewhere)[0]
    whole, resumed = found["losses"]
    assert resumed == (whole if elsewhere == (2, stage) else pytest.approx(whole, abs=1e-5))
    assert len(resumed) == 3
    assert found["count"] == 7
    assert found["metric"][0] == pytest.approx(found["metric"][1], rel=1e-5)
    assert found["strided"]
    assert found["frozen"]
    assert found["names"]
    assert found["strict"]
    assert found["dtypes"] == {"torch.float32"}, "masters, whatever the model computes in"


def weights_alone(folder: str) -> dict[str, Any]:
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_weights_only=True)
    trainer_of(max_steps=2, callbacks=[saver]).fit(model := Recording(), of_rank(2))
    path = str(Path(folder) / "step=2.ckpt")
    saved = Checkpoint(path)
    validated = trainer_of(stage=3).validate(Recording(), of_rank(2), ckpt_path=path, verbose=False)
    expected = trainer_of().validate(model, of_rank(2), verbose=False)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        trainer_of(max_steps=4).fit(Recording(), of_rank(2), ckpt_path=path)
    return {"optimizer": saved.names("optimizer/"), "validated": validated, "expected": expected}


def test_weights_alone(get_pool: Any, tmp_path: Path) -> None:
    found = get_pool(2).run(weights_alone, str(tmp_path))[0]
    assert found["optimizer"] == []
    assert found["validated"][0]["val_loss"] == pytest.approx(found["expected"][0]["val_loss"], abs=1e-6)


def of_deepspeed(folder: str, stage: int) -> dict[str, Any]:
    """As Lightning's own DeepSpeedStrategy saves it."""
    path = str(Path(folder) / "a.ckpt")

    def save(trainer: L.Trainer) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, ExpertParallelStrategy)
        with engine.plain_checkpoints(strategy.deepspeed_engine) if stage == 3 else nullcontext():
            DeepSpeedStrategy.save_checkpoint(strategy, trainer._checkpoint_connector.dump_checkpoint(False), path)
        dist.barrier()

    trainer_of(stage=stage, max_steps=7, callbacks=[Step(save, 4)]).fit(whole := Recording(), of_rank(2))
    with caplog_of("lightning.pytorch.utilities.rank_zero") as said:
        trainer_of(stage=stage, max_steps=7).fit(resumed := Recording(), of_rank(2), ckpt_path=path)
    refused = ""
    if stage == 3:
        with pytest.raises(CheckpointError) as caught:
            trainer_of(stage=stage).validate(Recording(), of_rank(2), ckpt_path=path, verbose=False)
        refused = str(caught.value)
    return {
        "losses": (whole.losses[4:], resumed.losses),
        "said": said,
        "refused": refused,
        "new": is_checkpoint(Path(path)),
    }


@contextmanager
def caplog_of(name: str) -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize("stage", [0, 1, 3, pytest.param(2, marks=pytest.mark.grid)])
def test_a_checkpoint_of_deepspeeds_format_loads_with_a_hint(stage: int, get_pool: Any, tmp_path: Path) -> None:
    found = get_pool(2).run(of_deepspeed, str(tmp_path), stage)[0]
    whole, resumed = found["losses"]
    assert resumed == whole
    assert len(resumed) == 3
    assert not found["new"]
    hint = [text for text in found["said"] if "is of DeepSpeed's format, which resumes only in the layout" in text]
    assert len(hint) == 1
    assert ("save anew with trainer.save_checkpoint" in found["refused"]) == (stage == 3)

"""Checkpoints of the places where DeepSpeed keeps masters under its further options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_moe import ExpertParallelStrategy
from tests.callbacks.runs import quiet
from tests.strategies.test_checkpointing import Step
from tests.strategies.test_resume import Recording, of_rank

OFFLOAD: dict[str, Any] = {
    "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}
Setting = tuple[int, dict[str, Any]]  # ZeRO stage, DeepSpeed's config
CASES: dict[str, tuple[Setting, str, Setting, str]] = {
    "gradients in fp32": ((1, {"data_types": {"grad_accum_dtype": "fp32"}}), "bf16-true", (1, {}), "BF16_Optimizer"),
    "round robin": ((2, {"zero_optimization": {"round_robin_gradients": True}}), "32-true", (3, {}), "ZeroOptimizer"),
    "offload 1": ((1, OFFLOAD), "32-true", (2, {}), "ZeroOptimizer"),
    "offload 2": ((2, OFFLOAD), "bf16-true", (2, {}), "ZeroOptimizer"),
    "offload 3": ((3, OFFLOAD), "32-true", (1, OFFLOAD), "Stage3"),
    "small sub-groups": ((3, {"zero_optimization": {"sub_group_size": 100}}), "32-true", (0, {}), "Stage3"),
    "nothing persistent": (
        (3, {"zero_optimization": {"stage3_param_persistence_threshold": 0}}), "32-true", (3, {}), "Stage3"),
}  # fmt: skip


def trainer_of(setting: Setting, precision: Any, **options: Any) -> L.Trainer:
    stage, given = setting
    zero = {"stage": stage, **given.get("zero_optimization", {})}
    config = {"zero_allow_untested_optimizer": True, **given, "zero_optimization": zero}
    return quiet(devices=2, strategy=ExpertParallelStrategy(2, config=config), precision=precision, **options)


def saved_and_resumed(folder: str, case: str) -> None:
    setting, precision, elsewhere, kind = CASES[case]
    path = str(Path(folder) / "a.ckpt")
    save = Step(lambda trainer: trainer.save_checkpoint(path), 4)
    trainer = trainer_of(setting, precision, max_steps=7, callbacks=[save])
    trainer.fit(whole := Recording(), of_rank(2))
    assert kind in type(trainer.strategy.deepspeed_engine.optimizer).__name__
    for resuming, tolerance in ((setting, 0.0), (elsewhere, 1e-5 if precision == "32-true" else 1e-2)):
        trainer_of(resuming, precision, max_steps=7).fit(resumed := Recording(), of_rank(2), ckpt_path=path)
        assert resumed.losses == pytest.approx(whole.losses[4:], abs=tolerance, rel=0)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c in ("gradients in fp32", "round robin") else [pytest.mark.grid]) for c in CASES],
)
def test_resumes(case: str, get_pool: Any, tmp_path: Path) -> None:
    get_pool(2).run(saved_and_resumed, str(tmp_path), case)

"""What one does with a Trainer, under every ZeRO stage: precision, hooks, evaluation, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.testing import assert_close

from lightning_moe import AuxLossCallback, ExpertLoadMonitor, ExpertParallelStrategy, MoE, MoEConfig
from tests.selection import one_in
from tests.strategies.test_exactness import Case, assert_same, check, dataset, fit
from tests.toy import BATCH, CONFIG, Toy, ToyData, Trained, loader, train_reference


def trainer_for(ep_size: int = 2, stage: int = 1, world: int = 2, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 3}
    options = {**quiet, "enable_model_summary": False, "callbacks": [AuxLossCallback()], **options}
    return L.Trainer(accelerator="cpu", devices=world, strategy=ExpertParallelStrategy(ep_size, stage=stage), **options)


def rank() -> int:
    return torch.distributed.get_rank()


# ------------------------------------------------------------------------------------ the same run


@pytest.mark.parametrize("stage", range(4))
def test_lazily_built_model_has_the_same_weights(stage: int, get_pool: Any) -> None:
    check(Case(4, 2, stage, "alltoall", lazy=True), get_pool, steps=1)


@pytest.mark.parametrize(
    ("stage", "recompute"),
    [  # every third by default
        pytest.param(stage, recompute, marks=[pytest.mark.grid] * ((stage + place) % 3 != 1))
        for stage in range(4)
        for place, recompute in enumerate([None, "reentrant", "non-reentrant"])
    ],
)
def test_aux_gradient_is_that_of_the_written_objective(stage: int, recompute: str | None, get_pool: Any) -> None:
    case = Case(4, 2, stage, "alltoall", accumulate=3, clip=0.3, capacity_factor=1.25)
    # Plain SGD at rate 1: what the weights move by is the gradient.
    sgd = {"optimizer": torch.optim.SGD, "learning_rate": 1.0}
    check(case, get_pool, aux=(0.5, 0.05), steps=2, recompute=recompute, **sgd)


def warmup(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))


def chained(optimizer: Any) -> Any:
    schedulers = torch.optim.lr_scheduler
    rise = schedulers.LinearLR(optimizer, 0.1, total_iters=1)
    fall = schedulers.LambdaLR(optimizer, lambda step: 0.5**step)
    return schedulers.SequentialLR(optimizer, [rise, fall], milestones=[1])


@pytest.mark.parametrize(("scheduler", "stage"), one_in(2, [warmup, chained], range(4)))
def test_groups_and_schedulers_follow(scheduler: Any, stage: int, get_pool: Any) -> None:
    check(Case(2, 2, stage, clip=0.3), get_pool, two_groups=True, scheduler=scheduler)


@pytest.mark.parametrize("stage", range(4))
def test_last_window_of_an_epoch_steps(stage: int, get_pool: Any) -> None:
    """Four batches an epoch, accumulated by three: windows of 3, 1, 3, 1, as under DDP."""
    case = Case(2, 2, stage, accumulate=3)
    size = 2 * BATCH * 4
    results = get_pool(2).run(fit, case, steps=4, size=size)
    reference = train_reference(Toy(), dataset(case, size=size), 2, 4, accumulate=3)
    assert_same(results, reference)


def twice(case: Case) -> tuple[Trained, Trained]:
    return fit(case, (0.1, 0.01), steps=2), fit(case, (0.1, 0.01), steps=2)


@pytest.mark.parametrize("case", [Case(4, 2, 2, "alltoall", 1.25, 3, 0.3), Case(4, 4, 3, "allgather")], ids=str)
def test_same_run_twice_is_bit_identical(case: Case, get_pool: Any) -> None:
    for first, second in get_pool(case.world).run(twice, case):
        assert first.grad_norms == second.grad_norms
        assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)


@pytest.mark.parametrize(("precision", "stage"), one_in(2, ["bf16-true", "bf16-mixed"], range(4)))
def test_bf16_stays_near_fp32(precision: str, stage: int, get_pool: Any) -> None:
    """One plain SGD step at rate 1 from weights that bf16 can hold: what they move by is the gradient."""
    case = Case(2, 2, stage, precision=precision)
    sgd = {"optimizer": torch.optim.SGD, "learning_rate": 1.0}
    trained = get_pool(2).run(fit, case, (0.5, 0.05), steps=1, **sgd)[0]
    start = Toy(**sgd).bfloat16().float()
    reference = train_reference(start, dataset(case, 1), 2, 1, load_balancing=0.5, router_z=0.05)
    assert_close(torch.tensor(trained.grad_norms), torch.tensor(reference.grad_norms), rtol=1e-2, atol=0)
    for name, weight in start.named_parameters():
        moved, should = trained.state[name] - weight.detach(), reference.state[name].float() - weight.detach()
        rounding = 2**-9 * reference.state[name].norm()  # of the new weight: half a unit in bf16's last place
        assert (moved - should).norm() < 0.02 * should.norm() + rounding, name
        assert should.norm() > rounding, f"{name} hardly moves: the comparison would show nothing"


# ----------------------------------------------------------------------------------- what moves


def moved_after_one_step(stage: int) -> list[str]:
    from lightning_moe.testing.state import full_state

    model = Toy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_for(stage=stage, max_steps=1)
    trainer.fit(model, loader(ToyData(32), 2, rank()))
    after = full_state(trainer)
    return [
        f"{name}[{i}]"
        for name, old in before.items()
        for i in range(len(old))
        if ("experts" in name or "router" in name) and torch.equal(old[i], after[name][i])
    ]


@pytest.mark.parametrize("stage", range(4))
def test_every_expert_and_router_row_moves(stage: int, get_pool: Any) -> None:
    assert get_pool(2).run(moved_after_one_step, stage) == [[], []]


# ---------------------------------------------------------------------------------- the callbacks


def monitored(folder: str) -> tuple[list[str], dict[str, float]]:
    class Counting(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)

    trainer = trainer_for(
        max_steps=4,
        logger=CSVLogger(folder),
        log_every_n_steps=2,
        val_check_interval=2,
        callbacks=[
            LearningRateMonitor("step"),
            AuxLossCallback(0.1, 0.01),
            ExpertLoadMonitor(),
            EarlyStopping("val_loss", patience=10),
        ],
    )
    config = replace(CONFIG, capacity_factor=0.5, min_capacity=1)
    data = loader(ToyData(64), 2, rank())
    trainer.fit(Counting(config, two_groups=True, scheduler=warmup), data, loader(ToyData(16, seed=9), 2, rank()))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(trainer.lightning_module, data, verbose=False)
    predictions = trainer.predict(trainer.lightning_module, data)
    assert len(predictions) == len(data)
    return sorted(
        group["name"] for group in trainer.lightning_module.optimizers().param_groups if "name" in group
    ), metrics


def test_callbacks_and_two_groups(get_pool: Any, tmp_path: Path) -> None:
    names, metrics = get_pool(2).run(monitored, str(tmp_path))[0]
    assert names == ["ep_size_2_pg1"]
    assert metrics["moe/aux_loss"] == pytest.approx(
        0.1 * metrics["moe/load_balancing_loss"] + 0.01 * metrics["moe/router_z_loss"], rel=1e-5
    )
    assert 1.0 <= metrics["moe/load_imbalance"] <= 2.0
    assert 0.0 < metrics["moe/dropped_fraction"] < 1.0
    rows = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert {"lr-AdamW/pg1", "lr-AdamW/pg2", "lr-AdamW/ep_size_2_pg1", "val_loss"} <= set(rows[0].split(","))


# ---------------------------------------------------------------------------------- checkpoints


def saved_and_resumed(folder: str, stage: int, precision: Any) -> tuple[list[float], list[float], list[Any]]:
    losses: list[float] = []

    class Recording(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            losses.append(float(loss))
            return loss

    data, validation = loader(ToyData(8 * 3), 2, rank()), loader(ToyData(16, seed=9), 2, rank())
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1, monitor=None)
    common: dict[str, Any] = {"precision": precision, "enable_checkpointing": True, "gradient_clip_val": 0.3}
    trainer = trainer_for(stage=stage, max_steps=6, callbacks=[AuxLossCallback(), saver], **common)
    trainer.fit(Recording(scheduler=warmup), data)
    whole, path = list(losses), str(Path(folder) / "step=3.ckpt")
    losses.clear()
    trainer = trainer_for(stage=stage, max_steps=6, callbacks=[AuxLossCallback()], enable_checkpointing=False,
                          precision=precision, gradient_clip_val=0.3)  # fmt: skip
    trainer.fit(Recording(scheduler=warmup), loader(ToyData(8 * 3), 2, rank()), ckpt_path=path)
    resumed = list(losses)
    live = trainer.validate(trainer.lightning_module, validation, verbose=False)
    last = str(Path(folder) / "last.ckpt")
    trainer_for_saving = trainer_for(stage=stage, precision=precision)
    trainer_for_saving.fit(model := Toy(), data)
    trainer_for_saving.save_checkpoint(last)
    expected = trainer_for_saving.validate(model, validation, verbose=False)
    fresh = trainer_for(stage=stage, precision=precision).validate(Toy(), validation, ckpt_path=last, verbose=False)
    return whole, resumed, [live, expected, fresh]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(stage, precision, marks=[pytest.mark.grid] * ((stage + place) % 2))
        for stage in range(4)
        for place, precision in enumerate(["32-true", "bf16-true"])
    ],
)
def test_resume_and_validate_from_checkpoint(stage: int, precision: str, get_pool: Any, tmp_path: Path) -> None:
    for whole, resumed, (_, expected, fresh) in get_pool(2).run(saved_and_resumed, str(tmp_path), stage, precision):
        assert len(whole) == 6
        assert resumed == whole[3:]
        assert fresh == expected


# ------------------------------------------------------------------------- other ways to be built


class NativeToy(Toy):
    """A model made with DeepSpeed's own layer."""

    def build(self) -> None:
        from deepspeed.moe.layer import MoE as NativeMoE

        torch.manual_seed(rank())  # experts differ between ranks, as they must
        self.inp = nn.Linear(8, 8)
        expert = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.blocks.append(NativeMoE(8, expert, num_experts=4, ep_size=2, k=1, capacity_factor=4.0, use_rts=False))
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.blocks[0](self.inp(x))[0])


def native(stage: int) -> str | list[float]:
    losses = []

    class Recording(NativeToy):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    try:
        trainer_for(stage=stage, callbacks=[], max_steps=12).fit(
            Recording(learning_rate=3e-2), loader(ToyData(8), 2, rank())
        )
    except Exception as error:  # noqa: BLE001 - the message is what is tested
        return str(error)
    return losses


@pytest.mark.parametrize("stage", range(3))
def test_native_deepspeed_layers_train(stage: int, get_pool: Any) -> None:
    for losses in get_pool(2).run(native, stage):
        assert isinstance(losses, list), losses
        assert losses[-1] < 0.8 * losses[0]


def test_native_deepspeed_layers_are_refused_at_zero_3(get_pool: Any) -> None:
    message = (
        "stage=3: blocks.0 is a deepspeed.moe.layer.MoE, which ZeRO 3 does not partition. Use stage 0, 1 or 2, or "
        "lightning_moe.MoE."
    )
    assert get_pool(2).run(native, 3) == [message, message]


def parameters_made(lazy: bool) -> tuple[int, list[str], int]:
    trainer = trainer_for(2, 1, max_steps=1)
    seen = []

    class Watching(Toy):
        def configure_model(self) -> None:
            super().configure_model()
            moe = self.blocks[0]
            assert isinstance(moe, MoE)
            seen.append(moe.num_local_experts)
            seen.append(self.device_mesh["ep"].size())

    trainer.fit(Watching(lazy=lazy), loader(ToyData(16), 2, rank()))
    layer = trainer.lightning_module.blocks[0]
    return seen[0], [str(seen[1])], layer.num_local_experts


def test_configure_model_makes_only_local_experts(get_pool: Any) -> None:
    assert get_pool(2).run(parameters_made, True) == [(2, ["2"], 2)] * 2
    assert get_pool(2).run(parameters_made, False) == [(4, ["2"], 2)] * 2


def alias() -> str:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="expert_parallel", max_steps=1, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    trainer.fit(Toy(MoEConfig(num_experts=6, intermediate_size=8)), loader(ToyData(16), 2, rank()))
    strategy = trainer.strategy
    assert isinstance(strategy, ExpertParallelStrategy)
    assert strategy.expert_groups is not None
    return f"{type(strategy).__name__} {strategy.expert_groups.ep_size}"


def test_alias_with_automatic_size(get_pool: Any) -> None:
    assert get_pool(2).run(alias) == ["ExpertParallelStrategy 2"] * 2

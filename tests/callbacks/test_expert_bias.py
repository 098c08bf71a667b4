"""The bias that keeps the load even without a loss, against plain loops."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_moe import ExpertBiasUpdate, MoE, MoEConfig
from lightning_moe.nn import layer as layer_module
from tests.callbacks.runs import (
    Manual,
    Side,
    in_order,
    layers_of,
    parallel,
    quiet,
    rank,
    selected,
    start_weights,
    tokens_of,
    uneven,
    windows,
)
from tests.toy import CONFIG, Toy, ToyData

BIASED = replace(CONFIG, expert_bias=True)
RATE = 0.01
BATCHES, ACCUMULATE, STEPS = 4, 3, 5  # windows of 3, 1, 3, 1, 3


class Watch(L.Callback):
    """The biases after every batch."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.seen.append(biases(pl_module).clone())


def biases(module: torch.nn.Module) -> Tensor:
    return torch.stack([layer.router.expert_bias for layer in layers_of(module)])


def by_loops(world: int, accumulate: int = ACCUMULATE, steps: int = STEPS) -> Tensor:
    """The biases of both layers after every batch, [batches, layers, E], from a loop over single tokens."""
    weights, bias = start_weights(config=BIASED), torch.zeros(2, 4)
    load, seen = torch.zeros(2, 4), []
    for batch, ends in windows(BATCHES, accumulate, steps):
        for of_rank in range(world):
            for x_D in tokens_of(uneven(of_rank, BATCHES), batch).flatten(0, 1):
                for layer, weight_ED in enumerate(weights):
                    for expert in selected((weight_ED @ x_D).softmax(0) + bias[layer], CONFIG.top_k):
                        load[layer, expert] += 1
        if ends:
            for layer in range(2):
                bias[layer] += RATE * (load[layer].mean() - load[layer]).sign()
            load.zero_()
        seen.append(bias.clone())
    return torch.stack(seen)


def run(trainer: L.Trainer, watch: Watch, model: Side, of_rank: int) -> tuple[Tensor, bool]:
    """The biases after every batch, and whether evaluation left them alone."""
    data, validation = in_order(uneven(of_rank, BATCHES)), in_order(ToyData(8, seed=5))
    before = biases(model).clone()
    trainer.fit(model, data, validation)
    trained = biases(model).clone()
    trainer.validate(model, validation, verbose=False)
    trainer.test(model, validation, verbose=False)
    trainer.predict(model, validation)
    return torch.stack(watch.seen), not before.any() and torch.equal(trained, biases(model))


def watched(world: int, ep_size: int, stage: int, recompute: str | None) -> tuple[Tensor, bool]:
    watch = Watch()
    trainer = parallel(world, ep_size, stage, callbacks=[ExpertBiasUpdate(RATE), watch], max_steps=STEPS,
                       accumulate_grad_batches=ACCUMULATE, num_sanity_val_steps=2, val_check_interval=2)  # fmt: skip
    # At rate 0 the weights stay, so that the loops need nothing but the routers.
    return run(trainer, watch, Side(BIASED, recompute=recompute, learning_rate=0.0), rank())


@pytest.mark.parametrize(
    ("world", "ep_size", "stage", "recompute"),
    [
        (2, 1, 1, None),
        (2, 2, 0, "reentrant"),
        pytest.param(2, 2, 2, "non-reentrant", marks=pytest.mark.grid),
        pytest.param(2, 2, 3, "reentrant", marks=pytest.mark.grid),
        (2, 1, 3, "non-reentrant"),
        (4, 2, 1, "non-reentrant"),
        (4, 1, 2, "reentrant"),
    ],
)
def test_bias_is_that_of_a_plain_loop(
    world: int, ep_size: int, stage: int, recompute: str | None, get_pool: Any
) -> None:
    expected = by_loops(world)
    assert len(expected.unique(dim=0)) > 3, "the bias has to move"
    for seen, untouched in get_pool(world).run(watched, world, ep_size, stage, recompute):
        assert torch.equal(seen, expected)
        assert untouched


def test_one_process_without_a_strategy() -> None:
    watch = Watch()
    trainer = quiet(callbacks=[ExpertBiasUpdate(RATE), watch], max_steps=STEPS, accumulate_grad_batches=ACCUMULATE)
    seen, untouched = run(trainer, watch, Side(BIASED, learning_rate=0.0), 0)
    assert torch.equal(seen, by_loops(1))
    assert untouched


def with_ddp(manual: bool) -> tuple[Tensor, bool]:
    watch = Watch()
    trainer = quiet(devices=2, strategy="ddp", callbacks=[ExpertBiasUpdate(RATE), watch], max_steps=STEPS,
                    accumulate_grad_batches=1 if manual else ACCUMULATE)  # fmt: skip
    return run(trainer, watch, (Manual if manual else Side)(BIASED, learning_rate=0.0), rank())


@pytest.mark.parametrize("manual", [False, True])
def test_ddp(manual: bool, get_pool: Any) -> None:
    expected = by_loops(2, 1 if manual else ACCUMULATE)
    for seen, untouched in get_pool(2).run(with_ddp, manual):
        assert torch.equal(seen, expected)
        assert untouched


def manually() -> tuple[Tensor, bool]:
    watch = Watch()
    trainer = parallel(2, 2, 1, callbacks=[ExpertBiasUpdate(RATE), watch], max_steps=STEPS)
    return run(trainer, watch, Manual(BIASED, learning_rate=0.0), rank())


def test_manual_optimization(get_pool: Any) -> None:
    expected = by_loops(2, 1)
    for seen, _ in get_pool(2).run(manually):
        assert torch.equal(seen, expected)


def test_manual_optimization_that_accumulates() -> None:
    """A batch that ends without a step of the optimizer moves nothing."""
    watch = Watch()
    trainer = quiet(callbacks=[ExpertBiasUpdate(RATE), watch], max_steps=STEPS)
    seen, _ = run(trainer, watch, Manual(BIASED, accumulate=2, learning_rate=0.0), 0)
    assert torch.equal(seen, by_loops(1, 2))


# ------------------------------------------------------------------------------------- what it is


def test_bias_selects_and_never_weighs() -> None:
    """Experts 2 and 3 win by their bias, and are weighed by their own scores divided by their sum."""
    layer = MoE(8, BIASED).eval()
    layer.router.expert_bias += torch.tensor([0.0, 0.0, 5.0, 9.0])
    x_TD = torch.randn(5, 8)
    for x_D, y_D in zip(x_TD, layer(x_TD), strict=True):
        scores_E = (layer.router.weight @ x_D).softmax(0)
        alone = []
        for expert in (2, 3):
            gate, up = (layer.experts.w1[expert] @ x_D).chunk(2)
            alone.append(layer.experts.w2[expert] @ (torch.nn.functional.silu(gate) * up))
        expected = (scores_E[2] * alone[0] + scores_E[3] * alone[1]) / (scores_E[2] + scores_E[3])
        torch.testing.assert_close(y_D, expected)


def in_half_precision(precision: Any, stage: int) -> tuple[str, Tensor]:
    watch = Watch()
    model = Side(BIASED)
    for layer in layers_of(model):
        layer.router.expert_bias += 0.5
    callbacks = [ExpertBiasUpdate(), watch]
    parallel(2, 2, stage, callbacks=callbacks, max_steps=3, precision=precision).fit(model, in_order(uneven(rank(), 3)))
    return str(biases(model).dtype), torch.stack(watch.seen)


@pytest.mark.parametrize(("precision", "stage"), [("bf16-true", 1), ("bf16-mixed", 2), ("bf16-true", 3)])
def test_bias_is_fp32_whatever_the_precision(precision: str, stage: int, get_pool: Any) -> None:
    """Beside a bias of 0.5 a step of 0.001 is below what bf16 can tell."""
    for dtype, seen in get_pool(2).run(in_half_precision, precision, stage):
        assert dtype == "torch.float32"
        moved = torch.cat([torch.full((1, 2, 4), 0.5), seen]).diff(dim=0)
        assert ((moved.abs() - 0.001).abs() < 1e-7).any(-1).all(), "in every step and layer some expert's moves"
        assert (((moved.abs() - 0.001).abs() < 1e-7) | (moved == 0)).all()


def saved_and_resumed(folder: str, stage: int) -> list[Tensor]:
    """The biases at the end of a run, of one that resumes it in the middle, and as validation gets them there."""

    def fit(steps: int, *callbacks: L.Callback, **options: Any) -> Tensor:
        model = Side(BIASED)
        trainer = parallel(2, 2, stage, callbacks=[ExpertBiasUpdate(RATE), *callbacks], max_steps=steps,
                           enable_checkpointing=bool(callbacks))  # fmt: skip
        trainer.fit(model, in_order(uneven(rank(), 2)), **options)  # two steps an epoch
        return biases(model).clone()

    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1, monitor=None)
    path = str(Path(folder) / "step=2.ckpt")
    whole = fit(4, saver)
    middle = fit(2)
    resumed = fit(4, ckpt_path=path)
    fresh = Side(BIASED)
    parallel(2, 2, stage).validate(fresh, in_order(ToyData(8)), ckpt_path=path, verbose=False)
    return [whole, resumed, middle, biases(fresh)]


@pytest.mark.parametrize("stage", range(4))
def test_checkpoint_has_the_bias(stage: int, get_pool: Any, tmp_path: Path) -> None:
    for whole, resumed, middle, validated in get_pool(2).run(saved_and_resumed, str(tmp_path), stage):
        assert not torch.equal(whole, middle)
        assert torch.equal(whole, resumed)
        assert torch.equal(middle, validated)


# --------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("rate", [0.0, -0.5, float("inf"), float("nan")])
def test_rate_is_above_0(rate: float) -> None:
    message = f"rate={rate}: must be a finite number above 0. Use 0.001, or leave the callback out."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ExpertBiasUpdate(rate)


def test_model_without_the_bias_is_refused() -> None:
    message = (
        "ExpertBiasUpdate: no router of this model has an expert_bias. Use router='group_limited', or "
        "expert_bias=True with router='topk'."
    )
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}$"):
        quiet(callbacks=[ExpertBiasUpdate()], max_steps=1).fit(Toy(), in_order(ToyData(4)))


@pytest.mark.parametrize(
    "config",
    [BIASED, MoEConfig(num_experts=4, intermediate_size=8, router="group_limited")],
    ids=lambda config: config.router,
)
def test_nobody_is_warned_of_missing_losses(config: MoEConfig) -> None:
    layer_module._warn_without_losses.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet(callbacks=[ExpertBiasUpdate()], max_steps=1).fit(Toy(config), in_order(ToyData(4)))
        assert not any("no AuxLossCallback" in str(warning.message) for warning in caught)
        # And without it somebody is.
        quiet(max_steps=1).fit(Toy(config), in_order(ToyData(4)))
        assert any("no AuxLossCallback" in str(warning.message) for warning in caught)


def test_layers_are_left_as_they_were() -> None:
    model = Toy(BIASED)
    quiet(callbacks=[ExpertBiasUpdate()], max_steps=1).fit(model, in_order(ToyData(4)))
    assert not any(layer.tap.in_use or layer.tap.balanced for layer in layers_of(model))

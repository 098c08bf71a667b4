"""The weights of the auxiliary losses by step, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_moe import AuxLossCallback, MoEConfig
from lightning_moe.nn import LossWeights
from tests.callbacks.runs import Memory, Side, in_order, layers_of, quiet
from tests.toy import BATCH, CONFIG, Toy, ToyData, loader, train_reference

NOISY = replace(CONFIG, router="noisy_topk")


def factors(callback: AuxLossCallback, steps: int) -> list[float]:
    """Of a weight of 1."""
    return [callback.weights(step).load_balancing for step in range(steps)]


def test_all_weights_rise_and_fall_together() -> None:
    callback = AuxLossCallback(0.4, 0.2, importance=0.8, load=1.6, warmup_steps=3, decay="linear", decay_steps=5)
    for step, factor in enumerate([0.25, 0.5, 0.75, 1.0, 0.5, 0.0, 0.0]):
        expected = LossWeights(0.4 * factor, 0.2 * factor, 0.8 * factor, 1.6 * factor)
        assert callback.weights(step)._asdict() == pytest.approx(expected._asdict())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0] * 8),
        ({"warmup_steps": 3}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"decay": "linear", "decay_steps": 4}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]),
        (
            {"decay": "linear", "decay_steps": 6, "warmup_steps": 2, "final_ratio": 0.2},
            [1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2],
        ),
        (
            {"decay": "cosine", "decay_steps": 4},
            [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0, 0.0, 0.0, 0.0],
        ),
        (
            {"decay": "cosine", "decay_steps": 3, "warmup_steps": 1, "final_ratio": 0.5},
            [0.5, 1.0, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5],
        ),
        ({"decay": "linear", "decay_steps": 4, "final_ratio": 1.0}, [1.0] * 8),
    ],
)
def test_weights_by_step(settings: dict[str, Any], expected: list[float]) -> None:
    assert factors(AuxLossCallback(1.0, **settings), 8) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"max_steps": 4}, 4),
        ({"max_epochs": 2}, 6),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 4),
        ({"max_epochs": 5, "max_steps": 3}, 3),
    ],
    ids=str,
)
def test_decay_comes_to_its_end_with_the_run(options: dict[str, Any], last: int) -> None:
    callback = AuxLossCallback(1.0, decay="linear")
    trainer = quiet(callbacks=[callback], **options)
    trainer.fit(Toy(), in_order(ToyData(3 * BATCH)))
    assert trainer.global_step == last
    assert factors(callback, last + 2) == pytest.approx([*(1 - step / last for step in range(last + 1)), 0.0])


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """Has no length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = ToyData(2 * BATCH)
        return (data[i] for i in range(len(data)))


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_epochs": 2}], ids=str)
def test_run_without_an_end_needs_decay_steps(decay: Any, options: dict[str, Any]) -> None:
    message = f"decay={decay!r}: the end of this run, to which the weights would fall, is not known. Set decay_steps, "
    data = DataLoader(Endless(), batch_size=BATCH)
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}"):
        quiet(callbacks=[AuxLossCallback(decay=decay)], **options).fit(Toy(), data)
    # And nobody minds where it is said, or where nothing falls.
    for callback in (AuxLossCallback(decay=decay, decay_steps=4), AuxLossCallback(warmup_steps=2)):
        trainer = quiet(callbacks=[callback], limit_train_batches=1, **{**options, "max_epochs": 1})
        trainer.fit(Toy(), data)
        assert trainer.global_step == 1


# --------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({name: value}, f"{name}={value}: must be a finite number of at least 0. Use 0 to leave it out.")
            for name in ("load_balancing", "router_z", "importance", "load")
            for value in (-0.5, math.inf, math.nan)
        ),
        ({"warmup_steps": -1}, "warmup_steps=-1: must be 0 or more. Use 0 for full weights at once."),
        ({"scope": "batch"}, "scope='batch': unknown. Known: micro_batch, sequence, global_batch."),
        ({"decay": "step"}, "decay='step': unknown. Known: none, linear, cosine."),
        *(
            (
                {"decay": "linear", "decay_steps": steps, "warmup_steps": 5},
                (
                    f"decay_steps={steps}: must be above warmup_steps=5, where the decay begins. Use a later step, or null for "
                    "the end of the run."
                ),
            )
            for steps in (0, 5)
        ),
        *(
            (
                {"decay": "cosine", "final_ratio": ratio},
                f"final_ratio={ratio}: must be from 0 to 1. Use 0 to let the weights fall to 0.",
            )
            for ratio in (-0.1, 1.1, math.nan)
        ),
        *(
            (
                {"decay_steps": steps, "final_ratio": ratio},
                (
                    f"decay='none': decay_steps={steps} and final_ratio={ratio} would do nothing. Use decay='linear' or "
                    "'cosine', or leave them out."
                ),
            )
            for steps, ratio in ((10, 0.0), (None, 0.5))
        ),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AuxLossCallback(**settings)


class Mixed(Toy):
    """Two layers with different routers."""

    configs = (CONFIG, replace(CONFIG, router="gshard"))

    def build(self) -> None:
        super().build()
        for index, config in enumerate(self.configs):
            self.blocks[index] = type(self.blocks[index])(8, config)


def test_load_loss_needs_a_noisy_router() -> None:
    fits = quiet(callbacks=[AuxLossCallback(load=0.5)], max_steps=1)
    message = "load=0.5: router={} has no noise to take the load loss over. Use router='noisy_topk', or load=0 with "
    message += "load_balancing."
    for model, routers in ((Toy(), "'topk'"), (Mixed(), "'gshard, topk'")):
        with pytest.raises(MisconfigurationException, match=f"^{re.escape(message.format(routers))}$"):
            fits.fit(model, in_order(ToyData(BATCH)))


@pytest.mark.parametrize("router", ["random", "sinkhorn"])
def test_importance_loss_of_any_router(router: str) -> None:
    """Where the weights do not depend on the activations it is logged and moves nothing."""
    memory, model = Memory(), Side(MoEConfig(num_experts=4, intermediate_size=8, router=router), learning_rate=0.0)
    trainer = quiet(callbacks=[AuxLossCallback(0.0, importance=0.5)], max_steps=1, logger=memory, log_every_n_steps=1)
    trainer.fit(model, in_order(ToyData(BATCH)))
    (logged,) = memory.metrics
    assert 0 < logged["moe/importance_loss"] < 4
    assert logged["moe/aux_loss"] == pytest.approx(0.5 * logged["moe/importance_loss"])
    assert "moe/load_loss" not in logged


def test_load_and_importance_of_a_noisy_router() -> None:
    """The logged values are those of plain sums over what the routers gave in the forward pass."""
    memory, model = Memory(), Side(NOISY, learning_rate=0.0)
    expected: dict[str, list[Tensor]] = {"load": [], "importance": []}

    def variation(values_E: Tensor) -> Tensor:
        mean = sum(values_E) / len(values_E)
        return sum((value - mean) ** 2 for value in values_E) / len(values_E) / mean**2

    def look(module: Any, args: Any, routing: Any) -> None:
        importance_E = torch.zeros(4)
        for ids_K, weights_K in zip(routing.topk_ids_TK, routing.topk_scores_TK, strict=True):
            for expert, weight in zip(ids_K, weights_K, strict=True):
                importance_E[expert] += weight.detach()
        expected["importance"].append(variation(importance_E))
        expected["load"].append(variation(routing.load_TE.detach().sum(0)))

    for layer in layers_of(model):
        layer.router.register_forward_hook(look)
    aux = AuxLossCallback(0.0, importance=0.25, load=0.5)
    quiet(callbacks=[aux], max_steps=1, logger=memory, log_every_n_steps=1, accumulate_grad_batches=3).fit(
        model, in_order(ToyData(3 * BATCH))
    )
    (logged,) = memory.metrics
    assert len(expected["load"]) == 6
    means = {name: float(torch.stack(values).mean()) for name, values in expected.items()}
    assert logged["moe/load_loss"] == pytest.approx(means["load"], rel=1e-5)
    assert logged["moe/importance_loss"] == pytest.approx(means["importance"], rel=1e-5)
    assert logged["moe/aux_loss"] == pytest.approx(0.25 * means["importance"] + 0.5 * means["load"], rel=1e-5)


@pytest.mark.parametrize("weights", [{"importance": 0.5}, {"load": 0.5}], ids=str)
def test_noise_learns_from_its_losses(weights: dict[str, float]) -> None:
    model = Side(NOISY, task=0.0, optimizer=torch.optim.SGD, learning_rate=1.0)
    quiet(callbacks=[AuxLossCallback(0.0, **weights)], max_steps=1).fit(model, in_order(ToyData(BATCH)))
    for layer in layers_of(model):
        assert layer.router.noise_weight.abs().max() > 0


# ---------------------------------------------------------------------------- without the strategy


def gradients(precision: Any, accumulate: int) -> dict[str, torch.Tensor]:
    """What SGD at rate 1 moves in one step of a plain Trainer on one device."""
    model = Toy(optimizer=torch.optim.SGD, learning_rate=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[AuxLossCallback(0.5, 0.25)], max_steps=1, logger=False,
                        accumulate_grad_batches=accumulate, enable_checkpointing=False, precision=precision,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, loader(ToyData(BATCH * accumulate)))
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_without_the_strategy(accumulate: int) -> None:
    reference = train_reference(Toy(optimizer=torch.optim.SGD, learning_rate=1.0), ToyData(BATCH * accumulate), 1, 1,
                                accumulate, None, 0.5, 0.25)  # fmt: skip
    moved = gradients("32-true", accumulate)
    for name, start in Toy().named_parameters():
        torch.testing.assert_close(
            moved[name], (reference.state[name] - start.detach()).float(), rtol=1e-4, atol=1e-6, msg=name
        )


def test_two_of_them_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"^AuxLossCallback: another one is in charge"):
        quiet(callbacks=[AuxLossCallback(), AuxLossCallback(0.1)], max_steps=1).fit(Toy(), in_order(ToyData(BATCH)))
    quiet(callbacks=[AuxLossCallback()], max_steps=1).fit(Toy(), in_order(ToyData(BATCH)))

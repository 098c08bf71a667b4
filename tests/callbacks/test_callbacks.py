"""What the callbacks count and log, against the plain-loop layer, over ranks with different data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger

from lightning_moe import AuxLossCallback, ExpertLoadMonitor, ExpertParallelStrategy
from lightning_moe.testing.reference import ReferenceMoE, reference_of
from tests.strategies.test_training import rank
from tests.toy import BATCH, CONFIG, Toy, ToyData, loader

CAPACITY = replace(CONFIG, capacity_factor=0.75, min_capacity=1)


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[dict[str, float]] = []

    name = "memory"
    version = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(dict(metrics))


def logged(world: int, ep_size: int, accumulate: int, recompute: str | None, validate: bool) -> dict[str, float]:
    """The metrics of a single step with learning rate 0, so that every micro-batch sees the first weights."""
    memory = Memory()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=ExpertParallelStrategy(ep_size),
        callbacks=[AuxLossCallback(0.5, 0.25), ExpertLoadMonitor()],
        max_steps=1,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
        num_sanity_val_steps=2 if validate else 0,
        limit_val_batches=2 if validate else 0,
        val_check_interval=1,
        logger=memory,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Toy(CAPACITY, recompute=recompute, learning_rate=0.0)
    data = ToyData(world * BATCH * accumulate)
    trainer.fit(model, loader(data, world, rank()), loader(ToyData(world * BATCH * 2, seed=5), world, rank()))
    if validate:
        trainer.predict(model, loader(data, world, rank()))
    return {k: float(v) for metrics in memory.metrics for k, v in metrics.items() if k.startswith("moe/")}


def expected(world: int, accumulate: int) -> dict[str, float]:
    twin = reference_of(Toy(CAPACITY), world)
    assert isinstance(twin, Toy)
    data = ToyData(world * BATCH * accumulate)
    layers = [block for block in twin.blocks if isinstance(block, ReferenceMoE)]
    counts, dropped, losses = [torch.zeros(4) for _ in layers], [0, 0], {"load_balancing": [], "router_z": []}
    for micro_batch in range(accumulate):
        first = micro_batch * BATCH
        rows = [i * world + r for r in range(world) for i in range(first, first + BATCH)]
        twin(data.x[rows].double())
        for index, layer in enumerate(layers):
            counts[index] += layer.tokens_per_expert_E
            dropped[index] += layer.num_dropped
            for name, values in losses.items():
                values.append(layer.losses[name].item())
    total = world * accumulate * BATCH * 3 * CONFIG.top_k
    assert all(count.sum() == total for count in counts)
    assert all(dropped)
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    return {
        "moe/load_balancing_loss": means["load_balancing"],
        "moe/router_z_loss": means["router_z"],
        "moe/aux_loss": 0.5 * means["load_balancing"] + 0.25 * means["router_z"],
        "moe/load_imbalance": sum(float(count.max() / count.mean()) for count in counts) / len(counts),
        "moe/dropped_fraction": sum(dropped) / total / len(counts),
    }


@pytest.mark.parametrize(("world", "ep_size"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("recompute", [None, "reentrant", "non-reentrant"])
def test_every_token_is_counted_once(
    world: int, ep_size: int, accumulate: int, recompute: str | None, get_pool: Any
) -> None:
    results = get_pool(world).run(logged, world, ep_size, accumulate, recompute, True)
    assert results[0] == pytest.approx(expected(world, accumulate), rel=1e-5)
    # Ranks other than 0 have no logger, but took part in the reductions: they all came back.
    assert len(results) == world


def single_process_weights(step: int) -> tuple[float, float]:
    return AuxLossCallback(0.4, 0.2, warmup_steps=3).weights(step)


def test_warmup() -> None:
    assert [single_process_weights(step) for step in range(5)] == [
        (0.1, 0.05), (0.2, 0.1), (pytest.approx(0.3), pytest.approx(0.15)), (0.4, 0.2), (0.4, 0.2)
    ]  # fmt: skip


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
    from tests.toy import train_reference

    reference = train_reference(Toy(optimizer=torch.optim.SGD, learning_rate=1.0), ToyData(BATCH * accumulate), 1, 1,
                                accumulate, None, 0.5, 0.25)  # fmt: skip
    moved = gradients("32-true", accumulate)
    for name, start in Toy().named_parameters():
        torch.testing.assert_close(
            moved[name], (reference.state[name] - start.detach()).float(), rtol=1e-4, atol=1e-6, msg=name
        )

"""What the callbacks count and log, against the plain-loop layer, over ranks with different data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_moe import AuxLossCallback, ExpertLoadMonitor, ExpertParallelStrategy
from lightning_moe.nn import Routing
from lightning_moe.nn.placing import place
from lightning_moe.nn.router.base import without_padding
from lightning_moe.testing.reference import ReferenceMoE, reference_of
from tests.callbacks.runs import Memory, in_order, quiet, rank
from tests.selection import one_in
from tests.toy import BATCH, CONFIG, Toy, ToyData, loader

CAPACITY = replace(CONFIG, capacity_factor=0.75, min_capacity=1)


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
    return {name: value for metrics in memory.metrics for name, value in metrics.items()}


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
        "moe/rerouted_fraction": 0.0,
    }


@pytest.mark.parametrize(
    ("world", "accumulate", "recompute"), one_in(3, [2, 4], [1, 4], [None, "reentrant", "non-reentrant"])
)
def test_every_token_is_counted_once(world: int, accumulate: int, recompute: str | None, get_pool: Any) -> None:
    results = get_pool(world).run(logged, world, 2, accumulate, recompute, True)
    wanted = expected(world, accumulate)
    assert {name: results[0][name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    # Ranks other than 0 have no logger, but took part in the reductions: they all came back.
    assert len(results) == world


# ----------------------------------------------------------------------- capacity, and padding


class Padded(Toy):
    """Takes the last positions of every sequence for padding."""

    def forward(self, x: Tensor) -> Tensor:
        valid = real(x)
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x, valid=valid)
        return self.out(torch.tanh(x))


def real(x_BSD: Tensor) -> Tensor:
    """Two of three positions, in every other sequence one."""
    valid_BS = torch.ones(x_BSD.shape[:2], dtype=torch.bool)
    valid_BS[:, 2] = False
    valid_BS[::2, 1] = False
    return valid_BS


def by_count(routings: list[tuple[Routing, Routing]], valid_T: Tensor) -> dict[str, float]:
    """Load, dropped and rerouted share of single assignments of tokens that are no padding, per layer."""
    imbalance, dropped, rerouted = [], [], []
    for chosen, placed in routings:
        count, lost, moved, total = [0] * 4, 0, 0, 0
        for token in range(len(valid_T)):
            if not valid_T[token]:
                continue
            for k in range(2):
                count[int(chosen.topk_ids_TK[token, k])] += 1
                total += 1
                lost += placed.kept_TK is not None and not placed.kept_TK[token, k]
                moved += bool(placed.topk_ids_TK[token, k] != chosen.topk_ids_TK[token, k])
        imbalance.append(max(count) * 4 / total)
        dropped.append(lost / total)
        rerouted.append(moved / total)
    names = ("moe/load_imbalance", "moe/dropped_fraction", "moe/rerouted_fraction")
    return {name: sum(values) / 2 for name, values in zip(names, (imbalance, dropped, rerouted), strict=True)}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("capacity_factor", "overflow", "happens"),
    [(None, "drop", ()), (0.7, "drop", ("dropped",)), (1.5, "next_expert", ("rerouted",)),
     (0.7, "next_expert", ("dropped", "rerouted"))],
)  # fmt: skip
def test_dropped_and_rerouted_fractions(
    capacity_factor: float | None, overflow: Any, happens: tuple[str, ...], padded: bool
) -> None:
    config = replace(CONFIG, capacity_factor=capacity_factor, overflow=overflow, min_capacity=1)
    memory, model, data = Memory(), (Padded if padded else Toy)(config), ToyData(BATCH)
    seen: list[tuple[Routing, Routing]] = []
    for block in model.blocks:
        dispatcher = block.dispatcher

        def watch(router: Any, args: Any, chosen: Routing, dispatcher: Any = dispatcher) -> None:
            chosen = without_padding(chosen, args[1])
            seen.append((chosen, place(chosen, args[1], router, dispatcher)[0]))

        block.router.register_forward_hook(watch)
    callbacks = [AuxLossCallback(0.0), ExpertLoadMonitor()]
    quiet(callbacks=callbacks, max_steps=1, logger=memory, log_every_n_steps=1).fit(model, in_order(data))
    valid_T = real(data.x).flatten() if padded else torch.ones(BATCH * 3, dtype=torch.bool)
    expected = by_count(seen, valid_T)
    (metrics,) = memory.metrics
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    for name in ("dropped", "rerouted"):
        assert (expected[f"moe/{name}_fraction"] > 0) == (name in happens), name

"""What ExpertLoadMonitor logs, against plain loops over all ranks' tokens in float64."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_moe import AuxLossCallback, ExpertLoadMonitor
from lightning_moe.callbacks._counters import RoutingCounter, read, take
from lightning_moe.nn import Decision, Routing, Tokens
from tests.callbacks.runs import (
    Memory,
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
from tests.toy import BATCH, CONFIG, ToyData

TOP_K, EVERY, STEPS = CONFIG.top_k, 2, 4
WIDE = replace(CONFIG, num_experts=24)  # some of which get no token
NAMES = ("load_imbalance", "dead_experts", "dropped_fraction", "rerouted_fraction", "router_entropy")


class Both(Memory):
    """Keeps what is logged of training and of validation."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append({name: value for name, value in metrics.items() if "moe/" in name})


class Plain:
    """Counts, token by token, what the routers of :class:`Side` choose as long as nothing is learned."""

    def __init__(self) -> None:
        self.weights = start_weights(config=WIDE)
        self.counts = [[0] * WIDE.num_experts for _ in self.weights]
        self.entropy = [0.0 for _ in self.weights]
        self.tokens = 0

    def see(self, data: ToyData, batch: int) -> None:
        for x_D in tokens_of(data, batch).flatten(0, 1):
            self.tokens += 1
            for layer, weight_ED in enumerate(self.weights):
                logits_E = weight_ED @ x_D
                for expert in selected(logits_E, TOP_K):
                    self.counts[layer][expert] += 1
                probs = logits_E.softmax(0).tolist()
                self.entropy[layer] -= sum(p * math.log(p) for p in probs)

    def logged(self, prefix: str) -> dict[str, float]:
        layers = []
        for counts, entropy in zip(self.counts, self.entropy, strict=True):
            assert sum(counts) == self.tokens * TOP_K
            layers.append(
                {
                    "load_imbalance": max(counts) * len(counts) / sum(counts),
                    "dead_experts": float(counts.count(0)),
                    "dropped_fraction": 0.0,
                    "rerouted_fraction": 0.0,
                    "router_entropy": entropy / self.tokens / math.log(len(counts)),
                }
            )
        values = {f"{prefix}/{name}": sum(layer[name] for layer in layers) / len(layers) for name in NAMES}
        for i, layer in enumerate(layers):
            values |= {f"{prefix}/layer_{i:02}/{name}": layer[name] for name in NAMES}
        return values


def val_data(rank: int) -> ToyData:
    return ToyData(2 * BATCH, seed=70 + rank, length=2 + rank)


def logged(world: int, ep_size: int, accumulate: int, recompute: str | None, validate: bool) -> list[dict[str, float]]:
    memory = Both()
    options: dict[str, Any] = {
        "callbacks": [AuxLossCallback(0.0), ExpertLoadMonitor(per_layer=True)],
        "logger": memory,
        "log_every_n_steps": EVERY,
        "max_steps": STEPS,
        "accumulate_grad_batches": accumulate,
        "num_sanity_val_steps": 1 if validate else 0,
        "val_check_interval": 1 if accumulate == 1 else None,
        "limit_val_batches": 1.0 if validate else 0,
    }
    trainer = parallel(world, ep_size, **options) if world > 1 else quiet(**options)
    model = Side(config=WIDE, recompute=recompute, learning_rate=0.0)
    trainer.fit(model, in_order(uneven(rank() if world > 1 else 0, 6)), in_order(val_data(rank() if world > 1 else 0)))
    if validate:
        trainer.predict(model, in_order(uneven(rank() if world > 1 else 0, 1)))
    assert not any(layer.tap.in_use or layer.tap.eval_watchers for layer in layers_of(model))
    return [metrics for metrics in memory.metrics if metrics]


def expected(world: int, accumulate: int) -> list[dict[str, float]]:
    found, counter, done = [], Plain(), 0
    for batch, ends in windows(6, accumulate, STEPS):
        for of_rank in range(world):
            counter.see(uneven(of_rank, 6), batch)
        done += ends
        if ends and done % EVERY == 0:
            found.append(counter.logged("moe"))
            counter = Plain()
    return found


@pytest.mark.parametrize(
    ("world", "ep_size", "accumulate", "recompute", "validate"),
    [
        (1, 1, 1, None, True),
        (2, 2, 1, None, True),
        (2, 2, 4, "non-reentrant", True),
        (4, 2, 1, "reentrant", False),
        *(
            pytest.param(*case, marks=pytest.mark.grid)
            for case in [
                (2, 2, 4, None, False),
                (2, 2, 1, "reentrant", True),
                (2, 1, 4, "reentrant", True),
                (4, 2, 4, None, True),
                (4, 4, 1, "non-reentrant", True),
                (4, 4, 4, "reentrant", True),
            ]
        ),
    ],
)
def test_every_window_of_steps(
    world: int, ep_size: int, accumulate: int, recompute: str | None, validate: bool, get_pool: Any
) -> None:
    args = world, ep_size, accumulate, recompute, validate
    found = (get_pool(world).run(logged, *args) if world > 1 else [logged(*args)])[0]
    steps = [metrics for metrics in found if "moe/load_imbalance" in metrics]
    wanted = expected(world, accumulate)
    assert len(steps) == len(wanted) == STEPS // EVERY
    for metrics, values in zip(steps, wanted, strict=True):
        assert {name: metrics[name] for name in values} == pytest.approx(values, rel=1e-5)
    assert accumulate > 1 or any(values["moe/dead_experts"] for values in wanted)
    # Validation has its own values, each time those of its own data.
    runs = [metrics for metrics in found if "val_moe/load_imbalance" in metrics]
    assert bool(runs) == validate
    counter = Plain()
    for of_rank in range(world):
        for batch in range(2):
            counter.see(val_data(of_rank), batch)
    for metrics in runs:
        values = counter.logged("val_moe")
        assert {name: metrics[name] for name in values} == pytest.approx(values, rel=1e-5)


def callback_metrics(world: int) -> dict[str, float]:
    trainer = parallel(world, 2, callbacks=[AuxLossCallback(), ExpertLoadMonitor()], max_steps=2, log_every_n_steps=1)
    trainer.fit(Side(), in_order(uneven(rank(), 2)), in_order(val_data(rank())))
    return {name: value.item() for name, value in trainer.callback_metrics.items() if "moe/" in name}


def test_all_ranks_have_the_same_values(pool2: Any) -> None:
    first, second = pool2.run(callback_metrics, 2)
    losses = ("moe/load_balancing_loss", "moe/router_z_loss", "moe/aux_loss", "moe/load_balancing_weight")
    assert len(first) == 2 * len(NAMES) + 5 + len(losses)
    assert first == second


def test_validate_alone() -> None:
    memory = Both()
    trainer = quiet(callbacks=[ExpertLoadMonitor()], logger=memory)
    trainer.validate(Side(config=WIDE), in_order(val_data(1)), verbose=False)
    counter = Plain()
    for batch in range(2):
        counter.see(val_data(1), batch)
    values = {name: value for name, value in counter.logged("val_moe").items() if "layer_" not in name}
    (metrics,) = memory.metrics
    assert metrics == pytest.approx(values, rel=1e-5)


# ----------------------------------------------------------------------- what dispatch costs


class Slow(Side):
    """Rank 1 comes late to every second step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if rank() == 1 and batch_idx % 2:
            import time

            time.sleep(0.2)
        return super().training_step(batch, batch_idx)


def traffic(dispatcher: str, ep_size: int, steps: int, every: int) -> tuple[list[dict[str, float]], list[int]]:
    """What is logged, and the bytes that this rank sends in every step as a spy on the collectives counts them."""
    from tests.dispatch.test_wire import watched

    memory = Memory()
    model = (Slow if every == 2 else Side)(config=replace(CONFIG, dispatcher=dispatcher))
    sent: list[int] = []

    class Spy(AuxLossCallback):
        def on_train_batch_start(self, *args: Any) -> None:
            self.watching = watched()
            self.seen = self.watching.__enter__()

        def on_train_batch_end(self, *args: Any) -> None:
            self.watching.__exit__(None, None, None)
            sent.append(sum(rows * row_bytes for _, rows, row_bytes in self.seen))
            super().on_train_batch_end(*args)

    trainer = parallel(
        2,
        ep_size,
        callbacks=[Spy(), ExpertLoadMonitor(prog_bar=False)],
        logger=memory,
        log_every_n_steps=every,
        max_steps=steps,
    )
    trainer.fit(model, in_order(uneven(rank(), steps)))
    assert not any(layer.groups.meter.is_on for layer in layers_of(model))
    return memory.metrics, sent


def test_waiting_is_the_others_delay(pool2: Any) -> None:
    (metrics, _), _ = pool2.run(traffic, "alltoall", 2, 4, 2)
    for logged in metrics:  # steps 2 and 4, to which rank 1 came late
        assert 0.15 < logged["moe/dispatch_seconds_slowest"] < 0.4
        assert logged["moe/dispatch_seconds"] < 0.8 * logged["moe/dispatch_seconds_slowest"]
        assert 0.3 < logged["moe/dispatch_share"] < 0.7  # of two ranks one waited for nearly all of the step


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall", "fused"])
def test_bytes_of_the_logged_step(dispatcher: str, pool2: Any) -> None:
    (metrics, sent_0), (_, sent_1) = pool2.run(traffic, dispatcher, 2, 3, 1)
    assert len(metrics) == len(sent_0) == 3
    for logged, *both in zip(metrics, sent_0, sent_1, strict=True):
        # Each collective's own share stays here: less than all, more than none.
        assert 0.2 * sum(both) / 2 < logged["moe/dispatch_bytes"] < sum(both)
        assert logged["moe/dispatch_bytes_received"] >= logged["moe/dispatch_bytes"]
        assert 0 < logged["moe/dispatch_share"] < 1


def test_nothing_travels_with_all_experts_at_home(pool2: Any) -> None:
    (metrics, _), _ = pool2.run(traffic, "auto", 1, 2, 1)
    assert metrics
    assert not any("dispatch" in name for logged in metrics for name in logged)


class SlowlyValidated(Side):
    """Rank 0 waits for rank 1 in every batch of validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.4 * rank())
        super().validation_step(batch, batch_idx)


def with_validation(every: int) -> list[dict[str, float]]:
    memory = Memory()
    trainer = parallel(2, 2, callbacks=[ExpertLoadMonitor(prog_bar=False)], logger=memory, log_every_n_steps=1,
                       max_steps=2, accumulate_grad_batches=4, val_check_interval=every)  # fmt: skip
    trainer.fit(SlowlyValidated(), in_order(uneven(rank(), 8)), in_order(val_data(rank())))
    return [{name: value for name, value in logged.items() if "dispatch" in name} for logged in memory.metrics]


def test_a_validation_amid_a_step_is_left_out(pool2: Any) -> None:
    """After 2 and 6 of the 8 micro-batches of 2 steps, or after all."""
    (amid, _), (after, _) = pool2.run(with_validation, 2), pool2.run(with_validation, 8)
    amid, after = ([logged for logged in metrics if logged] for metrics in (amid, after))
    assert len(amid) == len(after) == 2
    for one, other in zip(amid, after, strict=True):
        for name in ("moe/dispatch_bytes", "moe/dispatch_bytes_received"):
            assert one[name] == other[name]
        assert one["moe/dispatch_seconds_slowest"] < 0.3


# ----------------------------------------------------------------------- what it costs


def test_one_reduction_a_logged_step_and_none_between(monkeypatch: pytest.MonkeyPatch) -> None:
    reduced: list[int] = []

    def counted(counts: torch.Tensor) -> torch.Tensor:
        reduced.append(trainer.global_step)
        return counts.clone()

    monkeypatch.setattr("lightning_moe.callbacks.expert_load.sum_over_ranks", counted)
    trainer = quiet(
        callbacks=[AuxLossCallback(0.0), ExpertLoadMonitor(per_layer=True)], max_steps=6, log_every_n_steps=3
    )
    trainer.fit(Side(config=WIDE), in_order(uneven(0, 6)))
    assert reduced == [3, 6]


def test_counting_waits_for_no_device() -> None:
    """Tensors on the meta device have no values: whoever asks for one raises."""
    layer = layers_of(Side())[0]
    ids_TK = torch.zeros(6, TOP_K, dtype=torch.int64, device="meta")
    logits_TE = torch.zeros(6, layer.num_experts, device="meta")
    scores_TK = torch.zeros(6, TOP_K, device="meta")
    valid = torch.ones(6, dtype=torch.bool, device="meta")
    chosen = Routing(logits_TE, logits_TE, scores_TK, ids_TK, assigned_TK=ids_TK == 0)
    decision = Decision(chosen, chosen._replace(kept_TK=ids_TK == 0), Tokens(torch.Size([6]), valid, device="meta"))
    counter = RoutingCounter(layer, torch.device("meta"))
    counter.count(counter.look(decision))
    values = read(take([counter]), [counter]).metrics()
    assert all(value.device.type == "meta" for name, value in values.items()), values

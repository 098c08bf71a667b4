"""Over what the load-balancing loss takes its shares: values and gradients, against plain loops and one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moe import AuxLossCallback
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
from tests.toy import BATCH, CONFIG, Toy, ToyData, loader

BATCHES, ACCUMULATE, STEPS = 4, 3, 4  # windows of 3, 1, 3, 1
WEIGHTS = {"load_balancing": 0.5, "router_z": 0.05, "importance": 0.25}
SCHEDULE = {"warmup_steps": 1, "decay": "linear", "decay_steps": 4}
FACTORS = [1 / 2, 1, 2 / 3, 1 / 3]  # of that schedule
SGD = {"optimizer": torch.optim.SGD, "learning_rate": 1.0}  # what the weights move by is the gradient


def trained(world: int, ep_size: int, stage: int, scope: Any, recompute: str | None) -> Any:
    from lightning_moe.testing.state import full_state

    memory = Memory()
    aux = AuxLossCallback(**WEIGHTS, scope=scope, **SCHEDULE)
    trainer = parallel(world, ep_size, stage, callbacks=[aux], max_steps=STEPS, accumulate_grad_batches=ACCUMULATE,
                       logger=memory, log_every_n_steps=1)  # fmt: skip
    # Without the task's part, so that the routers' gradients are those of the losses.
    trainer.fit(Side(task=0.0, recompute=recompute, **SGD), in_order(uneven(rank(), BATCHES)))
    state = full_state(trainer)
    return [state[f"blocks.{layer}.router.weight"] for layer in range(2)], memory.metrics


def in_loops(world: int, scope: str) -> tuple[list[Tensor], list[dict[str, float]]]:
    """The routers' weights at the end and what is logged at each step, in float64."""
    weights = [weight.requires_grad_() for weight in start_weights()]
    logged: list[dict[str, float]] = []
    counts, values = [torch.zeros(4), torch.zeros(4)], []
    objective: Any = 0
    for batch, ends in windows(BATCHES, ACCUMULATE, STEPS):
        inputs = [tokens_of(uneven(r, BATCHES), batch) for r in range(world)]
        for layer, weight_ED in enumerate(weights):
            for x_BSD in inputs:
                counts[layer] += count(x_BSD.flatten(0, 1), weight_ED)
            for x_BSD in inputs:
                found = losses(x_BSD, weight_ED, scope, counts[layer])
                values.append(torch.stack([value.detach() for value in found]))
                parts = [weight * value for weight, value in zip(WEIGHTS.values(), found, strict=True)]
                objective = objective + FACTORS[len(logged)] * sum(parts) / len(weights) / world / ACCUMULATE
        if not ends:
            continue
        for weight_ED, gradient in zip(weights, torch.autograd.grad(objective, weights), strict=True):
            weight_ED.data -= gradient
        means = torch.stack(values).mean(0).tolist()
        weighted = [weight * mean for weight, mean in zip(WEIGHTS.values(), means, strict=True)]
        logged.append({f"moe/{name}_loss": mean for name, mean in zip(WEIGHTS, means, strict=True)})
        logged[-1]["moe/aux_loss"] = FACTORS[len(logged) - 1] * sum(weighted)
        logged[-1]["moe/load_balancing_weight"] = FACTORS[len(logged) - 1] * WEIGHTS["load_balancing"]
        counts, values, objective = [torch.zeros(4), torch.zeros(4)], [], 0
    return [weight.detach() for weight in weights], logged


def count(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    count_E = torch.zeros(4)
    for x_D in x_TD:
        count_E[selected(weight_ED @ x_D, CONFIG.top_k)] += 1
    return count_E


def losses(x_BSD: Tensor, weight_ED: Tensor, scope: str, count_of_step_E: Tensor) -> list[Tensor]:
    """Load balancing, z and importance of one rank's micro-batch."""
    x_TD = x_BSD.flatten(0, 1)
    balances = []
    for group_TD in x_BSD if scope == "sequence" else [x_TD]:
        count_E = count_of_step_E if scope == "global_batch" else count(group_TD, weight_ED)
        probs_E = torch.stack([(weight_ED @ x_D).softmax(0) for x_D in group_TD]).mean(0)
        balances.append(4 * sum(count_E[e] / count_E.sum() * probs_E[e] for e in range(4)))
    z = torch.stack([torch.logsumexp(weight_ED @ x_D, 0) ** 2 for x_D in x_TD]).mean()
    importance = [torch.zeros((), dtype=torch.float64) for _ in range(4)]
    for x_D in x_TD:
        scores_E = (weight_ED @ x_D).softmax(0)
        ids = selected(scores_E, CONFIG.top_k)
        for expert in ids:
            importance[expert] = importance[expert] + scores_E[expert] / sum(scores_E[e] for e in ids)
    mean = sum(importance) / 4
    variance = sum((value - mean) ** 2 for value in importance) / 4
    return [torch.stack(balances).mean(), z, variance / mean**2]


@pytest.mark.parametrize(
    ("world", "ep_size", "stage", "scope", "recompute"),
    [
        (2, 2, 1, "micro_batch", None),
        (2, 1, 2, "sequence", "reentrant"),
        (2, 2, 0, "sequence", "non-reentrant"),
        (2, 2, 3, "sequence", None),
        (2, 2, 0, "global_batch", None),
        (2, 1, 1, "global_batch", "non-reentrant"),
        pytest.param(2, 2, 2, "global_batch", "reentrant", marks=pytest.mark.grid),
        (2, 2, 3, "global_batch", "non-reentrant"),
        (4, 2, 1, "global_batch", "reentrant"),
    ],
)
def test_values_and_gradients_are_those_of_plain_loops(
    world: int, ep_size: int, stage: int, scope: str, recompute: str | None, get_pool: Any
) -> None:
    weights, logged = in_loops(world, scope)
    results = get_pool(world).run(trained, world, ep_size, stage, scope, recompute)
    assert len(results[0][1]) == STEPS
    for step, metrics in enumerate(results[0][1]):
        assert metrics == pytest.approx(logged[step], rel=1e-5), step
    for moved, _ in results:
        for weight_ED, expected_ED in zip(moved, weights, strict=True):
            torch.testing.assert_close(weight_ED, expected_ED.float(), rtol=1e-5, atol=1e-6)


def test_the_scopes_differ() -> None:
    """Otherwise the tests of this file would show nothing."""
    values = [
        in_loops(2, scope)[1][0]["moe/load_balancing_loss"] for scope in ("micro_batch", "sequence", "global_batch")
    ]
    assert min(abs(a - b) for a, b in zip(values, values[1:] + values[:1], strict=True)) > 1e-3


# ------------------------------------------------------------------------------------- one process


def whole(trainer: Any, model: Toy, data: ToyData, world: int, of_rank: int, batch_size: int) -> None:
    trainer.fit(model, loader(data, world, of_rank, batch_size))


def in_two_ranks(stage: int, scope: Any, recompute: str | None) -> dict[str, Tensor]:
    from lightning_moe.testing.state import full_state

    aux = AuxLossCallback(0.5, 0.05, scope=scope)
    trainer = parallel(2, 2, stage, callbacks=[aux], max_steps=2, accumulate_grad_batches=3)
    whole(trainer, Toy(recompute=recompute, **SGD), ToyData(2 * BATCH * 6), 2, rank(), BATCH)
    return full_state(trainer)


@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
def test_the_same_run_as_one_process(scope: Any, get_pool: Any) -> None:
    """With the task's loss too: one process has the batches of both ranks as one."""
    model = Toy(**SGD)
    aux = AuxLossCallback(0.5, 0.05, scope=scope)
    trainer = quiet(callbacks=[aux], max_steps=2, accumulate_grad_batches=3)
    whole(trainer, model, ToyData(2 * BATCH * 6), 1, 0, 2 * BATCH)
    expected = {name: p.detach() for name, p in model.named_parameters()}
    for stage, recompute in enumerate([None, "reentrant", "non-reentrant", "reentrant"]):
        for state in get_pool(2).run(in_two_ranks, stage, scope, recompute):
            for name, weight in expected.items():
                torch.testing.assert_close(state[name], weight, rtol=1e-5, atol=1e-6, msg=f"{stage} {name}")


def test_layers_are_left_as_they_were() -> None:
    model = Toy()
    quiet(
        callbacks=[AuxLossCallback(scope="global_batch", importance=0.1)], max_steps=1, accumulate_grad_batches=2
    ).fit(model, in_order(ToyData(2 * BATCH)))
    for layer in layers_of(model):
        assert (layer.tap.scope, layer.tap.sum_over_ranks, layer.tap.in_use) == ("micro_batch", None, False)
        assert (layer.tap.importance, layer.tap.load) == (False, False)
        assert layer.tap.shares_of(torch.ones(1, 4)).sum() == 4

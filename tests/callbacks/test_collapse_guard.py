"""Collapsed routers are found in time, by all ranks at once, and nothing else is taken for one."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_moe import AuxLossCallback
from tests.callbacks.runs import Memory, Side, in_order, layers_of, parallel, quiet, rank
from tests.callbacks.steered import (
    CHECK,
    COLLAPSED,
    EVEN,
    PATIENCE,
    Heard,
    Pairs,
    Steered,
    batches,
    guard,
    guarded,
    steps_of,
    tokens,
)
from tests.toy import CONFIG, WIDTH, Toy, ToyData

# ------------------------------------------------------------------------------- caught in time


def caught_at(collapsed_from: int) -> int:
    """By hand: the first check that has seen PATIENCE steps in checks that were collapsed throughout."""
    first_whole = math.ceil((collapsed_from - 1) / CHECK) * CHECK
    return first_whole + PATIENCE


@pytest.mark.parametrize("collapsed_from", range(1, 6))
def test_warns_in_time(collapsed_from: int) -> None:
    data = [tokens(EVEN)] * (collapsed_from - 1) + [tokens(COLLAPSED)] * 20
    heard = guarded(data, guard())
    expected = caught_at(collapsed_from)
    assert expected - (collapsed_from - 1) <= PATIENCE + CHECK
    assert steps_of(heard.warned) == [expected]
    assert heard.steps == len(data)


@pytest.mark.parametrize("collapsed_from", [1, 4, 5])
def test_stops_in_time(collapsed_from: int) -> None:
    data = [tokens(EVEN)] * (collapsed_from - 1) + [tokens(COLLAPSED)] * 20
    heard = guarded(data, guard(action="stop"))
    assert heard.steps == caught_at(collapsed_from)
    assert steps_of(heard.warned) == [caught_at(collapsed_from)]
    assert "Training stops." in heard.warned[0]


@pytest.mark.parametrize("limit", ["min_steps", "min_epochs"])
def test_a_stop_that_lightning_puts_off_is_said_once(limit: str) -> None:
    data, memory = [tokens(COLLAPSED)] * 10, Memory()
    with Heard() as heard:
        least = {"min_steps": 15, "min_epochs": 1} if limit == "min_steps" else {"min_epochs": 2}
        trainer = quiet(
            callbacks=[guard(action="stop")],
            max_epochs=3,
            logger=memory,
            log_every_n_steps=5,
            use_distributed_sampler=False,
            **least,
        )
        trainer.fit(Steered(), batches(data))
    assert trainer.global_step == (15 if limit == "min_steps" else 20)
    assert steps_of(heard.warned) == [6]
    assert (
        f"Training stops, not before {'min_steps=15 and min_epochs=1' if limit == 'min_steps' else 'min_epochs=2'}."
        in heard.warned[0]
    )
    assert not heard.told
    assert memory.metrics[0] == {"moe/collapsed_layers": 0}
    assert memory.metrics[-1] == {"moe/collapsed_layers": 1}
    assert memory.metrics.count({"moe/collapsed_layers": 0}) == 1


def test_raises_the_weight_in_time_and_again() -> None:
    """What is logged and the routers' gradient change with the step after, and by the factor."""
    data = [tokens(EVEN)] * 3 + [tokens(COLLAPSED, COLLAPSED)] * 24
    memory, model, aux = Memory(), Steered(task=0.0), AuxLossCallback(0.1, warmup_steps=2)
    # The guard acts before the other callback logs: it must not show in the step that has just ended.
    with Heard() as heard:
        callbacks = [guard(action="raise_weight", factor=3.0, max_weight=2.0), aux]
        quiet(callbacks=callbacks, max_epochs=1, logger=memory, log_every_n_steps=1).fit(model, batches(data))
    assert steps_of(heard.warned) == [9, 15, 21]
    weights = [0.1] * 9 + [0.3] * 6 + [0.9] * 6 + [2.0] * 6
    for step, (logged, weight) in enumerate(zip(memory.metrics, weights, strict=True)):
        factor = min(1.0, (step + 1) / 3)
        assert logged["moe/aux_loss"] == pytest.approx(weight * factor * logged["moe/load_balancing_loss"]), step
    gradients = [value / model.router_gradients[3] for value in model.router_gradients[3:]]
    assert gradients == pytest.approx([weight / 0.1 for weight in weights[3:]], rel=1e-5)
    assert [logged["moe/load_balancing_weight"] for logged in memory.metrics] == pytest.approx(
        [weight * min(1.0, (step + 1) / 3) for step, weight in enumerate(weights)]
    )
    assert [logged["moe/collapsed_layers"] for logged in memory.metrics] == [0] * 8 + [2] * 19
    assert "(in brackets: in the last 3): 2 (0), 3 (0).\n" in heard.warned[1], "raised again: all that are low"
    assert "The load_balancing weight, before warm-up and decay, is 0.3 since step 9." in heard.warned[0]
    assert "The load_balancing weight, before warm-up and decay, is 2 since step 21, and max_weight." in heard.warned[2]


# ---------------------------------------------------------------------------------- over ranks


def on_ranks(ep_size: int, action: str, plans: list[list[tuple[Pairs, int]]], accumulate: int = 1) -> dict[str, Any]:
    """Every rank goes through its own plan of (experts, tokens) again and again; 20 steps."""
    mine = list(islice(cycle(plans[rank()]), 20 * accumulate))
    data = [tokens(pairs, count=max(count, 1)) for pairs, count in mine]
    for (x, _), (_, count) in zip(data, mine, strict=True):
        if count == 0:
            x.zero_()  # one token, which is padding
    aux, model = AuxLossCallback(0.1), Steered()
    with Heard() as heard:
        trainer = parallel(len(plans), ep_size, callbacks=[aux, guard(action=action)], max_epochs=1,
                           accumulate_grad_batches=accumulate)  # fmt: skip
        trainer.fit(model, batches(data))
    return {"warned": heard.warned, "steps": trainer.global_step, "weight": aux.peak.load_balancing}


ONLY_IN_SUM = [
    [(EVEN[:1] * 3 + [(2, 3)], 4)],  # alone, experts 2 and 3 have half of the mean load
    [(COLLAPSED, 60)],
]
NO_TOKENS = [[(COLLAPSED, 12)], [(COLLAPSED, 0)]]
EVEN_IN_SUM = [[([(0, 1)], 8)], [([(2, 3)], 8)]]


@pytest.mark.parametrize("action", ["warn", "raise_weight", "stop"])
@pytest.mark.parametrize(
    ("plans", "ep_size"), [(ONLY_IN_SUM, 2), (NO_TOKENS, 1), (NO_TOKENS, 2)], ids=["sum", "none-1", "none-2"]
)
def test_all_ranks_catch_it_at_the_same_step(action: str, plans: Any, ep_size: int, get_pool: Any) -> None:
    first, second = get_pool(2).run(on_ranks, ep_size, action, plans)
    assert steps_of(first["warned"]) == ([6, 12, 18] if action == "raise_weight" else [6])
    assert not second["warned"], "rank zero warns"
    for result in (first, second):
        assert result["steps"] == (6 if action == "stop" else 20)
        assert result["weight"] == pytest.approx(0.8 if action == "raise_weight" else 0.1)
    if plans is ONLY_IN_SUM:
        share = 1 / ((8 + 120) / 4)
        assert f"(in brackets: in the last 3): 2 ({share:.3g}), 3 ({share:.3g}).\n" in first["warned"][0]


def test_what_is_even_over_ranks_is_no_collapse(get_pool: Any) -> None:
    for result in get_pool(2).run(on_ranks, 2, "stop", EVEN_IN_SUM):
        assert result["steps"] == 20
        assert not result["warned"]


def test_accumulated_micro_batches_are_one_step(get_pool: Any) -> None:
    """The fourth micro-batch of every step of rank 1 alone keeps experts 2 and 3 alive."""
    rescued = [[(COLLAPSED, 8)], [(COLLAPSED, 8)] * 3 + [([(2, 3)], 8)]]
    first, _ = get_pool(2).run(on_ranks, 2, "stop", rescued, 4)
    assert first["steps"] == 20
    first, second = get_pool(2).run(on_ranks, 2, "stop", [[(COLLAPSED, 8)], [(COLLAPSED, 8)]], 4)
    assert first["steps"] == second["steps"] == 6


# ------------------------------------------------------------------------------- no false alarms


def test_short_dips_and_low_loads_are_no_collapse() -> None:
    dip = [tokens(EVEN)] * 4 + [tokens(COLLAPSED, COLLAPSED)] * (PATIENCE - 1)
    uneven = [tokens([(0, 1)] * 7 + [(2, 3)], EVEN)] * 15  # experts 2 and 3: a quarter of the mean
    assert not guarded(dip * 3 + [tokens(EVEN)] * 3 + uneven, guard()).warned
    assert guarded(uneven, guard(min_load=0.26)).warned
    assert not guarded(uneven, guard(min_load=0.25)).warned


@pytest.mark.parametrize("collapsed_in_training", [False, True])
def test_validation_is_not_judged(collapsed_in_training: bool) -> None:
    train, validate = (COLLAPSED, EVEN) if collapsed_in_training else (EVEN, COLLAPSED)
    heard = guarded([tokens(train)] * 12, guard(), validation=[tokens(validate, count=200)] * 2,
                    val_check_interval=2, num_sanity_val_steps=2)  # fmt: skip
    assert steps_of(heard.warned) == ([6] if collapsed_in_training else [])


@pytest.mark.parametrize("router", ["hash", "random", "expert_choice", "sinkhorn"])
def test_routers_that_balance_themselves_are_not_judged_by_load(router: str) -> None:
    """All tokens have the same id, so that a hash router has two experts only."""

    class OneId(Toy):
        def forward(self, x: Tensor) -> Tensor:
            h = self.inp(x)
            for block in self.blocks:
                h = h + block(h, token_ids=torch.zeros(x.shape[:2], dtype=torch.int64))
            return self.out(h)

    config = replace(CONFIG, router=router, capacity_factor=1.0 if router == "expert_choice" else None)
    with Heard() as heard:
        quiet(callbacks=[guard(min_load=0.9)], max_steps=12).fit(OneId(config), in_order(ToyData(48)))
    assert not heard.warned


def test_a_layer_without_tokens_stays_as_it_was() -> None:
    """In between, batches are all padding: they neither count nor are a recovery."""
    none = torch.zeros(1, 4, WIDTH), torch.zeros(1, 4, 3)
    heard = guarded([tokens(COLLAPSED)] * 3 + [none] * 6 + [tokens(COLLAPSED)] * 6, guard())
    assert steps_of(heard.warned) == [12]
    assert not heard.told


# ------------------------------------------------------------------------------------- episodes


def test_once_an_episode_and_again_for_further_experts_and_after_recovery() -> None:
    further: Pairs = [(0, 1), (0, 1), (0, 1), (0, 2)]  # expert 3 alone gets nothing
    data = [tokens(further)] * 12 + [tokens(COLLAPSED)] * 12 + [tokens(EVEN)] * 3 + [tokens(COLLAPSED)] * 9
    heard = guarded(data, guard())
    assert steps_of(heard.warned) == [6, 18, 33]
    assert "for 6 steps (in brackets: in the last 3): 3 (0).\n" in heard.warned[0]
    assert "for 6 steps (in brackets: in the last 3): 2 (0); besides 3, as said before.\n" in heard.warned[1]
    assert "for 6 steps (in brackets: in the last 3): 2 (0), 3 (0).\n" in heard.warned[2]
    assert heard.told == ["RouterCollapseGuard, step 27: recovered from collapse: layer_00 (blocks.0)."]


@pytest.mark.parametrize("patient_first", [False, True])
def test_guards_of_different_bounds_beside_each_other(patient_first: bool) -> None:
    """One only warns of what the other, which is more patient, stops. The logger is told of the first alarm."""
    memory, guards = Memory(), [guard(), guard(action="stop", patience=12)]
    with Heard() as heard:
        callbacks = guards[::-1] if patient_first else guards
        trainer = quiet(callbacks=callbacks, max_epochs=1, logger=memory, log_every_n_steps=4)
        trainer.fit(Steered(), batches([tokens(COLLAPSED)] * 20))
    assert steps_of(heard.warned) == [6, 12]
    assert trainer.global_step == 12
    assert memory.metrics == [{"moe/collapsed_layers": n} for n in (0, 1, 1)]


def test_within_another_callback() -> None:
    """That the Trainer does not know of."""

    class Around(L.Callback):
        def __init__(self, inner: L.Callback) -> None:
            for hook in ("setup", "on_fit_start", "on_train_start", "on_train_batch_end", "on_fit_end"):
                setattr(self, hook, getattr(inner, hook))

    memory = Memory()
    with Heard() as heard:
        trainer = quiet(callbacks=[Around(guard())], max_epochs=1, logger=memory, log_every_n_steps=5)
        trainer.fit(Steered(), batches([tokens(COLLAPSED)] * 10))
    assert steps_of(heard.warned) == [6]
    assert memory.metrics == [{"moe/collapsed_layers": n} for n in (0, 1)]


def test_the_loggers_are_told() -> None:
    """Of the number of layers, every log_every_n_steps and at the step that a guard stops."""
    memory = Memory()
    data = [tokens(EVEN)] * 3 + [tokens(COLLAPSED, COLLAPSED)] * 8 + [tokens(EVEN, COLLAPSED)] * 8
    guarded(data, guard(), logger=memory, log_every_n_steps=5)
    assert memory.metrics == [{"moe/collapsed_layers": n} for n in (0, 2, 1)]
    memory = Memory()
    assert guarded(data, guard(action="stop"), logger=memory, log_every_n_steps=5).steps == 9
    assert memory.metrics == [{"moe/collapsed_layers": n} for n in (0, 2)]


def test_message() -> None:
    heard = guarded([tokens(EVEN)] * 3 + [tokens(EVEN, [(3, 2)] * 31 + [(0, 1)], count=32)] * 6, guard())
    (warned,) = heard.warned
    assert warned == (
        "RouterCollapseGuard, step 9: routers have collapsed.\n"
        "  layer_01 (blocks.1): of 4 experts these have had less than min_load=0.1 of the mean load for 6 steps "
        "(in brackets: in the last 3): 0 (0.0625), 1 (0.0625).\n"
        "Nothing is done about it. What helps: larger weights of AuxLossCallback (load_balancing, router_z; of the "
        "command --aux_loss.load_balancing and so on), a lower learning rate, a checkpoint of step 3 or before; see docs/monitoring.md."
    )


def test_many_experts_are_not_all_named() -> None:
    model = Toy(replace(CONFIG, num_experts=32))
    for layer in layers_of(model):
        layer.router.weight.data[2:] = 0
        layer.router.weight.data[:2] = 1

    class Ones(ToyData):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return torch.ones(3, WIDTH), self.y[index]

    model.inp.weight.data.fill_(1.0)
    model.learning_rate = 0.0
    with Heard() as heard:
        quiet(callbacks=[guard()], max_steps=6).fit(model, in_order(Ones(32)))
    assert "of 32 experts these have" in heard.warned[0]
    assert "8 (0), 9 (0), and 22 more.\n" in heard.warned[0]


# -------------------------------------------------------------------------------------- entropy


def entropy_of(sharp: float) -> float:
    """Of the scores of a token with logits 2, 1, 0, 0 times ``sharp``, over that of even ones."""
    exps = [math.exp(sharp * logit) for logit in (2, 1, 0, 0)]
    shares = [value / sum(exps) for value in exps]
    return -sum(share * math.log(share) for share in shares) / math.log(4)


@pytest.mark.parametrize("offset", [-0.001, 0.001])
def test_entropy_is_judged(offset: float) -> None:
    """Load is even throughout, and the mean over tokens is between those of the two kinds of tokens."""
    (x, y), (sharp, _) = tokens(EVEN, count=16), tokens(EVEN, count=16, sharp=3.0)
    data = [(torch.cat([x, sharp[:, :8]], 1), torch.cat([y, y[:, :8]], 1))] * 9
    mean = (16 * entropy_of(1.0) + 8 * entropy_of(3.0)) / 24
    watch = guard(min_load=0.0, min_entropy=mean + offset)
    heard = guarded(data, watch)
    assert steps_of(heard.warned) == ([6] if offset > 0 else [])
    if heard.warned:
        said = f"router entropy {mean:.3g} in the last 3 steps, under min_entropy={mean + offset} for 6"
        assert f"layer_00 (blocks.0): {said}.\n  layer_01 (blocks.1): {said}." in heard.warned[0]


# ------------------------------------------------------------------------------ what it is good for


@pytest.mark.parametrize("action", ["warn", "raise_weight"])
def test_raised_weight_ends_a_collapse(action: str) -> None:
    """A bias towards two experts that the weight of the config is too small to take away."""
    aux = AuxLossCallback(0.001)
    watch = guard(action=action, factor=10.0, max_weight=10.0)
    model = Side(task=0.0, optimizer=torch.optim.SGD, learning_rate=0.5)
    for layer in layers_of(model):
        layer.router.weight.data *= 0.1
        layer.router.weight.data[:2, 0] += 1.0

    class Biased(ToyData):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            x, y = super().__getitem__(index)
            return torch.cat([torch.full((len(x), 1), 2.0), x[:, 1:]], 1), y

    with Heard() as heard:
        quiet(callbacks=[aux, watch], max_steps=90).fit(model, in_order(Biased(120)))
    if action == "warn":
        assert aux.peak.load_balancing == 0.001
        assert len(heard.warned) == 1
        assert not heard.told
    else:
        assert aux.peak.load_balancing > 0.5
        assert "layer_00 (blocks.0)" in " ".join(heard.told)
        assert "layer_01 (blocks.1)" in " ".join(heard.told)
        assert not watch.state_dict()["reported"][0].count(True)

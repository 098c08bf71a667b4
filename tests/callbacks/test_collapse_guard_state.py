"""A guard that is resumed goes on where it was, one of another fit begins anew, and what it cannot do is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_moe import AuxLossCallback
from lightning_moe.callbacks.collapse_guard import RouterCollapseGuard
from tests.callbacks.runs import Memory, in_order, parallel, quiet, rank
from tests.callbacks.steered import COLLAPSED, EVEN, PATIENCE, Heard, Steered, batches, guard, guarded, steps_of, tokens
from tests.strategies.test_checkpointing import Step
from tests.toy import Toy, ToyData

# ----------------------------------------------------------------------------------------- resume


def resumed(folder: str, world: int, action: str, rescued: bool) -> dict[str, Any]:
    """Checkpoints in the middle of an interval and of the patience, and after the weight was raised.

    The load of experts 2 and 3 is another in each step; ``rescued``, it is even in step 8 on the last rank.
    """
    count = 32 + 64 * (rank() if world > 1 else 0)
    data = [tokens(EVEN, count=5)] * 3 + [
        tokens(COLLAPSED * 15 + [(0, 1), (2, 3)] if step % 2 else COLLAPSED, count=count) for step in range(4, 24)
    ]
    if rescued and (world == 1 or rank() == world - 1):
        data[7] = tokens(EVEN, count=count)

    def fit(steps: int, *callbacks: L.Callback, weight: float = 0.1, **options: Any) -> dict[str, Any]:
        watch, aux, memory = guard(action=action), AuxLossCallback(weight), Memory()
        settings: dict[str, Any] = {
            "callbacks": [watch, aux, *callbacks], "max_steps": steps, "logger": memory, "log_every_n_steps": 1,
        }  # fmt: skip
        trainer = quiet(**settings) if world == 1 else parallel(world, world, **settings)
        with Heard() as heard:
            trainer.fit(Steered(), batches(data), **options)
        if callbacks:
            trainer.strategy.barrier()
        return {
            "steps": trainer.global_step,
            "warned": heard.warned,
            "state": (watch.state_dict(), aux.peak),
            "logged": [metrics["moe/aux_loss"] for metrics in memory.metrics],
        }

    path = str(Path(folder) / "step={}.ckpt")
    places = [at for at in (2, 7, 8, 9, 11) if action != "stop" or at < 10]
    return {
        "whole": fit(20, Step(lambda trainer: trainer.save_checkpoint(path.format(trainer.global_step)), *places)),
        "resumed": {at: fit(20, ckpt_path=path.format(at)) for at in places},
        "other weight": fit(20, weight=0.2, ckpt_path=path.format(9)),
    }


@pytest.mark.parametrize(
    ("world", "action", "rescued"),
    [
        pytest.param(1, "warn", False, marks=pytest.mark.grid),
        (1, "stop", True),
        pytest.param(1, "raise_weight", False, marks=pytest.mark.grid),
        (2, "raise_weight", False),
        (2, "stop", False),
        (2, "warn", True),
    ],
)
def test_resumed_run_acts_at_the_same_step(
    world: int, action: str, rescued: bool, get_pool: Any, tmp_path: Path
) -> None:
    if world == 1:
        results = [resumed(str(tmp_path), 1, action, rescued)]
    else:
        results = get_pool(world).run(resumed, str(tmp_path), world, action, rescued)
    acts = 15 if rescued else 9
    for index, result in enumerate(results):
        whole = result["whole"]
        for at, again in result["resumed"].items():
            if action == "stop" and at >= acts:
                # The run had been stopped: it has its patience again, and goes on as long as that.
                assert again["steps"] == acts + PATIENCE
                continue
            assert again["steps"] == whole["steps"] == (acts if action == "stop" else 20)
            assert again["warned"] == [text for text in whole["warned"] if steps_of([text])[0] > at]
            assert again["state"] == whole["state"]
            assert again["logged"] == whole["logged"][at:]
        if index == 0:
            assert steps_of(whole["warned"]) == ([9, 15] if action == "raise_weight" else [acts])
            assert ["(0 of it)" in text for text in whole["warned"]] == [False] * len(whole["warned"])
        if action == "raise_weight":
            assert result["other weight"]["logged"] == pytest.approx([2 * value for value in whole["logged"][9:]])


def test_another_fit_begins_anew() -> None:
    watch, aux = guard(action="raise_weight"), AuxLossCallback(0.1)
    for _ in range(2):
        heard = guarded([tokens(COLLAPSED)] * 10, watch, callbacks=[aux])
        assert steps_of(heard.warned) == [6]
        assert aux.peak.load_balancing == 0.2
    quiet(callbacks=[aux, watch], max_steps=1).fit(Steered(), batches([tokens(EVEN)]))
    assert aux.peak.load_balancing == 0.1


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_load": 1.0}, "min_load=1.0: must be from 0 to below 1, a share of the mean load. Use 0.1."),
        ({"min_load": -0.1}, "min_load=-0.1: must be from 0 to below 1, a share of the mean load. Use 0.1."),
        ({"min_load": math.nan}, "min_load=nan: must be"),
        ({"min_load": 0.0}, "min_load=0: nothing is judged without min_entropy."),
        ({"min_entropy": 0.0}, "min_entropy=0.0: must be between 0, certain, and 1, undecided."),
        ({"min_entropy": 1.0}, "min_entropy=1.0: must be between"),
        ({"check_every_n_steps": 0}, "check_every_n_steps=0: must be at least 1. Use 10."),
        ({"patience": 0}, "patience=0: must be a multiple of check_every_n_steps=10, at least one. Use 10, or"),
        ({"patience": 25}, "patience=25: must be a multiple of check_every_n_steps=10, at least one. Use 30, or"),
        ({"action": "shout"}, "action='shout': unknown. Known: warn, raise_weight, stop."),
        ({"factor": 1.0}, "factor=1.0: must be a finite number above 1. Use 2.0."),
        ({"factor": math.inf}, "factor=inf: must be"),
        ({"max_weight": 0.0}, "max_weight=0.0: must be a finite number above 0. Use 1.0."),
    ],
    ids=str,
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        RouterCollapseGuard(**options)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([], "action='raise_weight': multiplies the load_balancing weight of AuxLossCallback, and there is none. Add"),
        (
            [AuxLossCallback(0.0, 0.1)],
            "action='raise_weight': multiplies the load_balancing weight of AuxLossCallback, and its weight is 0. Add",
        ),
        (
            [AuxLossCallback(0.1), RouterCollapseGuard(0.2, action="raise_weight")],
            "action='raise_weight': another RouterCollapseGuard raises the same weight. Use action='warn' in one.",
        ),
        ([AuxLossCallback(1.0)], "max_weight=1.0: must be above load_balancing=1.0 of AuxLossCallback for"),
    ],
    ids=["no callback", "no weight", "another guard", "a weight at the maximum"],
)
def test_no_weight_to_raise(callbacks: list[L.Callback], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}"):
        quiet(callbacks=[*callbacks, guard(action="raise_weight")], max_steps=1).fit(Toy(), in_order(ToyData(4)))
    for callback in callbacks:
        if isinstance(callback, RouterCollapseGuard):
            callback.action = "warn"
    quiet(callbacks=[*callbacks, guard(min_load=0.3)], max_steps=1).fit(Toy(), in_order(ToyData(4)))


def test_a_raised_weight_stays_within_the_maximum(tmp_path: Path) -> None:
    """Also where a resumed run begins with a larger one."""
    path = str(tmp_path / "raised.ckpt")

    def fit(weight: float, steps: int, *callbacks: L.Callback, **options: Any) -> float:
        aux = AuxLossCallback(weight, warmup_steps=100)
        watch = guard(action="raise_weight", max_weight=0.05)
        trainer = quiet(callbacks=[aux, watch, *callbacks], max_steps=steps)
        trainer.fit(Steered(), batches([tokens(COLLAPSED)] * 40), **options)
        return aux.peak.load_balancing

    with Heard() as heard:
        assert fit(0.01, 30, Step(lambda trainer: trainer.save_checkpoint(path), 30)) == pytest.approx(0.05)
        assert fit(0.04, 35, ckpt_path=path) == pytest.approx(0.05)
    assert "The load_balancing weight, before warm-up and decay, is 0.02 since step 6." in heard.warned[0]

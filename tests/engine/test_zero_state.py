"""Where DeepSpeed's optimizers keep masters, on stand-ins for what a CPU cannot run, and state that is made to be filled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_moe.engine import zero_state
from lightning_moe.engine.zero_state import Master


def fused() -> tuple[Any, dict[str, nn.Parameter]]:
    """As FP16_Optimizer has it: all parameters of a group in one tensor."""
    parameters = {"a": nn.Parameter(torch.zeros(2, 3).half()), "b": nn.Parameter(torch.zeros(4).half())}
    flat = torch.arange(10.0)
    optimizer = torch.optim.AdamW([flat.requires_grad_()])
    wrapper = SimpleNamespace(
        fp32_groups_flat=[flat], fp16_groups=[list(parameters.values())], optimizer=optimizer, cur_scale=512.0,
        cur_iter=7, last_overflow_iter=3,
    )  # fmt: skip
    engine = SimpleNamespace(
        optimizer=wrapper, fp16_enabled=lambda: True, global_steps=5, global_samples=40, skipped_steps=1
    )
    return engine, parameters


def test_fused_fp16() -> None:
    engine, parameters = fused()
    masters = zero_state.masters(engine, parameters)
    flat = engine.optimizer.fp32_groups_flat[0]
    assert masters == {n: masters[n] for n in ("a", "b")}
    assert masters["a"].part_of(flat).tolist() == [0, 1, 2, 3, 4, 5]
    assert masters["b"].part_of(flat).tolist() == [6, 7, 8, 9]
    assert not masters["b"].is_partition
    zero_state.after_filling(engine)
    assert parameters["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parameters["b"].tolist() == [6, 7, 8, 9]


def test_counts_and_the_loss_scale_come_back() -> None:
    engine, _ = fused()
    state = zero_state.counters(engine)
    assert state["loss_scale"] == {"cur_scale": 512.0, "cur_iter": 7, "last_overflow_iter": 3}
    other, _ = fused()
    other.optimizer.cur_scale = other.global_steps = 0
    zero_state.set_counters(other, state)
    assert (other.optimizer.cur_scale, other.global_steps, other.skipped_steps) == (512.0, 5, 1)
    other.fp16_enabled = lambda: False  # as when an fp16 run resumes in bf16
    other.optimizer.cur_scale = 1.0
    zero_state.set_counters(other, state)
    assert other.optimizer.cur_scale == 1.0


def test_state_is_made_once_for_an_owner_with_counts_of_its_own() -> None:
    owner = torch.zeros(10, requires_grad=True)
    other = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.AdamW([owner, other])
    count = torch.tensor(3.0)
    parts = [
        (Master(owner, 0, 0, 6, True), 3.0),
        (Master(owner, 6, 0, 4, True), 5.0),
        (Master(other, 0, 0, 3, True), 3.0),
    ]
    shared = {3.0: count, 5.0: torch.tensor(5.0)}
    zero_state.make_state(optimizer, [(m, ["exp_avg", "exp_avg_sq"], {"step": shared[s]}) for m, s in parts])
    assert optimizer.state[owner]["step"] == 5.0, "that of the parameter with the most"
    assert optimizer.state[other]["step"] == 3.0
    assert optimizer.state[other]["step"] is not count
    moments = zero_state.moments(optimizer, parts[1][0])
    assert list(moments) == ["exp_avg", "exp_avg_sq"]
    parts[1][0].part_of(moments["exp_avg"]).fill_(2)
    assert optimizer.state[owner]["exp_avg"].tolist() == [0] * 6 + [2] * 4
    assert zero_state.scalars(optimizer, parts[0][0]) == {"step": torch.tensor(5.0)}


def test_a_parameter_without_dimensions() -> None:
    """Its moments have the shape of its number of steps."""
    parameter = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.tensor(0.5)
    optimizer.step()
    master = zero_state.masters(SimpleNamespace(optimizer=optimizer), {"p": parameter})["p"]
    assert list(zero_state.moments(optimizer, master)) == ["exp_avg", "exp_avg_sq"]
    assert list(zero_state.scalars(optimizer, master)) == ["step"]

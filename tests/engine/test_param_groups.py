"""Splitting the user's groups keeps every hyper-parameter, and the schedulers in step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_moe import MoE, MoEConfig
from lightning_moe.engine.param_groups import split_expert_groups


def make_name(group: str, source: str) -> str:
    return f"{group}_{source}"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), MoE(8, MoEConfig(num_experts=2, intermediate_size=8)), nn.Linear(8, 1))


def two_groups(net: nn.Module) -> torch.optim.Optimizer:
    decay = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": rest, "weight_decay": 0.0}, {"params": decay, "lr": 0.5}], lr=0.1)


def test_one_group_becomes_two() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    before = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert split_expert_groups(optimizer, [], make_name) == [0, 0]
    dense, experts = optimizer.param_groups
    assert experts["name"] == "ep_size_1_pg1"
    assert experts["moe"] is True
    assert "name" not in dense
    assert [id(p) for p in experts["params"]] == [id(net[1].experts.w1), id(net[1].experts.w2)]
    assert before == {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert experts["lr"] == 0.1
    assert experts["momentum"] == 0.9


def test_groups_keep_their_own_hyper_parameters() -> None:
    optimizer = two_groups(model())
    assert split_expert_groups(optimizer, [], make_name) == [0, 1, 1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 0.5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01, 0.01]
    assert optimizer.param_groups[2]["name"] == "ep_size_1_pg2"


def test_a_group_of_experts_only_is_named_where_it_stands() -> None:
    net = model()
    experts = list(net[1].experts.parameters())
    dense = [p for p in net.parameters() if all(p is not e for e in experts)]
    optimizer = torch.optim.SGD([{"params": dense}, {"params": experts, "lr": 0.3, "name": "mine"}], lr=0.1)
    assert split_expert_groups(optimizer, [], make_name) == [0, 1]
    assert optimizer.param_groups[1]["name"] == "ep_size_1_mine"
    assert optimizer.param_groups[1]["lr"] == 0.3


def test_two_groups_with_experts_get_different_names() -> None:
    net = model()
    groups = [{"params": [net[1].experts.w1, net[0].weight]}, {"params": [net[1].experts.w2, net[2].weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    split_expert_groups(optimizer, [], make_name)
    names = [group["name"] for group in optimizer.param_groups if "moe" in group]
    assert names == ["ep_size_1_pg1", "ep_size_1_pg2"]


def test_named_parameters_keep_their_names() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    split_expert_groups(optimizer, [], make_name)
    names = {id(p): name for name, p in net.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_a_model_without_experts_is_left_alone() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert split_expert_groups(optimizer, [], make_name) == [0]
    assert len(optimizer.param_groups) == 1


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda s: 1 / (s + 1), lambda s: 0.5**s]),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda _: 0.9, lambda _: 0.8]),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.1),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.5], total_steps=10),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, [0.1, 0.2], [0.3, 0.4], cycle_momentum=False),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[0.01, 0.02]),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5), lr_scheduler.LambdaLR(o, [lambda s: 0.9**s, lambda s: 0.8**s])]
    ),
    "warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_follow(name: str) -> None:
    """Each group of experts has at every step the rate of the group that it came from, as without the split."""
    torch.manual_seed(0)
    split, whole = two_groups(model()), two_groups(model())
    schedulers = SCHEDULERS[name](split), SCHEDULERS[name](whole)
    split_expert_groups(split, [schedulers[0]], make_name)
    for _ in range(6):
        expected = [group["lr"] for group in whole.param_groups]
        assert [group["lr"] for group in split.param_groups] == [*expected, expected[1]]
        for optimizer, scheduler in zip((split, whole), schedulers, strict=True):
            optimizer.step()
            scheduler.step(*([1.0] if name == "plateau" else []))

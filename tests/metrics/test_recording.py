"""Metrics that listen to real layers: each token once, in training and evaluation, and nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lightning_moe import MoE, MoEConfig
from lightning_moe.metrics import (
    DroppedFraction,
    ExpertAffinity,
    ExpertLoad,
    LoadImbalance,
    RoutingStability,
    recording,
)
from lightning_moe.nn import Decision
from tests.metrics.by_hand import Batch, ByHand, all_expected, all_metrics, batch_of
from tests.metrics.test_metrics import assert_all_close
from tests.toy import CONFIG, WIDTH, Toy

pytestmark = pytest.mark.filterwarnings("ignore:MoE layers are trained with no AuxLossCallback", "ignore:top_k=1")

EXPERTS = [4, 8, 5]


class Stack(nn.Module):
    """Layers of unequal sizes, one after the other."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        if "router" not in options:
            options["eval_capacity_factor"] = options.get("capacity_factor")
        configs = [MoEConfig(num_experts=e, intermediate_size=8, min_capacity=1, **options) for e in EXPERTS]
        self.blocks = nn.ModuleList(MoE(WIDTH, config) for config in configs)
        for block in self.blocks:
            nn.init.normal_(block.router.weight)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x, valid)
        return x


class Spy:
    """Keeps what a layer decided, from the router's own output."""

    def __init__(self, layer: int, seen: list[Batch]) -> None:
        self.layer, self.seen = layer, seen

    def look(self, decision: Decision) -> Batch:
        return batch_of(decision, self.layer)

    def count(self, looked: Batch) -> None:
        self.seen.append(looked)


def spied(model: Stack, x: torch.Tensor, valid: torch.Tensor | None) -> ByHand:
    seen: list[Batch] = []
    spies = [Spy(layer, seen) for layer in range(len(EXPERTS))]
    for block, spy in zip(model.blocks, spies, strict=True):
        block.tap.eval_watchers.append(spy)
    model.eval()(x, valid)
    for block, spy in zip(model.blocks, spies, strict=True):
        block.tap.eval_watchers.remove(spy)
    by_hand = ByHand(EXPERTS)
    for batch in seen:
        by_hand.add(batch)
    return by_hand


SETTINGS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "drop": {"capacity_factor": 0.75},
    "next_expert": {"capacity_factor": 1.0, "overflow": "next_expert"},
    "next_expert, full": {"capacity_factor": 0.6, "overflow": "next_expert"},
    "expert_choice": {"router": "expert_choice", "capacity_factor": 1.5},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("setting", SETTINGS)
def test_against_plain_loops(setting: str, top_k: int, padded: bool, training: bool) -> None:
    model, x = Stack(top_k=top_k, **SETTINGS[setting]), torch.randn(5, 7, WIDTH)
    valid = torch.rand(5, 7) > 0.3 if padded else None
    by_hand = spied(model, x, valid)
    tokens = x.shape[:2].numel() if valid is None else int(valid.sum())
    collection = MetricCollection(all_metrics(EXPERTS))
    with recording(model, collection):
        out = model.train(training)(x, valid)
        if training:
            out.sum().backward()
    assert_all_close(collection.compute(), all_expected(by_hand))
    if setting != "expert_choice":
        assert collection.compute()["ExpertLoad"].sum(1).tolist() == [tokens * top_k] * 3
    happens = {name for name in ("Dropped", "Rerouted") if by_hand.value(f"{name}Fraction") > 0}
    expected = {"drop": {"Dropped"}, "next_expert, full": {"Dropped", "Rerouted"}, "next_expert": {"Rerouted"}}
    if top_k < 4:  # beyond that nobody is left who has room
        assert happens >= expected.get(setting, set())
    assert bool(by_hand.value("CapacityUtilization") > 0) == (setting != "dropless")


@pytest.mark.parametrize("recompute", [None, "reentrant", "non-reentrant"])
def test_recomputation_counts_once(recompute: str | None) -> None:
    torch.manual_seed(0)
    model = Toy(replace(CONFIG, capacity_factor=0.75, min_capacity=1), recompute=recompute)
    load, affinity, dropped = ExpertLoad([4, 4]), ExpertAffinity([4, 4]), DroppedFraction([4, 4])
    with recording(model, {"load": load, "affinity": affinity, "dropped": dropped}):
        for index in range(3):
            model.loss((torch.randn(4, 3, WIDTH), torch.randn(4, 3, 3))).backward()
            assert load.compute().sum(1).tolist() == [(index + 1) * 24] * 2
        model(torch.randn(4, 3, WIDTH))  # a forward without backward
    assert load.compute().sum(1).tolist() == [72, 72]
    assert affinity.chosen_together.diagonal(dim1=1, dim2=2).equal(load.compute())
    assert dropped.num_assignments.tolist() == [72, 72]
    assert dropped.compute() > 0


def test_metrics_in_a_dictionary_are_reset_one_by_one() -> None:
    """Also those that a collection would count once for all."""
    model, load, imbalance = Stack().eval(), ExpertLoad(EXPERTS), LoadImbalance(EXPERTS)
    with recording(model, {"load": load, "imbalance": imbalance}):
        model(torch.randn(9, WIDTH))
        load.reset()
        model(torch.randn(8, WIDTH))
    assert load.compute().sum(1).tolist() == [16] * 3
    assert imbalance.tokens_per_expert.sum(1).tolist() == [34] * 3


def taps(model: nn.Module) -> list[list[Any]]:
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    return [list(w) for layer in layers for w in (layer.tap.watchers, layer.tap.eval_watchers)]


def test_taps_are_left_as_they_were() -> None:
    model, x = Stack(), torch.randn(3, WIDTH)
    other = Spy(0, [])
    model.blocks[0].tap.watchers.append(other)
    before = taps(model)
    outer, inner = ExpertLoad(EXPERTS), ExpertLoad(EXPERTS)
    model.eval()
    with recording(model, outer):
        model(x)
        between = taps(model)
        with pytest.raises(ValueError, match=r"must be hidden_size"), recording(model, inner):
            model(torch.cat([x, x], 1))
        with recording(model, inner):
            model(x)
        assert taps(model) == between
        with recording(model, outer):  # twice the same: it counts twice
            model(x)
    assert taps(model) == before
    model(x)
    assert outer.compute().sum(1).tolist() == [4 * 6] * 3
    assert inner.compute().sum(1).tolist() == [6] * 3


def test_a_probe_batch_settles_and_changes() -> None:
    model, x = Stack().eval(), torch.randn(50, WIDTH)
    stability = RoutingStability(EXPERTS, per_layer=True)
    with recording(model, stability):
        model(x)
        model(x)
        assert stability.compute().tolist() == [0, 0, 0]
        nn.init.normal_(model.blocks[2].router.weight)
        model(x)
    first, second, third = stability.compute().tolist()
    assert (first, second) == (0, 0)
    assert 0.1 < third <= 0.5  # of two comparisons the first found nothing


def test_only_what_is_asked_for_is_kept_until_backward() -> None:
    model, load = Stack(), ExpertLoad(EXPERTS)
    with recording(model, load):
        (watcher,) = model.blocks[0].tap.watchers
    assert watcher.names == ["topk_ids_TK", "assigned_TK", "valid_T"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no MoE layer"), recording(nn.Linear(2, 2), ExpertLoad(4)):
        pass
    model = Stack()
    with (
        pytest.raises(ValueError, match=r"ExpertLoad has num_experts=\[4\]: the layers of the model have \[4, 8, 5\]"),
        recording(model, ExpertLoad(4)),
    ):
        pass
    assert not any(taps(model))

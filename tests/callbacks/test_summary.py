"""The table that real runs log, read back and held against counts of our own."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_moe import AuxLossCallback, ExpertParallelStrategy, MoE
from lightning_moe.callbacks.summary import MoESummary
from lightning_moe.dispatch import DISPATCHERS
from lightning_moe.dispatch.expected import expected_bytes
from lightning_moe.nn.accounting import active_flops_per_token
from tests.callbacks.runs import in_order, layers_of, parallel, quiet, rank, uneven
from tests.callbacks.summaries import groups, heard, read, scaled
from tests.toy import BATCH, CONFIG, WIDTH, Toy, ToyData, loader


class Pyramid(Toy):
    """Layers of different sizes, shared experts in one."""

    configs = (
        replace(CONFIG, num_experts=4, top_k=1, router="random", capacity_factor=1.5),
        replace(CONFIG, num_experts=8, top_k=3, router="random", num_shared_experts=2, dispatcher="alltoall"),
    )

    def build(self) -> None:
        torch.manual_seed(0)
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.blocks.extend(MoE(WIDTH, config) for config in self.configs)
        self.out = nn.Linear(WIDTH, 3)


DENSE = (WIDTH + 1) * WIDTH + (WIDTH + 1) * 3 + 2 * 3 * 12 * WIDTH  # the Linear layers, and the shared MLP
EXPERT = 3 * 12 * WIDTH


class Watch(L.Callback):
    """What is in the taps after each batch, and the bytes that the first step really sends, by the meter."""

    def __init__(self) -> None:
        self.watching: list[int] = []
        self.sent = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.meter = layers_of(pl_module)[0].groups.meter
        self.meter.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.meter.is_on and trainer.global_step:
            self.sent = self.meter.stop().sent_bytes
        self.watching.append(sum(len(layer.tap.watchers) for layer in layers_of(pl_module)))


def of_run(world: int, ep_size: int, stage: int, accumulate: int, recompute: str | None) -> Any:
    watch = Watch()
    options: dict[str, Any] = {"max_steps": 2, "accumulate_grad_batches": accumulate}
    trainer = parallel(world, ep_size, stage, callbacks=[AuxLossCallback(), MoESummary(), watch], **options)
    model = Pyramid(recompute=recompute)
    data = ToyData(world * BATCH * accumulate * 2, length=100)
    with heard() as said:
        trainer.fit(model, loader(data, world, rank()))
        trainer.validate(model, loader(data, world, rank()), verbose=False)
        trainer.predict(model, loader(data, world, rank()))
    assert not any(layer.tap.watchers or layer.tap.observers or layer.tap.in_use for layer in layers_of(model))
    return said, watch.watching, watch.sent


@pytest.mark.parametrize(
    ("world", "ep_size", "stage", "accumulate", "recompute"),
    [
        (2, 2, 0, 1, None),
        (2, 2, 1, 2, "reentrant"),
        (2, 1, 1, 1, None),
        (4, 2, 2, 1, "non-reentrant"),
        (4, 4, 1, 1, None),
        (4, 2, 3, 2, None),
        (2, 2, 3, 1, None),
    ],
)
def test_a_run_is_told_once_and_right(
    world: int, ep_size: int, stage: int, accumulate: int, recompute: str | None, get_pool: Any
) -> None:
    results = get_pool(world).run(of_run, world, ep_size, stage, accumulate, recompute)
    assert all(not said for said, *_ in results[1:])  # ranks other than zero are silent
    (table, first_step), watching, sent = results[0]
    assert watching == [2] * (accumulate - 1) + [0] * (accumulate + 1)  # gone with the first step
    found = read(table)
    assert found.title == "MoESummary: Pyramid has 2 MoE layers."
    upper, lower = found.layers
    assert (upper["layers"], upper["module"]) == ("layer_00", "blocks.0")
    assert (lower["layers"], lower["module"]) == ("layer_01", "blocks.1")
    assert (upper["experts"], upper["on rank 0"], upper["top_k"]) == ("4", str(4 // ep_size), "1")
    assert (lower["experts"], lower["on rank 0"], lower["top_k"]) == ("8 + 2 shared", str(8 // ep_size), "3")
    assert {line["router"] for line in found.layers} == {"random"}
    assert {line["ffn size"] for line in found.layers} == {"12"}
    assert (upper["capacity"], lower["capacity"]) == ("1.5, eval none", "none")

    experts, active = (4 + 8) * EXPERT, (1 + 3) * EXPERT
    here = (4 + 8) // ep_size * EXPERT
    if stage < 3:
        assert found.parameters == {
            "all": (DENSE + experts, DENSE + active, DENSE + here),
            "routed experts": (experts, active, here),
        }
    else:  # partitioned: of experts over the ranks that hold the same, of all else over all
        whole, part = found.parameters["all"], found.parameters["routed experts"]
        assert (whole[:2], part[:2]) == ((DENSE + experts, DENSE + active), (experts, active))
        assert part[2] == experts / world
        assert 0 <= whole[2] - (DENSE + experts) / world < 10  # the first rank has the padding of no other
    biases = WIDTH + 3
    flops = 6 * (DENSE - biases + active)
    assert scaled(found.notes["compute"], "FLOPs") == pytest.approx([flops], rel=1e-3)

    if ep_size == 1:
        assert found.notes["dispatcher"] == (
            "layer_00: local (auto: expert_parallel_size 1, every rank holds all experts) "
            "layer_01: local (in place of alltoall: expert_parallel_size 1, every rank holds all experts)"
        )
        assert "send nothing" in found.notes["sent"]
        assert first_step.endswith("The MoE layers send nothing to other ranks.")
        return
    assert found.notes["dispatcher"] == (
        f"layer_00: fused (auto: expert_parallel_size {ep_size} > 1) layer_01: alltoall (as configured)"
    )
    fused, alltoall = (with_dispatcher(name, ep_size) for name in ("fused", "alltoall"))
    expected = [
        expected_bytes(fused, 1000, WIDTH, 1, torch.float32),
        expected_bytes(alltoall, 1000, WIDTH, 3, torch.float32),
    ]
    both = sum(each.forward for each in expected), sum(each.backward for each in expected)
    assert scaled(found.notes["sent"], "B") == pytest.approx(both, rel=1e-3)
    batches = "1 micro-batch" if accumulate == 1 else f"{accumulate} micro-batches"
    assert f"rank 0 had {batches} of 400 tokens." in first_step.replace("\n", " ")
    (told,) = scaled(first_step.replace("\n", " "), "B")
    if recompute is None:  # what is computed again is sent again, and not told
        assert told == pytest.approx(sent, rel=0.08)
    else:
        assert sent > told


def with_dispatcher(name: str, ep_size: int) -> Any:
    num_experts = {"fused": 4, "alltoall": 8}[name]
    return DISPATCHERS[name](num_experts, groups(ep_size), None)


def test_which_ranks_are_in_which_group(get_pool: Any) -> None:
    """Read back from running process groups."""
    told, members = zip(*get_pool(4).run(groups_of_run), strict=True)
    notes = read(told[0][0]).notes
    for name, of_rank in (("EP groups", 0), ("EDP groups", 1)):
        shown = re.findall(r"\((.*?)\)", notes[name])
        assert [tuple(map(int, group.split())) for group in shown] == sorted({ranks[of_rank] for ranks in members})
    assert notes["EP groups"].startswith("2 groups of 2 ranks")


def groups_of_run() -> Any:
    trainer = parallel(4, 2, callbacks=[AuxLossCallback(), MoESummary()], max_steps=1)
    with heard() as said:
        trainer.fit(Toy(), loader(ToyData(32), 4, rank()))
    ours = trainer.strategy.expert_groups
    return said, [tuple(torch.distributed.get_process_group_ranks(g)) for g in (ours.ep_group, ours.edp_group)]


def of_uneven_run(strategy: str) -> Any:
    strategies: dict[str, Any] = {"ddp": "ddp", "ep": ExpertParallelStrategy(2)}
    precision = "bf16-mixed" if strategy == "ep" else "32-true"
    callbacks = [AuxLossCallback(), MoESummary()]
    trainer = quiet(devices=2, strategy=strategies[strategy], callbacks=callbacks, max_steps=2, precision=precision)
    with heard() as said:
        trainer.fit(Toy(), in_order(uneven(1 - rank(), 2)))  # rank zero has the longer sequences
    return said


@pytest.mark.parametrize("strategy", ["ddp", "ep"])
def test_the_tokens_are_those_of_rank_zero(strategy: str, get_pool: Any) -> None:
    said, silent = get_pool(2).run(of_uneven_run, strategy)
    assert not silent
    notes = read(said[0]).notes
    if strategy == "ddp":
        assert notes["EP groups"] == "2 groups of 1 rank: (0) (1). Each holds all experts."
        assert notes["EDP groups"] == (
            "1 group of 2 ranks: (0 1). Its ranks hold the same experts and average their gradients."
        )
    else:
        assert "bfloat16" in notes["sent"]
    assert f"1 micro-batch of {4 * BATCH} tokens" in said[1]


def test_a_single_process(tmp_path: Path) -> None:
    """Also: once a fit, resumed or not, and never elsewhere."""
    model, data = Toy(), ToyData(4 * BATCH)
    trainer = quiet(callbacks=[AuxLossCallback(), MoESummary()], max_steps=2)
    with heard() as said:
        trainer.fit(model, in_order(data), in_order(data))
    found = read(said[0])
    assert found.title == "MoESummary: Toy has 2 MoE layers."
    assert found.layers == [
        {
            "layers": "layer_00 to layer_01",
            "module": "blocks.[0-1]",
            "router": "topk",
            "top_k": "2",
            "experts": "4",
            "on rank 0": "4",
            "ffn size": "12",
            "capacity": "none",
        }
    ]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert found.parameters["all"] == (total, total - 2 * 2 * EXPERT, total)
    assert scaled(found.notes["compute"], "FLOPs") == pytest.approx([active_flops_per_token(model)], rel=1e-3)
    assert found.notes["ranks"] == "1: it holds all experts"
    (first_step,) = said[1:]
    assert first_step == (
        "MoESummary: the first step of rank 0 had 1 micro-batch of 12 tokens. The MoE layers send nothing to other ranks."
    )
    path = tmp_path / "step=2.ckpt"
    trainer.save_checkpoint(path)
    with heard() as none:
        trainer.validate(model, in_order(data), verbose=False)
        trainer.test(model, in_order(data), verbose=False)
        trainer.predict(model, in_order(data))
    assert none == []
    resumed = quiet(callbacks=[AuxLossCallback(), MoESummary()], max_steps=4)
    with heard() as again:
        resumed.fit(Toy(), in_order(data), ckpt_path=path)
    assert again == said
    with heard() as once_more:
        resumed.fit_loop.epoch_loop.max_steps = 6
        resumed.fit(model, in_order(data))
    assert once_more == said


def test_where_nothing_of_the_layers_learns_there_is_no_first_step() -> None:
    """No backward comes to them, and nothing is left behind."""
    model = Toy()
    for layer in layers_of(model):
        layer.requires_grad_(False)
    model.inp.requires_grad_(False)
    with heard() as said:
        quiet(callbacks=[AuxLossCallback(), MoESummary()], max_steps=2).fit(model, in_order(ToyData(8)))
    assert len(said) == 1
    assert not any(layer.tap.watchers for layer in layers_of(model))


class Failing(Toy):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        raise RuntimeError("on purpose")


def test_a_run_that_fails_leaves_the_taps_clean() -> None:
    model = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        quiet(callbacks=[AuxLossCallback(), MoESummary()]).fit(model, in_order(ToyData(8)))
    assert not any(layer.tap.in_use for layer in layers_of(model))


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"MoESummary: .* has no lightning_moe.MoE layer. Build one"):
        quiet(callbacks=[MoESummary()], max_steps=1).fit(Dense(), in_order(ToyData(8)))


class Dense(Toy):
    def build(self) -> None:
        super().build()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks[0](x))

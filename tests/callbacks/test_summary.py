"""The table that is logged, read back and held against counts of our own."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_moe import AuxLossCallback, ExpertParallelStrategy, MoE, MoEConfig
from lightning_moe.callbacks._summary_text import WIDTH as COLUMNS
from lightning_moe.callbacks.summary import MoESummary, first_step_of, summary_of
from lightning_moe.dispatch import DISPATCHERS
from lightning_moe.dispatch.deep_ep import HopperDispatcher
from lightning_moe.dispatch.expected import expected_bytes
from lightning_moe.models import MoELanguageModel
from lightning_moe.nn.accounting import active_flops_per_token
from lightning_moe.parallel import ExpertGroups, building_for
from tests.callbacks.runs import in_order, layers_of, parallel, quiet, rank, uneven
from tests.toy import BATCH, CONFIG, WIDTH, Toy, ToyData, loader

LOGGER = "lightning.pytorch.utilities.rank_zero"


@contextmanager
def heard() -> Iterator[list[str]]:
    """What the summary says meanwhile, on this rank."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        said[:] = [text for text in said if text.startswith("MoESummary")]


SCALE = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}


def scaled(text: str, unit: str) -> list[float]:
    """All numbers of this unit."""
    found = re.findall(rf"([\d.e+]+) ([kMG]?){unit}\b", text)
    return [float(number) * SCALE[prefix] for number, prefix in found]


@dataclass
class Read:
    """A summary, taken apart."""

    title: str
    layers: list[dict[str, str]]
    parameters: dict[str, tuple[int, ...]]
    notes: dict[str, str]


def read(text: str) -> Read:
    assert max(map(len, text.splitlines())) <= COLUMNS
    title, table, parameters, notes = text.split("\n\n")
    header, _, *lines = table.splitlines()
    names = re.split(r"\s{2,}", header)
    starts = [header.index(name) for name in names]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    counts = [re.split(r"\s{2,}", line) for line in parameters.splitlines()[1:]]
    by_name: dict[str, str] = {}
    indent = len(re.match(r"\S+( \S+)*\s+", notes).group())  # type: ignore[union-attr]
    for line in notes.splitlines():
        name, text = line[:indent].strip(), line[indent:]
        if name:
            by_name[name] = text
        else:  # the line before goes on
            by_name[[*by_name][-1]] += f" {text}"
    return Read(
        title,
        [dict(zip(names, line, strict=True)) for line in cells],
        {name: tuple(int(n.replace(",", "")) for n in numbers) for name, *numbers in counts},
        by_name,
    )


# ---------------------------------------------------------------------------------------- real runs


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


class _Group:
    """Stands for a process group."""


def groups(ep_size: int) -> ExpertGroups:
    return ExpertGroups(ep_size, 0, _Group() if ep_size > 1 else None)  # type: ignore[arg-type]


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


# ----------------------------------------------------------------------------- what the table says


def language_model(ep_size: int = 1, world: int | None = None, sizes: Any = (), **moe: Any) -> str:
    """The summary of a model that is not trained."""
    model = MoELanguageModel(MoEConfig(**{"num_experts": 8, "intermediate_size": 64, **moe}), **dict(sizes))
    with building_for(groups(ep_size)), torch.device("meta"):
        model.configure_model()
    return summary_of(model, layers_of(model), world or ep_size)


def test_the_whole_text() -> None:
    assert language_model(2, 4) == (
        """\
MoESummary: MoELanguageModel has 2 MoE layers.

layers                module                                 router  top_k  experts  on rank 0  ffn size  capacity
------------------------------------------------------------------------------------------------------------------
layer_00 to layer_01  transformer.blocks.[0-1].feed_forward  topk    2      8        4          64        none

parameters        total  active per token  on rank 0
all             263,488           116,032    165,184
routed experts  196,608            49,152     98,304

dispatcher  fused (auto: expert_parallel_size 2 > 1)
EP groups   2 groups of 2 ranks: (0 1) (2 3). A group holds all experts once; tokens travel inside it.
EDP groups  2 groups of 2 ranks: (0 2) (1 3). Its ranks hold the same experts and average their gradients.
compute     596 kFLOPs per token in training, without attention scores
sent        With 1,000 tokens on each rank, each is expected to send 829.8 kB to others in forward and 829.7 kB in
            backward: all layers, float32, experts drawn evenly."""
    )


SIZES = {
    "large": ({"hidden_size": 256, "num_layers": 32}, {"num_experts": 64, "top_k": 8}, 8, 64),
    "pyramid": (
        {"num_layers": 8, "moe_every": 2, "experts_by_layer": [8, 8, 16, 32]},
        {"residual": True, "capacity_factor": 1.25, "eval_capacity_factor": 2.0},
        4,
        8,
    ),
    "alternating": (
        {"num_layers": 8, "experts_by_layer": [8, 16] * 4},
        {"capacity_factor": 1.25, "overflow": "next_expert", "pad_to_capacity": True, "overlap_chunks": 2},
        4,
        4,
    ),
    "irregular": ({"num_layers": 6, "experts_by_layer": [8, 8, 16, 8, 16, 8]}, {}, 2, 16),
    "deepseek": (
        {"num_layers": 27},
        {
            "num_experts": 64,
            "top_k": 6,
            "router": "group_limited",
            "num_groups": 8,
            "topk_groups": 3,
            "num_shared_experts": 2,
        },
        8,
        16,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_layers_that_are_alike_share_a_line(name: str) -> None:
    sizes, moe, ep_size, world = SIZES[name]
    found = read(language_model(ep_size, world, sizes, **moe))
    shown = [(line["layers"], line["module"].removeprefix("...").removeprefix("transformer.")) for line in found.layers]
    assert (
        shown
        == {
            "large": [("layer_00 to layer_31", "blocks.[0-31].feed_forward")],
            "pyramid": [
                ("layer_00 to layer_01", "blocks.[1,3].feed_forward"),
                ("layer_02", "blocks.5.feed_forward"),
                ("layer_03", "blocks.7.feed_forward"),
            ],
            "alternating": [
                ("layer_00, 02 ... 06", "blocks.[0,2..6].feed_forward"),
                ("layer_01, 03 ... 07", "blocks.[1,3..7].feed_forward"),
            ],
            "irregular": [
                ("layer_00 ... 05 (some)", "blocks.*.feed_forward"),
                ("layer_02, 04", "blocks.[2,4].feed_forward"),
            ],
            "deepseek": [("layer_00 to layer_26", "blocks.[0-26].feed_forward")],
        }[name]
    )
    if name == "pyramid":
        assert [line["experts"] for line in found.layers] == [f"{n} + dense MLP" for n in (8, 16, 32)]
        assert [line["on rank 0"] for line in found.layers] == ["2", "4", "8"]
        assert {line["capacity"] for line in found.layers} == {"1.25, eval 2"}
        assert found.notes["above capacity"] == "assignments of lowest score are dropped"
    if name == "alternating":
        assert found.notes["dispatcher"] == "fused (auto: expert_parallel_size 4 > 1), in 2 parts (overlap_chunks)"
        assert found.notes["above capacity"] == (
            "assignments of lowest score go to their token's next-best expert that has room; experts' rows are padded "
            "to capacity"
        )
    if name == "deepseek":
        assert found.layers[0]["experts"] == "64 + 2 shared"
        assert "and less with router='group_limited'" in found.notes["sent"]
    if name == "large":
        assert found.notes["EP groups"].startswith("8 groups of 8 ranks: (0-7) (8-15) ... (56-63).")
        assert found.notes["EDP groups"].startswith("8 groups of 8 ranks: (0 8 ... 56) (1 9 ... 57) ... (7 15 ... 63).")


@pytest.mark.parametrize(
    ("moe", "ep_size", "said"),
    [
        ({}, 2, "fused (auto: expert_parallel_size 2 > 1)"),
        ({}, 1, "local (auto: expert_parallel_size 1, every rank holds all experts)"),
        ({"dispatcher": "tune"}, 1, "local (tune: expert_parallel_size 1, every rank holds all experts)"),
        (
            {"dispatcher": "allgather", "overlap_chunks": 2},
            1,
            "local (in place of allgather: expert_parallel_size 1, every rank holds all experts)",
        ),
        ({"dispatcher": "local"}, 1, "local (as configured)"),
        ({"dispatcher": "allgather"}, 4, "allgather (as configured)"),
        (
            {"dispatcher": "alltoall", "overlap_chunks": 4, "dispatch_dtype": "bfloat16"},
            2,
            "alltoall (as configured), in 4 parts (overlap_chunks), as bfloat16 (dispatch_dtype)",
        ),
        (
            {"dispatcher": "tune"},
            2,
            "fused (tune: for now; the fastest of allgather, alltoall and fused once it has timed 4 micro-batches)",
        ),
    ],
)
def test_the_dispatcher_and_why(moe: dict[str, Any], ep_size: int, said: str) -> None:
    found = read(language_model(ep_size, **moe))
    assert found.notes["dispatcher"] == said
    assert ("bfloat16" in found.notes["sent"]) == ("dispatch_dtype" in moe)


def test_what_tune_has_chosen() -> None:
    with building_for(groups(2)):
        layer = MoE(WIDTH, replace(CONFIG, dispatcher="tune"))
    assert layer.tuner is not None
    layer.tuner.chosen = "allgather"
    found = read(summary_of(wrapped(layer), [layer], 2))
    assert found.notes["dispatcher"] == "allgather (tune: the fastest in its trials)"


def wrapped(*layers: MoE) -> L.LightningModule:
    model = L.LightningModule()
    model.layers = nn.ModuleList(layers)
    return model


def test_deep_ep_and_a_dispatcher_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(HopperDispatcher):
        """Of which nobody knows what it sends."""

    for kind, why in (
        (HopperDispatcher, "as configured, by DeepEP where it takes the tokens"),
        (Mine, "as configured"),
    ):
        name = "fused" if kind is HopperDispatcher else "mine"
        monkeypatch.setitem(DISPATCHERS, name, kind)
        with building_for(groups(2)):
            layer = MoE(WIDTH, replace(CONFIG, dispatcher=name))
        notes = read(summary_of(wrapped(layer), [layer], 2)).notes
        assert notes["dispatcher"].startswith(f"{name} ({why}")
        unknown = "is not known: the dispatcher is one of your own."
        assert notes["sent"].endswith(unknown) == (kind is Mine)
        assert first_step_of([layer], [[12]], 1).replace("\n", " ").endswith(unknown) == (kind is Mine)


def test_experts_that_choose_and_padding() -> None:
    config = replace(CONFIG, router="expert_choice", capacity_factor=1.5, pad_to_capacity=True, overlap_chunks=2)
    with building_for(groups(2)):
        layer = MoE(WIDTH, replace(config, dispatcher="alltoall"))
    found = read(summary_of(wrapped(layer), [layer], 2))
    (line,) = found.layers
    assert (line["top_k"], line["capacity"]) == ("mean 1.5", "1.5")
    assert found.notes["above capacity"] == (
        "nothing: experts choose as many tokens as they have room for; experts' rows are padded to capacity"
    )
    # 375 rows of each of 4 experts from each of 2 ranks, in two parts; a row there is D floats, a weight and an id.
    rows, row = 375 * 2, -(-(4 * WIDTH + 8) // 16) * 16
    grads = -(-(4 * WIDTH + 4) // 16) * 16
    assert scaled(found.notes["sent"], "B") == pytest.approx(
        [rows * 2 * (row + 4 * WIDTH), rows * 2 * (grads + 4 * WIDTH)], rel=1e-3
    )


def test_long_names_and_different_layers_fit() -> None:
    inner = wrapped(MoE(WIDTH, replace(CONFIG, num_shared_experts=1, capacity_factor=1.25)))
    outer = L.LightningModule()
    outer.a_rather_long_name_of_a_module_that_holds_the_encoder_of_the_whole_model_in_one_piece = inner
    outer.decoder = wrapped(MoE(WIDTH, replace(CONFIG, num_shared_experts=1, capacity_factor=1.25)))
    found = read(summary_of(outer, layers_of(outer), 1))
    assert [line["layers"] for line in found.layers] == ["layer_00 to layer_01"]
    assert found.layers[0]["module"] == "*.layers.0"
    alone = read(summary_of(outer, layers_of(outer)[:1], 1))
    assert alone.layers[0]["module"] == "...layers.0"
    single = L.LightningModule()
    name = "x" * 200
    setattr(single, name, MoE(WIDTH, CONFIG))
    found = read(summary_of(single, layers_of(single), 1))
    assert re.fullmatch(r"\.\.\.x+", found.layers[0]["module"])

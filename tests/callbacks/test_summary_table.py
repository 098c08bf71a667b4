"""What the table says of models of all kinds that are not trained."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_moe import MoE, MoEConfig
from lightning_moe.callbacks.summary import first_step_of, summary_of
from lightning_moe.dispatch import DISPATCHERS
from lightning_moe.dispatch.deep_ep import HopperDispatcher
from lightning_moe.models import MoELanguageModel
from lightning_moe.parallel import building_for
from tests.callbacks.runs import layers_of
from tests.callbacks.summaries import groups, read, scaled
from tests.toy import CONFIG, WIDTH


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

"""FLOPs per token against torch's counter of what really runs, and parameters against those that are there."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_moe import AuxLossCallback, MoE, MoEConfig
from lightning_moe.models import MoELanguageModel
from lightning_moe.nn import SharedMLP
from lightning_moe.nn.accounting import ParameterCounts, active_flops_per_token, parameter_counts
from lightning_moe.nn.router import LearnedRouter, Routing, register_router
from lightning_moe.nn.router.base import ROUTERS, best
from tests.callbacks.runs import parallel, rank
from tests.toy import CONFIG, WIDTH, Toy, ToyData, loader

T, D, F, V = 24, 8, 16, 256
DTYPE = torch.float64  # experts go by torch.mm, which the counter knows; it does not know grouped_mm
both = pytest.mark.parametrize("training", [True, False])


def counted(model: nn.Module, *inputs: Tensor, training: bool) -> int:
    """FLOPs of one forward, and of its backward in training, with attention written as products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        y = model.train(training)(*inputs)
        if training:
            (y[0] if isinstance(y, tuple) else y).sum().backward()
    return counter.get_total_flops()


def tokens(*shape: int) -> Tensor:
    """With a gradient, as behind an embedding."""
    return torch.randn(*shape, dtype=DTYPE, requires_grad=True)


# --------------------------------------------------------------------------- FLOPs of MoE layers

SETTINGS: dict[str, dict[str, Any]] = {
    "top-1 of 4": {"num_experts": 4, "top_k": 1, "normalize_topk": False},
    "top-3 of 8": {"num_experts": 8, "top_k": 3},
    "all of 4": {"num_experts": 4, "top_k": 4},
    "gelu": {"num_experts": 4, "activation": "gelu"},
    "relu": {"num_experts": 4, "activation": "relu"},
    "shared": {"num_experts": 8, "num_shared_experts": 2},
    "gated shared": {"num_experts": 8, "num_shared_experts": 1, "shared_expert_gate": True},
    "residual": {"num_experts": 8, "residual": True},
    "residual gelu": {"num_experts": 8, "residual": True, "activation": "gelu"},
    "switch": {"num_experts": 4, "router": "switch", "top_k": 1},
    "gshard": {"num_experts": 4, "router": "gshard"},
    "noisy": {"num_experts": 8, "router": "noisy_topk"},
    "group limited": {"num_experts": 8, "router": "group_limited", "num_groups": 4, "topk_groups": 2},
    "hash": {"num_experts": 8, "router": "hash", "top_k": 3},
    "expert choice": {"num_experts": 8, "router": "expert_choice", "capacity_factor": 2.0},
    "expert choice, eval": {
        "num_experts": 8,
        "router": "expert_choice",
        "capacity_factor": 2.0,
        "eval_capacity_factor": 3.0,
    },
    "expert choice of less": {"num_experts": 8, "router": "expert_choice", "capacity_factor": 1 / 3, "top_k": 9},
}


class OfTokens(nn.Module):
    """A layer that is told ids, too."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.moe = MoE(D, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x, token_ids=torch.arange(len(x)))


@both
@pytest.mark.parametrize("name", SETTINGS)
def test_a_layer_costs_what_the_counter_counts(name: str, training: bool) -> None:
    model = OfTokens(MoEConfig(intermediate_size=F, **SETTINGS[name])).to(DTYPE)
    flops = active_flops_per_token(model, training)
    assert isinstance(flops, int)
    assert flops * T == counted(model, tokens(T, D), training=training)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_experts_cost_as_much_as_a_dense_layer_of_their_width(top_k: int) -> None:
    config = MoEConfig(num_experts=6, top_k=top_k, intermediate_size=F, router="random")  # which multiplies nothing
    dense = SharedMLP(D, top_k * F, "swiglu").to(DTYPE)
    assert active_flops_per_token(MoE(D, config)) == active_flops_per_token(dense) == 6 * 3 * D * F * top_k
    assert active_flops_per_token(dense) * T == counted(dense, tokens(T, D), training=True)


def test_capacity_makes_no_difference() -> None:
    config = MoEConfig(num_experts=8, intermediate_size=F)
    dropping = replace(config, capacity_factor=0.5, min_capacity=1)
    assert active_flops_per_token(MoE(D, config)) == active_flops_per_token(MoE(D, dropping))
    assert active_flops_per_token(MoE(D, config)) * T > counted(MoE(D, dropping).to(DTYPE), tokens(T, D), training=True)


def test_a_router_of_your_own_counts_by_its_matrices() -> None:
    class Wide(LearnedRouter):
        def __init__(self, hidden_size: int, config: MoEConfig) -> None:
            super().__init__(hidden_size, config)
            self.first = nn.Linear(hidden_size, hidden_size)
            self.second_DD = nn.Parameter(torch.randn(hidden_size, hidden_size))
            self.scale_D = nn.Parameter(torch.ones(hidden_size))

        def choose(self, x_TD: Tensor, logits_TE: Tensor, tokens: Any) -> Routing:
            logits_TE = self.project(self.first(x_TD) @ self.second_DD.T * self.scale_D, self.weight)
            logits_TE = logits_TE.softmax(-1)
            ids_TK = best(logits_TE, self.config.top_k)
            return Routing(logits_TE, logits_TE, logits_TE.gather(1, ids_TK), ids_TK)

    register_router("wide")(Wide)
    try:
        config = MoEConfig(num_experts=4, intermediate_size=F, router="wide", router_dtype="float64")
        layer = MoE(D, config).to(DTYPE)
    finally:
        del ROUTERS["wide"]
    # The base class has made logits of its own before, of which nothing goes back.
    assert active_flops_per_token(layer, False) == 2 * (2 * D * D + 4 * D + 2 * 3 * D * F)
    unused = 2 * 4 * D
    assert counted(layer, tokens(T, D), training=True) == (active_flops_per_token(layer) + unused) * T


# ------------------------------------------------------------------------- FLOPs of other modules


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, T, D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@both
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(D, 3 * D), nn.GELU(), nn.Linear(3 * D, D, bias=False)), (1, T, D)),
        (lambda: nn.Sequential(nn.LayerNorm((T, D)), Scaled(), nn.Linear(D, D)), (1, T, D)),
        (lambda: nn.Conv1d(D, 2 * D, 3, padding=1), (1, D, T)),
    ],
)
def test_dense_models(make: Any, shape: tuple[int, ...], training: bool) -> None:
    model = make().to(DTYPE)
    assert active_flops_per_token(model, training) * T == counted(model, tokens(*shape), training=training)


def test_grouped_convolutions() -> None:
    """Forward only: of their backward the counter counts more than there is."""
    model = nn.Conv1d(D, 2 * D, 3, padding=1, groups=2).to(DTYPE)
    assert active_flops_per_token(model, False) * T == counted(model, tokens(1, D, T), training=False)


def test_recurrent_cells() -> None:
    """Four gates, from the input and from the state; their kernels are unknown to the counter."""
    assert active_flops_per_token(nn.LSTM(D, F, num_layers=2), False) == 2 * 4 * F * (D + F + F + F)
    assert active_flops_per_token(nn.GRUCell(D, F), False) == 2 * 3 * F * (D + F)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_attention_of_torch() -> None:
    """12 * S * hidden per token of full attention are left out."""
    model = SelfAttention().to(DTYPE)
    flops = active_flops_per_token(model) + 12 * D * T
    assert flops * 3 * T == counted(model, tokens(3, T, D), training=True)
    other = nn.MultiheadAttention(D, 2, kdim=D + 2, vdim=D + 4, add_bias_kv=True)  # biases multiply nothing
    assert active_flops_per_token(other, False) == 2 * (D * D + D * (D + 2) + D * (D + 4) + D * D)


def language_model(num_layers: int = 3, **options: Any) -> MoELanguageModel:
    moe = MoEConfig(num_experts=4, intermediate_size=F, num_shared_experts=1)
    model = MoELanguageModel(moe, V, D, num_layers, num_heads=2, **options)
    model.configure_model()
    return model.to(DTYPE)


@both
@pytest.mark.parametrize("options", [{}, {"moe_every": 3}, {"experts_by_layer": [4, 8, 16]}], ids=str)
def test_a_language_model(options: dict[str, Any], training: bool) -> None:
    """With attention by the formula of the docstring; the products of a masked score are made all the same."""
    B, S, model = 2, 12, language_model(**options)
    flops = active_flops_per_token(model, training) + (12 if training else 4) * 3 * D * S
    assert flops * B * S == counted(model, torch.randint(V, (B, S)), training=training)


class Positionwise(nn.Module):
    """Attention of every position to none but itself and those before it: no product is made for nothing."""

    def forward(self, q_SD: Tensor, k_SD: Tensor, v_SD: Tensor) -> Tensor:
        rows = []
        for i in range(len(q_SD)):
            past = slice(0, i + 1)
            rows.append((q_SD[i : i + 1] @ k_SD[past].T).softmax(-1) @ v_SD[past])
        return torch.cat(rows)


@both
def test_causal_attention_by_the_formula(training: bool) -> None:
    S = 17
    flops = counted(Positionwise(), *(tokens(S, D) for _ in "qkv"), training=training)
    assert flops == S * (6 if training else 2) * D * (S + 1)


def test_a_language_model_without_attention() -> None:
    model = language_model()
    assert model.transformer is not None
    for block in model.transformer.blocks:
        block.attention.forward = lambda x, cos, sin: x  # its projections run no more
    flops = active_flops_per_token(model) - 6 * 3 * 4 * D * D
    assert flops * 24 == counted(model, torch.randint(V, (2, 12)), training=True)


class Tied(nn.Module):
    """Embedding and head share their weight; one layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(self.embedding(ids))))


def test_tied_weights_and_layers_that_are_called_twice() -> None:
    model = Tied().to(DTYPE)
    flops = active_flops_per_token(model) + active_flops_per_token(model.layer)  # as documented: add n - 1 times
    assert flops * T == counted(model, torch.arange(T), training=True)
    assert active_flops_per_token(model) == 6 * (V * D + D * D)
    assert active_flops_per_token(nn.ModuleList([model.layer] * 3)) == 6 * D * D
    # Two modules with one weight make two products.
    pair = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)).to(DTYPE)
    pair[1].weight = pair[0].weight
    assert active_flops_per_token(pair) * T == counted(pair, tokens(T, D), training=True)


# ------------------------------------------------------------------------------------- parameters


def test_parameters_of_a_single_process() -> None:
    config = MoEConfig(num_experts=8, top_k=3, intermediate_size=F, num_shared_experts=2, activation="gelu")
    model = nn.Sequential(nn.Embedding(V, D), MoE(D, config), nn.LayerNorm(D))
    dense = V * D + 8 * D + 2 * 2 * D * F + 2 * D
    expert = 2 * D * F
    assert parameter_counts(model) == ParameterCounts(
        total=dense + 8 * expert,
        active=dense + 3 * expert,
        local=dense + 8 * expert,
        expert_total=8 * expert,
        expert_active=3 * expert,
        expert_local=8 * expert,
    )
    assert parameter_counts(model).total == sum(p.numel() for p in model.parameters())


def test_shared_parameters_count_once() -> None:
    layer = MoE(D, MoEConfig(num_experts=4, intermediate_size=F))
    twice = nn.ModuleList([layer, layer])
    assert parameter_counts(twice) == parameter_counts(layer)
    assert parameter_counts(Tied()).total == V * D + D * D + D
    assert active_flops_per_token(twice) == active_flops_per_token(layer)


def test_a_model_without_experts() -> None:
    counts = parameter_counts(nn.Linear(3, 5))
    assert asdict(counts) == {
        "total": 20,
        "active": 20,
        "local": 20,
        "expert_total": 0,
        "expert_active": 0,
        "expert_local": 0,
    }


class Look(L.Callback):
    """Counts at the start and after some steps, with what really lies on the rank."""

    def __init__(self) -> None:
        self.found: list[tuple[ParameterCounts, int, int]] = []
        self.on_rank: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(pl_module)

    def _look(self, model: L.LightningModule) -> None:
        flops = active_flops_per_token(model), active_flops_per_token(model, training=False)
        self.found.append((parameter_counts(model), *flops))
        held = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in model.parameters()]
        self.on_rank.append(sum(tensor.numel() for tensor in held))


def of_run(world: int, ep_size: int, stage: int, lazy: bool, config: MoEConfig) -> Any:
    look = Look()
    trainer = parallel(world, ep_size, stage, callbacks=[AuxLossCallback(), look], max_steps=2)
    trainer.fit(Toy(config, lazy=lazy), loader(ToyData(world * 8), world, rank()))
    return look.found, look.on_rank, trainer.strategy.expert_groups.ep_rank


@pytest.mark.parametrize(
    ("world", "ep_size", "stage", "lazy"),
    [
        pytest.param(*case, lazy, marks=[pytest.mark.grid] * ((i + lazy) % 2))  # every second by default
        for i, case in enumerate(
            [*((2, 2, stage) for stage in range(4)), (2, 1, 3), (4, 4, 3), *((4, 2, stage) for stage in (0, 3, 1, 2))]
        )
        for lazy in (False, True)
    ],
)
def test_spread_models_count_as_the_whole(world: int, ep_size: int, stage: int, lazy: bool, get_pool: Any) -> None:
    config = replace(CONFIG, num_experts=8, num_shared_experts=1, intermediate_size=11)  # partitions have padding
    whole = Toy(config)
    counts, flops = parameter_counts(whole), (active_flops_per_token(whole), active_flops_per_token(whole, False))
    results = get_pool(world).run(of_run, world, ep_size, stage, lazy, config)
    expert = 3 * WIDTH * 11 * 2  # of both layers
    for found, on_rank, _ in results:
        assert found[0] == found[1]  # also where ZeRO 3 has gathered some
        ours, *per_token = found[0]
        assert tuple(per_token) == flops
        assert replace(ours, local=0, expert_local=0) == replace(counts, local=0, expert_local=0)
        assert counts.total == sum(p.numel() for p in whole.parameters())
        assert counts.expert_total == 8 * expert
        dense = counts.total - counts.expert_total
        if stage < 3:
            assert ours.local == on_rank[0] == dense + 8 // ep_size * expert
            assert ours.expert_local == 8 // ep_size * expert
        else:  # and what is on the rank has padding
            assert 0 <= on_rank[0] - ours.local < 50
    if stage == 3:  # the parts make up the whole, once
        local = [found[0][0] for found, _, _ in results]
        assert sum(one.expert_local for one in local) == counts.expert_total
        assert sum(one.local for one in local) == counts.total

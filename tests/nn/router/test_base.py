"""Routers by name, those that users add, and what all of them share."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.config import BUILT_IN_ROUTERS
from lightning_moe.nn import ROUTERS, LearnedRouter, LossWeights, Router, Routing, Tokens, make_router, register_router
from lightning_moe.nn.router import TopKRouter
from tests.nn.router.helpers import tokens_of

WITH_BIAS = MoEConfig(4, expert_bias=True)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registrations end with the test."""
    before = dict(ROUTERS)
    yield
    ROUTERS.clear()
    ROUTERS.update(before)


def config_of(router: str) -> MoEConfig:
    top_k = 1 if router == "switch" else 2
    return MoEConfig(4, top_k=top_k, router=router, capacity_factor=2.0 if router == "expert_choice" else None)


def test_built_in_routers_are_registered() -> None:
    assert sorted(ROUTERS) == sorted(BUILT_IN_ROUTERS)
    for name in BUILT_IN_ROUTERS:
        router = make_router(5, config_of(name))
        assert type(router) is ROUTERS[name]
        assert isinstance(router, Router)
    assert type(make_router(5, MoEConfig(4))) is TopKRouter


def test_router_of_a_user_in_a_layer_that_trains() -> None:
    @register_router("mine")
    class Mine(LearnedRouter):
        """The best expert, with the weight 1 + tanh of its logit."""

        def choose(self, x_TD: Tensor, logits_TE: Tensor, tokens: Tokens) -> Routing:
            best = logits_TE.max(-1, keepdim=True)
            return Routing(logits_TE, logits_TE.softmax(-1), 1 + best.values.tanh(), best.indices)

    torch.manual_seed(0)
    layer = MoE(6, MoEConfig(4, top_k=1, intermediate_size=8, router="mine"))
    assert type(layer.router) is Mine
    layer.tap.loss_weights = LossWeights(load_balancing=0.01)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    x, target = torch.randn(5, 8, 6), torch.randn(5, 8, 6)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert layer.router.weight.grad is not None
        assert bool(layer.router.weight.grad.any())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    # And it is what the layer computes.
    rows = x.view(-1, 6)
    logits = rows @ layer.router.weight.t()
    routing = layer.router(rows, tokens_of(40))
    assert torch.equal(routing.topk_ids_TK[:, 0], logits.argmax(-1))
    assert_close(routing.topk_scores_TK[:, 0], 1 + logits.amax(-1).tanh())
    experts = [MoE(6, MoEConfig(1, top_k=1, intermediate_size=8, normalize_topk=False)) for _ in range(4)]
    expected = torch.empty_like(rows)
    for number, alone in enumerate(experts):
        with torch.no_grad():
            alone.experts.w1.copy_(layer.experts.w1[number : number + 1])
            alone.experts.w2.copy_(layer.experts.w2[number : number + 1])
        chosen = routing.topk_ids_TK[:, 0] == number
        expected[chosen] = alone.eval()(rows[chosen]) * routing.topk_scores_TK[chosen]
    assert_close(layer.eval()(x).view(-1, 6), expected, rtol=1e-5, atol=1e-6)


def test_a_function_may_make_the_router() -> None:
    @register_router("mine")
    def make(hidden_size: int, config: MoEConfig) -> Router:
        return TopKRouter(hidden_size, config)

    assert callable(make)
    assert type(make_router(5, MoEConfig(4, router="mine"))) is TopKRouter


def test_taken_name() -> None:
    message = "router='topk': this name is taken. Register yours under another."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):

        @register_router("topk")
        class Mine(LearnedRouter):
            pass

    assert ROUTERS["topk"] is TopKRouter
    # The same object once more is nothing new.
    assert register_router("topk")(TopKRouter) is TopKRouter


def test_unknown_name() -> None:
    message = (
        "router='fancy': unknown. Known: expert_choice, group_limited, gshard, hash, noisy_topk, random, sinkhorn, "
        "switch, topk. One of your own has to be registered before the model is built, by "
        "lightning_moe.nn.register_router."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_router(5, MoEConfig(4, router="fancy"))
    register_router("mine")(TopKRouter)
    with pytest.raises(ValueError, match=r"Known: .*hash, mine, noisy_topk"):
        MoE(5, MoEConfig(4, router="fancy"))


def test_no_router() -> None:
    register_router("mine")(lambda hidden_size, config: nn.Linear(hidden_size, config.num_experts))
    message = (
        "router='mine': makes a Linear, which is no lightning_moe.nn.Router. Derive it from Router or LearnedRouter."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        MoE(5, MoEConfig(4, router="mine"))


def test_a_routing_is_a_tuple_of_tensors() -> None:
    routing = make_router(5, MoEConfig(4))(torch.randn(2, 5), tokens_of(2))
    assert isinstance(routing, tuple)
    assert Routing._fields == (
        "logits_TE",
        "scores_TE",
        "topk_scores_TK",
        "topk_ids_TK",
        "kept_TK",
        "probs_TE",
        "choice_TE",
        "assigned_TK",
        "load_TE",
        "capacity",
    )
    assert routing.num_experts == 4


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BUILT_IN_ROUTERS)
def test_router_dtype(name: str, dtype: torch.dtype) -> None:
    settings = {**config_of(name).__dict__, "router_dtype": "float64"}
    router = make_router(5, MoEConfig(**settings)).to(dtype)
    x, token_ids = torch.randn(30, 5).to(dtype), torch.arange(30)
    for training in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            routing = router(x, tokens_of(30, training, token_ids=token_ids))
        for value in (routing.logits_TE, routing.scores_TE, routing.topk_scores_TK, routing.probs_TE, routing.load_TE):
            assert value is None or value.dtype == torch.float64
    if isinstance(router, LearnedRouter):
        expected = x.double() @ router.weight.double().t()
        assert_close(router(x, tokens_of(30)).logits_TE, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BUILT_IN_ROUTERS)
def test_fp32_is_what_a_router_computes_in(name: str) -> None:
    router = make_router(5, config_of(name)).bfloat16()
    tokens = tokens_of(30, training=True, token_ids=torch.arange(30))
    x = torch.randn(30, 5).bfloat16()
    routing = router(x, tokens)
    twin = make_router(5, config_of(name))
    twin.load_state_dict({key: value.float() for key, value in router.state_dict().items()})
    for value, expected in zip(routing, twin(x.float(), tokens), strict=True):
        assert (value is expected is None) or torch.equal(value, expected)
    assert {value.dtype for value in routing[:3]} == {torch.float32}


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to(torch.bfloat16),
    "to_device_and_dtype": lambda module: module.to("cpu", torch.float16),
    "to_like": lambda module: module.to(torch.empty((), dtype=torch.bfloat16)),
    "there_and_back": lambda module: module.bfloat16().float(),
    "deepcopy": copy.deepcopy,
    "deepcopy_of_half": lambda module: copy.deepcopy(module.half()),
}


@pytest.mark.parametrize("name", ["topk", "group_limited"])
@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("in_a_layer", [False, True])
def test_bias_stays_fp32(convert: str, name: str, in_a_layer: bool) -> None:
    config = MoEConfig(4, router=name, expert_bias=True, intermediate_size=4)
    module: nn.Module = MoE(5, config) if in_a_layer else make_router(5, config)
    steps = torch.tensor([0.5001, -0.3333333, 1e-6, 7.001])  # no number of 16 bits
    router_of(module).expert_bias.copy_(steps)
    converted = router_of(CONVERSIONS[convert](module))
    assert converted.expert_bias.dtype == torch.float32
    assert torch.equal(converted.expert_bias, steps)
    assert "expert_bias" in converted.state_dict()
    assert "expert_bias" not in dict(converted.named_parameters())
    assert "expert_bias" in dict(converted.named_buffers())
    assert not converted.expert_bias.requires_grad


def router_of(module: nn.Module) -> TopKRouter:
    router = module.router if isinstance(module, MoE) else module
    assert isinstance(router, TopKRouter)
    return router


def test_bias_moves_with_the_module() -> None:
    router = TopKRouter(5, WITH_BIAS)
    assert router.expert_bias is not None
    on_meta = copy.deepcopy(router).to("meta")
    assert on_meta.expert_bias is not None
    assert on_meta.expert_bias.is_meta
    both = copy.deepcopy(router).to("meta", torch.bfloat16)
    assert both.expert_bias is not None
    assert (both.expert_bias.is_meta, both.expert_bias.dtype) == (True, torch.float32)
    assert both.weight.dtype == torch.bfloat16
    with torch.device("meta"):
        built = TopKRouter(5, WITH_BIAS).bfloat16()
    empty = built.to_empty(device="cpu")
    assert empty.expert_bias is not None
    assert (empty.expert_bias.device.type, empty.expert_bias.dtype) == ("cpu", torch.float32)
    router.expert_bias.copy_(torch.tensor([0.5001, -0.3, 0.0, 2.0]))
    empty.load_state_dict(router.state_dict())
    assert torch.equal(empty.expert_bias, router.expert_bias)


def test_bias_is_in_the_checkpoint_unrounded() -> None:
    router = TopKRouter(5, WITH_BIAS).bfloat16()
    assert router.expert_bias is not None
    router.expert_bias.copy_(torch.tensor([0.5001, -0.3333333, 1e-6, 7.001]))
    twin = TopKRouter(5, WITH_BIAS).bfloat16()
    assert twin.load_state_dict(router.state_dict()).missing_keys == []
    assert torch.equal(twin.expert_bias, router.expert_bias)


def test_bias_under_another_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = TopKRouter(5, WITH_BIAS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert router.expert_bias is not None
    assert router.expert_bias.dtype == torch.float32


@pytest.mark.parametrize("name", BUILT_IN_ROUTERS)
def test_no_bias_unless_asked_for(name: str) -> None:
    has_bias = "expert_bias" in make_router(5, config_of(name)).state_dict()
    assert has_bias == (name == "group_limited")  # whose own it is


def test_not_even_logits_of_a_router_without_bias() -> None:
    router = make_router(5, MoEConfig(4, router="group_limited", expert_bias=False))
    assert router.expert_bias is None
    assert set(router.state_dict()) == {"weight"}
    assert router.bfloat16().expert_bias is None


@pytest.mark.parametrize("config", [MoEConfig(4, router="noisy_topk"), MoEConfig(4, expert_bias=True)])
def test_from_meta_by_reset_parameters(config: MoEConfig) -> None:
    """As FSDP materialises a module."""
    with torch.device("meta"):
        router = make_router(8, config)
    router.to_empty(device="cpu")
    for tensor in (*router.parameters(), *router.buffers()):
        torch.nn.init.constant_(tensor, 7.0)
    router.reset_parameters()  # type: ignore[operator]
    assert not any(bool((tensor == 7).any()) for tensor in (*router.parameters(), *router.buffers()))

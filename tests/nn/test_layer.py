"""The layer against the reference in plain loops and float64, and its manners in a model."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace
from functools import partial
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.config import Activation
from lightning_moe.dispatch.local import LocalDispatcher
from lightning_moe.nn import LossWeights
from lightning_moe.nn.layer import _warn_without_losses
from lightning_moe.parallel import ExpertGroups, building_for
from lightning_moe.testing.reference import ReferenceMoE

pytestmark = pytest.mark.filterwarnings("ignore:MoE layers are trained with no AuxLossCallback")

D = 8
CONFIG = MoEConfig(num_experts=4, top_k=2, intermediate_size=12)

NO_LOSSES = (
    "MoE layers are trained with no AuxLossCallback, so that most tokens may end up at a few experts. "
    "Add lightning_moe.AuxLossCallback(load_balancing=0.01) to the Trainer's callbacks; "
    "AuxLossCallback(load_balancing=0) trains without the loss on purpose."
)
TOP_1 = (
    "top_k=1: router={!r} divides the one weight by itself, so that it learns from auxiliary losses only. Use {} to "
    "let it learn from the task."
)
UNLESS_TOP_1 = {
    **dict.fromkeys(("topk", "group_limited", "sinkhorn"), "normalize_topk=False, or router='switch',"),
    "noisy_topk": "top_k=2",
}


def make(config: MoEConfig = CONFIG, width: int = D) -> MoE:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moe = MoE(width, config)
    nn.init.normal_(cast(Tensor, moe.router.weight))  # far apart, so that fp32 and float64 choose the same
    moe.tap.loss_weights = LossWeights()
    return moe


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu"},
        {"activation": "relu"},
        {"top_k": 1, "normalize_topk": False},
        {"top_k": 1},
        {"top_k": 4},
        {"normalize_topk": False},
        {"num_experts": 16, "top_k": 3},
        {"intermediate_size": None},
        {"intermediate_size": 7},
        {"capacity_factor": 1.25},
        {"capacity_factor": 0.5, "min_capacity": 1},
        {"capacity_factor": 0.5, "min_capacity": 1, "top_k": 1, "normalize_topk": False},
        {"num_shared_experts": 1},
        {"num_shared_experts": 2, "activation": "gelu", "capacity_factor": 0.7, "min_capacity": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_as_the_reference_in_float64(changes: dict[str, Any], training: bool) -> None:
    config = replace(CONFIG, **changes)
    moe = make(config).train(training)
    reference = ReferenceMoE(moe).train(training)
    x = torch.randn(3, 5, D, requires_grad=True)
    upstream = torch.randn(3, 5, D)
    y = moe(x)
    y.backward(upstream)

    x64 = x.detach().double().requires_grad_()
    y64 = reference(x64.view(1, 15, D)).view_as(x64)
    y64.backward(upstream.double())
    assert_close(y.double(), y64, rtol=1e-6, atol=1e-6)
    assert x.grad is not None
    assert_close(x.grad.double(), x64.grad, rtol=1e-6, atol=1e-6)
    expected = dict(reference.named_parameters())
    assert {name for name, _ in moe.named_parameters()} == expected.keys()
    for name, parameter in moe.named_parameters():
        grad, by_loops = parameter.grad, expected[name].grad
        assert grad is not None, name
        if by_loops is None:  # the loops never touched the router: every weight is 1
            by_loops = torch.zeros_like(expected[name])
        assert_close(grad.double(), by_loops, rtol=1e-6, atol=1e-6, msg=partial("{}: {}".format, name))
    assert bool(reference.num_dropped) == (training and (config.capacity_factor or 9) < 1)


def test_eval_capacity_is_its_own() -> None:
    x = torch.randn(40, D)
    config = replace(CONFIG, capacity_factor=0.5, eval_capacity_factor=None, min_capacity=1)
    dropless = make()(x)
    moe = make(config)
    assert not torch.equal(moe(x), dropless)
    assert torch.equal(moe.eval()(x), dropless)

    other = make(replace(config, capacity_factor=None, eval_capacity_factor=0.5))
    assert torch.equal(other(x), dropless)
    assert torch.equal(other.eval()(x), moe.train()(x))


def test_capacity_drops_whole_tokens_to_zero() -> None:
    moe = make(replace(CONFIG, top_k=1, normalize_topk=False, capacity_factor=0.1, min_capacity=1))
    y = moe(torch.randn(40, D))
    served = int(y.any(-1).sum())
    assert 0 < served <= 4  # four experts, one row each


@pytest.mark.parametrize("shape", [(D,), (1, D), (3, D), (2, 3, D), (2, 0, D), (0, D), (1, 2, 3, 4, D)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("capacity", [None, 1.25])
def test_shape_and_dtype_stay(shape: tuple[int, ...], dtype: torch.dtype, capacity: float | None) -> None:
    moe = make(replace(CONFIG, capacity_factor=capacity, num_shared_experts=1)).to(dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = moe(x)
    assert y.shape == x.shape
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in moe.parameters())


def test_strides_do_not_matter() -> None:
    moe = make()
    x = torch.randn(D, 3, 5).permute(1, 2, 0)
    assert not x.is_contiguous()
    assert_close(moe(x), moe(x.contiguous()), rtol=1e-6, atol=1e-6)


def test_tokens_do_not_see_each_other_when_dropless() -> None:
    moe = make()
    x = torch.randn(10, D)
    shuffled = torch.randperm(10)
    assert_close(moe(x)[shuffled], moe(x[shuffled]), rtol=1e-6, atol=1e-6)
    assert_close(moe(x)[:4], moe(x[:4]), rtol=1e-6, atol=1e-6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.moe, self.out = nn.Linear(D, D), make(), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        return self.out(x + self.moe(x))


def test_torch_compile_gives_the_same() -> None:
    torch.manual_seed(0)
    model = Block()
    twin = copy.deepcopy(model)
    observed: list[int] = []
    twin.moe.tap.loss_weights = model.moe.tap.loss_weights = LossWeights(0.5, 0.25)
    twin.moe.tap.observers.append(lambda stats: observed.append(int(stats.tokens_per_expert_E.sum())))
    compiled = torch.compile(twin, backend="eager")
    try:
        for num_tokens in (6, 9):  # the second is traced anew, with a dynamic size
            x = torch.randn(num_tokens, D)
            expected, ours = model(x), compiled(x)
            assert torch.equal(ours, expected)
            expected.square().mean().backward()
            ours.square().mean().backward()
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert a.grad is not None, name
            assert b.grad is not None, name
            assert torch.equal(a.grad, b.grad), name
        assert observed == [12, 18]
    finally:
        torch._dynamo.reset()


def test_state_dict_round_trip() -> None:
    config = replace(CONFIG, num_shared_experts=1)
    moe = make(config)
    assert list(moe.state_dict()) == [
        "router.weight",
        "experts.w1",
        "experts.w2",
        "shared_mlp.up.weight",
        "shared_mlp.down.weight",
    ]
    torch.manual_seed(99)
    other = MoE(D, config)
    x = torch.randn(5, D)
    assert not torch.equal(other(x), moe(x))
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(x), moe(x))


def test_copies_and_pickles_are_independent(tmp_path: Any) -> None:
    moe = make()
    x = torch.randn(5, D)
    expected = moe(x)
    twin = copy.deepcopy(moe)
    torch.save(moe, tmp_path / "moe.pt")
    loaded = torch.load(tmp_path / "moe.pt", weights_only=False)
    with torch.no_grad():
        moe.experts.w1.zero_()
    assert torch.equal(twin(x), expected)
    assert torch.equal(loaded(x), expected)
    twin.tap.observers.append(lambda stats: None)
    assert not moe.tap.observers


def caught(action: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        action()
    return [str(warning.message) for warning in found]


def test_training_without_losses_warns_once_over_layers_and_steps() -> None:
    _warn_without_losses.cache_clear()  # another test of this process may have been warned
    layers = [make() for _ in range(3)]
    for moe in layers:
        moe.tap.loss_weights = None

    def train() -> None:
        for _ in range(4):
            x = torch.randn(5, D)
            for moe in layers:
                x = moe(x)
            x.sum().backward()

    assert caught(train) == [NO_LOSSES]


def test_no_warning_where_there_is_nothing_to_warn_of() -> None:
    moe = make()
    x = torch.randn(5, D)
    assert caught(lambda: moe(x)) == []  # weights of 0 are somebody's decision
    moe.tap.loss_weights = None
    assert caught(lambda: moe.eval()(x)) == []
    moe.train()
    with torch.no_grad():
        assert caught(lambda: moe(x)) == []
    moe.requires_grad_(False)
    assert caught(lambda: moe(x)) == []


@pytest.mark.parametrize("router", UNLESS_TOP_1)
def test_a_weight_that_is_always_1_warns(router: str) -> None:
    top_1 = replace(CONFIG, top_k=1, router=router)
    assert caught(lambda: MoE(D, top_1)) == [TOP_1.format(router, UNLESS_TOP_1[router])]
    assert caught(lambda: MoE(D, replace(top_1, top_k=2))) == []
    assert caught(lambda: MoE(D, replace(top_1, num_experts=1))) == []
    without = caught(lambda: MoE(D, replace(top_1, normalize_topk=False)))
    assert len(without) == (router == "noisy_topk")  # whose softmax over the selected divides by the sum


@pytest.mark.parametrize("router", ["switch", "hash", "random", "expert_choice"])
def test_top_1_is_all_right_elsewhere(router: str) -> None:
    assert caught(lambda: MoE(D, replace(CONFIG, top_k=1, router=router, capacity_factor=1.0))) == []


@pytest.mark.parametrize("router", UNLESS_TOP_1)
def test_a_weight_that_is_always_1_gives_the_router_no_gradient(router: str) -> None:
    """What the warning says is true."""
    moe = make(replace(CONFIG, top_k=1, router=router))
    moe(torch.randn(5, D)).square().sum().backward()
    assert_close(cast(Tensor, moe.router.weight).grad, torch.zeros(4, D), rtol=0, atol=1e-6)
    other = make(replace(CONFIG, top_k=1, router="switch"))
    other(torch.randn(5, D)).square().sum().backward()
    assert float(cast(Tensor, other.router.weight.grad).abs().max()) > 1e-3


@pytest.mark.parametrize("hidden_size", [0, -8])
def test_a_wrong_width_is_refused(hidden_size: int) -> None:
    message = f"hidden_size={hidden_size}: must be at least 1. Use the width of the model."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MoE(hidden_size, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dispatcher": "fancy"},
            (
                "dispatcher='fancy': unknown. Known: allgather, alltoall, auto, fused, local, tune. One of your own has to "
                "be in lightning_moe.dispatch.DISPATCHERS before the model is built."
            ),
        ),
        (
            {"router": "fancy"},
            (
                "router='fancy': unknown. Known: expert_choice, group_limited, gshard, hash, noisy_topk, random, "
                "sinkhorn, switch, topk. One of your own has to be registered before the model is built, by "
                "lightning_moe.nn.register_router."
            ),
        ),
    ],
)
def test_unknown_names_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MoE(D, replace(CONFIG, **changes))


@pytest.mark.parametrize("activation", get_args(Activation))
def test_default_width_of_experts(activation: Activation) -> None:
    moe = make(replace(CONFIG, intermediate_size=None, activation=activation, num_shared_experts=3))
    assert moe.experts.w2.shape == (4, D, 4 * D)
    assert moe.experts.w1.shape == (4, (2 if activation == "swiglu" else 1) * 4 * D, D)
    assert moe.shared_mlp is not None
    assert moe.shared_mlp.down.weight.shape == (D, 12 * D)


def fake_groups(ep_size: int, ep_rank: int = 0) -> ExpertGroups:
    return ExpertGroups(ep_size, ep_rank, ep_group=cast(Any, object()))


def test_sharded_later_is_built_sharded() -> None:
    groups = fake_groups(2, 1)
    later = make()
    later.shard_(groups)
    with building_for(groups):
        at_once = make()
    assert (later.num_local_experts, at_once.num_local_experts) == (2, 2)
    for (name, a), (other, b) in zip(later.named_parameters(), at_once.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
        assert vars(a) == vars(b), name
    assert type(later.dispatcher) is type(at_once.dispatcher)
    assert type(later.dispatcher) is not LocalDispatcher
    assert later.groups is at_once.groups is groups


def test_sharding_again_binds_only() -> None:
    with building_for(fake_groups(2, 1)):
        moe = make()
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    again = fake_groups(2, 1)
    moe.shard_(again)
    assert moe.groups is again
    assert moe.dispatcher.groups is again
    assert all(torch.equal(value, before[name]) for name, value in moe.state_dict().items())


def test_sharding_for_another_size_is_refused() -> None:
    with building_for(fake_groups(2)):
        moe = make()
    message = (
        "expert_parallel_size=4: this layer was built for 2, and every layer of a model uses the same. "
        "Build the model anew for the new size."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moe.shard_(fake_groups(4))


def test_repr() -> None:
    assert repr(make(replace(CONFIG, num_shared_experts=1))) == (
        "MoE(\n"
        "  router=topk, top_k=2, dispatcher=LocalDispatcher\n"
        "  (router): TopKRouter()\n"
        "  (experts): GroupedExperts(experts 0-3 of 4, activation=swiglu)\n"
        "  (shared_mlp): SharedMLP(\n"
        "    (up): Linear(in_features=8, out_features=24, bias=False)\n"
        "    (down): Linear(in_features=12, out_features=8, bias=False)\n"
        "  )\n"
        ")"
    )

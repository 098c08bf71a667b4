"""From the router's choice to rows of the experts: capacity, overflow, fixed shapes, and what may change."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.dispatch import FixedShape
from lightning_moe.dispatch.permute import plan_permutation
from lightning_moe.nn import LossWeights, Routing, RoutingStats, expert_capacity
from lightning_moe.nn.layer import _warn_of_looking_ahead

D, E = 8, 4
CONFIG = MoEConfig(num_experts=E, top_k=2, intermediate_size=12, min_capacity=1)
ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {},
    "unnormalized": {"normalize_topk": False, "route_scale": 2.5},
    "after": {"score_before_topk": False},
    "sigmoid": {"score_function": "sigmoid", "expert_bias": True},
    "group_limited": {"router": "group_limited", "num_groups": 2},
    "switch": {"router": "switch", "top_k": 1, "jitter": None},
    "gshard": {"router": "gshard"},
    "noisy_topk": {"router": "noisy_topk"},
    "sinkhorn": {"router": "sinkhorn"},
    "hash": {"router": "hash"},
    "random": {"router": "random"},
}
routers = pytest.mark.parametrize("changes", ROUTERS.values(), ids=ROUTERS.keys())


def make(changes: dict[str, Any]) -> MoE:
    torch.manual_seed(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moe = MoE(D, replace(CONFIG, **changes))
    for parameter in moe.router.parameters():
        nn.init.normal_(parameter)
    moe.tap.loss_weights = LossWeights()
    return moe


def watch(moe: MoE) -> tuple[list[Tensor], list[tuple[Routing, Routing, FixedShape | None]]]:
    """The rows of every local expert, and what was chosen and what was placed, of every forward to come."""
    rows: list[Tensor] = []
    placed: list[tuple[Routing, Routing, FixedShape | None]] = []
    moe.experts.register_forward_pre_hook(lambda _, args: rows.append(args[2].rows_E.clone()))
    chosen: list[Routing] = []
    moe.router.register_forward_hook(lambda _, __, routing: chosen.append(routing))
    plan, dispatch = moe.dispatcher.plan, moe.dispatcher.dispatch

    def planned(ids: Tensor, kept: Tensor | None, shape: FixedShape | None, num_chunks: int) -> Any:
        placed.append((chosen[-1], chosen[-1]._replace(topk_ids_TK=ids, kept_TK=kept), shape))
        return plan(ids, kept, shape, num_chunks)

    def dispatched(x: Tensor, scores: Tensor, routes: Any) -> Any:
        before, routing, shape = placed.pop()
        placed.append((before, routing._replace(topk_scores_TK=scores), shape))
        return dispatch(x, scores, routes)

    moe.dispatcher.plan, moe.dispatcher.dispatch = planned, dispatched  # type: ignore[method-assign]
    return rows, placed


def of_every_expert(moe: MoE, x_TD: Tensor) -> Tensor:
    """Every expert's output for every token, [E, T, D]."""
    one = x_TD.new_ones(len(x_TD), 1)
    plans = [plan_permutation(torch.full(one.shape, expert), E) for expert in range(E)]
    return torch.stack([moe.experts(x_TD, one, plan) for plan in plans])


def ids_for(x: Tensor) -> Tensor:
    return torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % 5


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, Any], int, int, bool]:
    """Changes of the config, the number of tokens, a seed, and whether some are padding."""
    changes = {
        **draw(st.sampled_from(list(ROUTERS.values()))),
        "capacity_factor": draw(st.sampled_from([0.1, 0.5, 0.9, 1.0, 1.3, 3.0])),
        "overflow": draw(st.sampled_from(["drop", "next_expert"])),
        "drop_priority": draw(st.sampled_from(["score", "position", "random"])),
        "pad_to_capacity": draw(st.booleans()),
        "min_capacity": draw(st.sampled_from([1, 1, 3])),
    }
    return changes, draw(st.integers(0, 17)), draw(st.integers(0, 2**31)), draw(st.booleans())


@given(batches())
@settings(max_examples=120, deadline=None)
def test_nothing_gets_lost_through_the_whole_layer(case: tuple[dict[str, Any], int, int, bool]) -> None:
    changes, num_tokens, seed, has_padding = case
    moe = make(changes)
    config = moe.config
    rows, placed = watch(moe)
    seen: list[RoutingStats] = []
    moe.tap.observers.append(seen.append)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, D, generator=generator, requires_grad=True)
    valid = torch.rand(num_tokens, generator=generator) < 0.7 if has_padding else None
    y = moe(x, valid, token_ids=ids_for(x))
    y.sum().backward()

    (stats,), ((chosen, routing, shape),), (rows_E,) = seen, placed, rows
    num_valid = num_tokens if valid is None else int(valid.sum())
    capacity = int(expert_capacity(num_valid, E, config.top_k, config.capacity_factor or 0, config.min_capacity))
    kept_TK = cast(Tensor, routing.kept_TK)
    is_moved_TK = routing.topk_ids_TK != chosen.topk_ids_TK
    assert bool(kept_TK[is_moved_TK].all())
    kept, rerouted = int((kept_TK & ~is_moved_TK).sum()), int(stats.num_rerouted)
    assert rerouted == int(is_moved_TK.sum())
    assert kept + rerouted + int(stats.num_dropped) == num_valid * config.top_k
    assert int(stats.tokens_per_expert_E.sum()) == num_valid * config.top_k  # what was chosen, not what was kept
    used_E = torch.bincount(routing.topk_ids_TK[kept_TK], minlength=E)
    assert int(used_E.max()) <= capacity
    if config.overflow == "drop":
        assert rerouted == 0
        asked_E = torch.bincount(chosen.topk_ids_TK[slice(None) if valid is None else valid].flatten(), minlength=E)
        assert torch.equal(used_E, asked_E.clamp(max=capacity))
        assert torch.equal(stats.tokens_per_expert_E, asked_E)

    if config.pad_to_capacity:
        of_all = int(expert_capacity(num_tokens, E, config.top_k, config.capacity_factor or 0, config.min_capacity))
        assert shape == FixedShape(num_tokens, of_all)
        assert rows_E.tolist() == [of_all] * E
    else:
        assert shape is None
        assert torch.equal(rows_E, used_E)

    weights_TE = torch.zeros(num_tokens, E)
    weights_TE.scatter_add_(1, routing.topk_ids_TK, (routing.topk_scores_TK * kept_TK).detach().float())
    expected = torch.einsum("te,etd->td", weights_TE, of_every_expert(moe, x))
    assert_close(y, expected, rtol=1e-6, atol=1e-6)


@routers
def test_moved_assignments_are_weighed_by_the_new_experts(changes: dict[str, Any]) -> None:
    """As if the router had chosen them itself: normalized over them, and with their gradient."""
    moe = make({**changes, "capacity_factor": 1.0, "overflow": "next_expert"})
    _, placed = watch(moe)
    x = torch.randn(20, D)
    moe(x, token_ids=ids_for(x))
    ((chosen, routing, _),) = placed
    config, new_TK = moe.config, routing.topk_ids_TK
    moved_T = (new_TK != chosen.topk_ids_TK).any(1)
    assert moved_T.any()
    if config.router in ("hash", "random"):
        assert bool((routing.topk_scores_TK == 0.5).all())
        return
    logits_TK = chosen.logits_TE.gather(1, new_TK)
    if config.router == "switch":
        expected = chosen.logits_TE.softmax(-1).gather(1, new_TK)
    elif config.router == "noisy_topk":
        expected = cast(Tensor, chosen.choice_TE).gather(1, new_TK).softmax(-1)  # the noisy logits (eq. 3)
    elif config.router == "gshard":
        expected = logits_TK.softmax(-1)
    elif config.score_function == "sigmoid":
        expected = logits_TK.sigmoid() / logits_TK.sigmoid().sum(1, keepdim=True)
    elif config.score_before_topk and not config.normalize_topk:
        expected = chosen.logits_TE.softmax(-1).gather(1, new_TK)
    else:
        expected = logits_TK.softmax(-1)
    assert_close(routing.topk_scores_TK, expected * config.route_scale, rtol=1e-6, atol=1e-6)
    assert routing.topk_scores_TK.requires_grad


@routers
def test_next_expert_without_overflow_is_drop_without_overflow(changes: dict[str, Any]) -> None:
    x = torch.randn(9, D)
    outputs = []
    for others in ({}, {"capacity_factor": 4.0}, {"capacity_factor": 4.0, "overflow": "next_expert"}):
        moe = make({**changes, **others})
        torch.manual_seed(3)
        outputs.append(moe(x, token_ids=ids_for(x)))
    assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-6)
    assert_close(outputs[2], outputs[0], rtol=1e-6, atol=1e-6)


@routers
@pytest.mark.parametrize("overflow", ["drop", "next_expert"])
def test_fixed_shapes_change_no_number(changes: dict[str, Any], overflow: str) -> None:
    found = []
    x, upstream = torch.randn(3, 5, D), torch.randn(3, 5, D)
    for pad in (False, True):
        moe = make({**changes, "capacity_factor": 0.8, "overflow": overflow, "pad_to_capacity": pad})
        rows, _ = watch(moe)
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = moe(leaf, token_ids=ids_for(x))
        y.backward(upstream)
        found.append([y, leaf.grad, *(p.grad for p in moe.parameters())])
        assert (rows[0].tolist() == [round(0.8 * 15 * moe.config.top_k / E)] * E) or not pad
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_fixed_shapes_do_not_depend_on_the_data() -> None:
    for changes in ({}, {"router": "expert_choice"}):
        moe = make({**changes, "capacity_factor": 1.5, "pad_to_capacity": True})
        rows, _ = watch(moe)
        for scale in (0.0, 1.0, 100.0):
            moe(scale * torch.randn(2, 5, D))
        moe(torch.randn(2, 5, D), valid=torch.arange(10).view(2, 5) < 3)
        expected = 4 if changes else 8  # expert choice: 1.5 experts per token, not 1.5 times 2
        assert [r.tolist() for r in rows] == [[expected] * E] * 4


def test_eval_has_its_own_shape() -> None:
    moe = make({"capacity_factor": 1.0, "eval_capacity_factor": 2.0, "pad_to_capacity": True})
    rows, placed = watch(moe)
    x = torch.randn(8, D)
    moe(x)
    moe.eval()(x)
    moe.reconfigure(eval_capacity_factor=None)
    moe(x)
    assert [r.tolist() for r in rows[:2]] == [[4] * E, [8] * E]
    assert int(rows[2].sum()) == 16
    assert [shape for _, _, shape in placed] == [FixedShape(8, 4), FixedShape(8, 8), None]


def test_who_stays_by_drop_priority() -> None:
    """Twelve tokens want one expert, which takes three; the last of them most."""
    x = torch.linspace(1, 2, 12).unsqueeze(1) * torch.ones(D)
    kept: dict[str, list[int]] = {}
    for priority in ("score", "position", "random"):
        moe = make({"router": "switch", "top_k": 1, "capacity_factor": 1.0, "drop_priority": priority})
        with torch.no_grad():
            cast(Tensor, moe.router.weight).zero_()[2] = 0.1
        kept[priority] = moe(x).any(-1).nonzero().flatten().tolist()
    assert kept["score"] == [9, 10, 11]
    assert kept["position"] == [0, 1, 2]
    assert len(kept["random"]) == 3
    frequency = torch.zeros(12)
    for _ in range(600):
        frequency += moe(x).any(-1)  # the random one
    # 600 passes, each token in a quarter of them: standard deviation sqrt(600 * 3/16) = 10.6
    assert float((frequency - 150).abs().max()) < 4 * 10.6


def test_all_experts_are_a_dense_sum() -> None:
    moe = make({"top_k": E, "router_dtype": "float64"}).double()
    x = torch.randn(11, D, dtype=torch.float64, requires_grad=True)
    weights = (x @ cast(Tensor, moe.router.weight).T).softmax(-1)
    expected = torch.einsum("te,etd->td", weights, of_every_expert(moe, x))
    ours = moe(x)
    assert_close(ours, expected, rtol=1e-6, atol=1e-7)  # weights travel in fp32
    upstream = torch.randn(11, D, dtype=torch.float64)
    leaves = [x, *moe.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (ours, expected)), strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_router_dtype(dtype: torch.dtype) -> None:
    """A difference of 1e-9 decides in float64 and drowns in fp32, where the lower id wins."""
    for name, expected in (("float32", 0), ("float64", 3)):
        moe = make({"top_k": 1, "normalize_topk": False, "router_dtype": name}).to(dtype)
        with torch.no_grad():
            weight = cast(Tensor, moe.router.weight).zero_()
            weight[:, 0] = 1.0
            weight[3, 1] = 2.0**-30
        _, placed = watch(moe)
        y = moe(torch.ones(5, D, dtype=dtype))
        assert y.dtype == dtype
        ((chosen, _, _),) = placed
        assert chosen.logits_TE.dtype == chosen.scores_TE.dtype == getattr(torch, name)
        assert chosen.topk_ids_TK.flatten().tolist() == [expected] * 5
        y.sum().backward()
        assert moe.router.weight.grad is not None
        assert cast(Tensor, moe.router.weight.grad).dtype == dtype


@pytest.mark.parametrize(
    "changes", [{"router": "gshard"}, {"router": "noisy_topk"}, {"jitter": 0.3}, {"router": "random"}]
)
def test_noise_is_new_in_training_and_none_in_evaluation(changes: dict[str, Any]) -> None:
    moe, x = make(changes), torch.randn(30, D)
    first = moe(x)
    assert not torch.equal(moe(x), first)
    moe.eval()
    state = torch.get_rng_state()
    still = moe(x)
    assert torch.equal(moe(x), still)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(moe(x), still)
    if changes.get("router") != "random":  # without noise all three are topk
        assert_close(still, make({}).eval()(x), rtol=1e-6, atol=1e-6)


# What may change while the layer runs.


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ({}, {"top_k": 3}),
        ({}, {"top_k": 1}),
        ({}, {"capacity_factor": 0.5, "eval_capacity_factor": 0.7}),
        ({"capacity_factor": 0.5}, {"capacity_factor": None}),
        ({"router": "expert_choice", "capacity_factor": 1.0}, {"capacity_factor": 2.0}),
        ({"router": "noisy_topk"}, {"top_k": 3}),
        ({"router": "hash"}, {"top_k": 4, "capacity_factor": 0.5}),
        ({"router": "group_limited", "num_groups": 2}, {"top_k": 1}),
    ],
    ids=str,
)
def test_reconfigured_is_as_built_that_way(before: dict[str, Any], changes: dict[str, Any]) -> None:
    moe, built, x = make(before), make({**before, **changes}), torch.randn(20, D)
    built.load_state_dict(moe.state_dict())
    unchanged = moe(x, token_ids=ids_for(x))
    moe.reconfigure(**changes)
    assert moe.config is moe.router.config
    assert moe.config == built.config
    for training in (True, False):
        outputs = []
        for layer in (moe, built):
            torch.manual_seed(2)
            outputs.append(layer.train(training)(x, token_ids=ids_for(x)))
        assert torch.equal(*outputs)
    assert not torch.equal(moe.train()(x, token_ids=ids_for(x)), unchanged)


def test_the_rest_cannot_change() -> None:
    moe = make({"capacity_factor": 1.0})
    config = moe.config
    for name in set(vars(config)) - {"top_k", "capacity_factor", "eval_capacity_factor"}:
        message = (
            f"{name}: cannot change while the layer exists. Use top_k, capacity_factor and eval_capacity_factor, or "
            "build the layer anew."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            moe.reconfigure(**{"top_k": 1, name: getattr(config, name)})
    for changes, start in (({"top_k": 5}, "top_k=5: must be from 1"), ({"capacity_factor": 0}, "capacity_factor=0: ")):
        with pytest.raises(ValueError, match=f"^{re.escape(start)}"):
            moe.reconfigure(**changes)
    assert moe.config is moe.router.config is config


# Looking ahead.


def messages(action: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in found]


def test_a_causal_model_is_warned_once_of_experts_that_look_ahead() -> None:
    _warn_of_looking_ahead.cache_clear()  # another test of this process may have been warned
    by_experts = replace(CONFIG, router="expert_choice", capacity_factor=1.0)
    assert messages(lambda: MoE(D, by_experts)) == []
    assert messages(lambda: [MoE(D, by_experts, causal=True) for _ in range(3)]) == [
        (
            "router='expert_choice': the experts choose among all tokens of a batch, later ones included, so that a "
            "causal model sees its future: its loss is too good, and generation will not be as good as it. Use "
            "router='topk' for a model that is to generate."
        )
    ]
    for changes in ROUTERS.values():
        assert messages(partial(MoE, D, replace(CONFIG, **changes), causal=True)) == []


def test_what_the_warning_says_is_true() -> None:
    x = torch.randn(1, 12, D)
    later = torch.cat([x[:, :6], torch.randn(1, 6, D)], dim=1)
    by_experts, by_tokens = make({"router": "expert_choice", "capacity_factor": 1.0}), make({})
    assert not torch.equal(by_experts(x)[:, :6], by_experts(later)[:, :6])
    assert_close(by_tokens(x)[:, :6], by_tokens(later)[:, :6], rtol=1e-6, atol=1e-6)

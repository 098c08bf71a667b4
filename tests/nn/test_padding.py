"""Padding: the layer does with a masked batch what it does with its tokens alone."""

from __future__ import annotations

import re
import warnings
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.nn import LossWeights, RoutingStats

D, B, S, E = 8, 3, 7, 4

ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {},
    "sigmoid": {"score_function": "sigmoid", "expert_bias": True, "route_scale": 2.0},
    "after": {"score_before_topk": False},
    "group_limited": {"router": "group_limited", "num_groups": 2, "topk_groups": 1},
    "switch": {"router": "switch", "top_k": 1, "jitter": 0},
    "sinkhorn": {"router": "sinkhorn", "sinkhorn_tolerance": 1e-6},
    "hash": {"router": "hash"},
}
WITHOUT_NOISE_IN_EVAL: dict[str, dict[str, Any]] = {
    "jitter": {"jitter": 0.3},
    "gshard": {"router": "gshard"},
    "noisy_topk": {"router": "noisy_topk"},
}
PLACINGS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "drop": {"capacity_factor": 0.6},
    "position": {"capacity_factor": 0.6, "drop_priority": "position"},
    "next": {"capacity_factor": 0.6, "overflow": "next_expert"},
    "next by position": {"capacity_factor": 1.0, "overflow": "next_expert", "drop_priority": "position"},
    "padded": {"capacity_factor": 0.6, "pad_to_capacity": True},
    "padded next": {"capacity_factor": 0.8, "pad_to_capacity": True, "overflow": "next_expert"},
}
CHOSEN_BY_EXPERTS: dict[str, dict[str, Any]] = {
    "expert_choice": {"router": "expert_choice", "capacity_factor": 1.5},
    "expert_choice padded": {"router": "expert_choice", "capacity_factor": 1.5, "pad_to_capacity": True},
}
CASES = {
    **{f"{r}, {p}": {**ROUTERS[r], **PLACINGS[p]} for r in ROUTERS for p in PLACINGS},
    **CHOSEN_BY_EXPERTS,
}
EVAL_CASES = {
    f"{r}, {p}": {**WITHOUT_NOISE_IN_EVAL[r], **PLACINGS[p]}
    for r in WITHOUT_NOISE_IN_EVAL
    for p in ("dropless", "drop", "padded next")
}


def make(changes: dict[str, Any]) -> MoE:
    torch.manual_seed(6)
    if "capacity_factor" in changes:
        changes = {"eval_capacity_factor": changes["capacity_factor"], **changes}
    moe = MoE(D, MoEConfig(**{"num_experts": E, "intermediate_size": 12, "min_capacity": 1, **changes}))
    for parameter in moe.router.parameters():
        nn.init.normal_(parameter)
    if moe.config.expert_bias:
        cast(Tensor, moe.router.expert_bias).copy_(torch.linspace(-0.1, 0.1, E))
    moe.tap.loss_weights = LossWeights(0.5, 0.1, 0.2, 0.2)
    return moe


def masks() -> dict[str, Tensor]:
    at_the_end = torch.arange(S) < torch.tensor([[7], [3], [5]])
    scattered = torch.rand(B, S, generator=torch.Generator().manual_seed(4)) < 0.6
    one_sequence = torch.tensor([[False], [True], [False]]).expand(B, S)
    return {"at the end": at_the_end, "scattered": scattered, "one sequence": one_sequence}


def run(moe: MoE, x: Tensor, upstream: Tensor, **others: Any) -> dict[str, Tensor]:
    moe.zero_grad()
    seen: list[RoutingStats] = []
    moe.tap.observers = [seen.append]
    x = x.clone().requires_grad_()
    y = moe(x, **others)
    y.backward(upstream)
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in moe.named_parameters() if p.grad is not None}}
    if moe.training:
        (stats,) = seen
        found |= {name: value for name, value in vars(stats).items() if value is not None}
    return found


def assert_as_alone(moe: MoE, valid: Tensor) -> None:
    x, upstream = torch.randn(B, S, D), torch.randn(B, S, D)
    ids = torch.randint(50, (B, S))
    alone = run(moe, x[valid], upstream[valid], token_ids=ids[valid])
    for padding in (x, x.masked_fill(~valid.unsqueeze(-1), 1e3)):  # what stands there does not matter
        masked = run(moe, padding, upstream, valid=valid, token_ids=ids)
        assert masked.keys() == alone.keys()
        for name in ("y", "x"):
            value = masked.pop(name)
            assert_close(value[valid], alone[name], rtol=1e-6, atol=1e-6, msg=partial("{}: {}".format, name))
            assert not value[~valid].any(), name
        for name, value in masked.items():
            assert_close(value, alone[name], rtol=1e-6, atol=1e-6, msg=partial("{}: {}".format, name))
    assert alone["y"].any()
    # It is no property of all masks: the same layer without one gives those tokens something else, if they compete.
    if moe.config.capacity_factor is not None:
        assert not torch.equal(run(moe, x, upstream, token_ids=ids)["x"][valid], alone["x"])


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_as_the_tokens_alone_in_training(changes: dict[str, Any], mask: str) -> None:
    assert_as_alone(make(changes), masks()[mask])


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("changes", EVAL_CASES.values(), ids=EVAL_CASES.keys())
def test_as_the_tokens_alone_in_evaluation(changes: dict[str, Any], mask: str) -> None:
    assert_as_alone(make(changes).eval(), masks()[mask])


EVERY = {
    **{name: {**changes, **PLACINGS["padded next"]} for name, changes in (ROUTERS | WITHOUT_NOISE_IN_EVAL).items()},
    "random drop": {"capacity_factor": 0.5, "drop_priority": "random"},
    "random": {"router": "random", "capacity_factor": 0.5, "drop_priority": "random", "overflow": "next_expert"},
    **CHOSEN_BY_EXPERTS,
}
every = pytest.mark.parametrize("changes", EVERY.values(), ids=EVERY.keys())


@every
def test_nothing_but_padding(changes: dict[str, Any]) -> None:
    moe = make(changes)
    valid, ids = torch.zeros(B, S, dtype=torch.bool), torch.zeros(B, S, dtype=torch.long)
    found = run(moe, torch.randn(B, S, D), torch.randn(B, S, D), valid=valid, token_ids=ids)
    for name, value in found.items():
        assert not value.any(), name


@every
def test_padding_is_zero_also_where_there_is_noise(changes: dict[str, Any]) -> None:
    moe, valid = make(changes), masks()["scattered"]
    ids = torch.randint(50, (B, S))
    found = run(moe, torch.randn(B, S, D), torch.randn(B, S, D), valid=valid, token_ids=ids)
    assert not found["y"][~valid].any()
    assert not found["x"][~valid].any()
    if not moe.router.fits_capacity:
        assert int(found["tokens_per_expert_E"].sum()) == int(valid.sum()) * moe.config.top_k


@every
def test_a_mask_that_hides_nothing_changes_nothing(changes: dict[str, Any]) -> None:
    moe = make(changes)
    x, upstream, ids = torch.randn(B, S, D), torch.randn(B, S, D), torch.randint(50, (B, S))
    torch.manual_seed(9)
    without = run(moe, x, upstream, token_ids=ids)
    torch.manual_seed(9)
    masked = run(moe, x, upstream, token_ids=ids, valid=torch.ones(B, S, dtype=torch.bool))
    for name, value in without.items():
        assert_close(masked[name], value, rtol=1e-6, atol=1e-6, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("changes", [{"num_shared_experts": 1, "shared_expert_gate": True}, {"residual": True}])
def test_what_stands_beside_the_experts_does_not_see_padding(changes: dict[str, Any]) -> None:
    moe, valid = make(changes), masks()["scattered"]
    x = torch.randn(B, S, D)
    x[~valid] = torch.nan
    y = moe(x, valid=valid)
    assert not y[~valid].any()
    assert_close(y[valid], moe(x[valid]), rtol=1e-6, atol=1e-6)
    y.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in moe.parameters())


@pytest.mark.parametrize("name", ["valid", "token_ids"])
@pytest.mark.parametrize("shape", [(B * S,), (S, B), (B, S, 1), (B, S, D), (1, S), ()])
def test_other_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    message = (
        f"{name} has shape {list(shape)}: must be [3, 7], that of x without its last dimension. Give one value per "
        "token."
    )
    wrong: dict[str, Any] = {name: torch.ones(shape, dtype=torch.bool)}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make({})(torch.randn(B, S, D), **wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8], ids=str)
def test_a_mask_of_numbers_is_refused(dtype: torch.dtype) -> None:
    message = f"valid has dtype {dtype}: must be torch.bool, True for a token. Use mask.bool()."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make({})(torch.randn(B, S, D), torch.ones(B, S, dtype=dtype))


@pytest.mark.parametrize("shape", [(B, S, D + 1), (D, 1), (B, D, S)])
def test_another_width_is_refused(shape: tuple[int, ...]) -> None:
    message = (
        f"x has shape {list(shape)}: its last dimension must be hidden_size=8. Build the layer for the width of the "
        "model."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make({})(torch.randn(shape))


def test_hash_needs_ids() -> None:
    message = (
        "token_ids=None: router='hash' goes by the ids of the tokens. Call the layer as moe(x, token_ids=ids), or use "
        "router='random'."
    )
    moe = make({"router": "hash"})
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moe(torch.randn(B, S, D), torch.ones(B, S, dtype=torch.bool))
    ids = torch.arange(B * S).view(B, S) % 5
    x = torch.randn(1, 1, D).expand(B, S, D)
    y = moe(x, token_ids=ids)
    for token in range(5):  # the same id, the same experts
        assert bool((y[ids == token] == y[ids == token][0]).all())
    assert len({tuple(row) for row in y.flatten(0, 1).tolist()}) > 1


def test_others_take_ids_and_leave_them() -> None:
    moe, x = make({}), torch.randn(B, S, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(moe(x, token_ids=torch.randint(5, (B, S))), moe(x))

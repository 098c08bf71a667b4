"""The losses enter the gradient once, and each token is counted once, whatever happens to forward."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_moe import MoE, MoEConfig
from lightning_moe.nn import Decision, LossWeights, RoutingStats, Tokens
from lightning_moe.nn.placing import place
from lightning_moe.testing.reference import ReferenceMoE

pytestmark = pytest.mark.filterwarnings("ignore:MoE layers are trained with no AuxLossCallback")

D, T = 8, 11
CONFIG = MoEConfig(num_experts=4, top_k=2, intermediate_size=12)
WEIGHTS = LossWeights(0.3, 0.07)


def make(config: MoEConfig = CONFIG) -> MoE:
    torch.manual_seed(4)
    moe = MoE(D, config)
    torch.nn.init.normal_(cast(Tensor, moe.router.weight))
    moe.tap.loss_weights = WEIGHTS
    return moe


def run(moe: MoE, x: Tensor, recompute: str | None) -> Tensor:
    if recompute is None:
        return moe(x)
    return cast(Tensor, checkpoint(moe, x, use_reentrant=recompute == "reentrant"))


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.double() for name, p in module.named_parameters() if p.grad is not None}


recomputes = pytest.mark.parametrize("recompute", [None, "reentrant", "non-reentrant"])


@recomputes
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("capacity", [None, 0.5])
def test_gradient_is_that_of_the_objective_by_hand(
    recompute: str | None, micro_batches: int, capacity: float | None
) -> None:
    moe = make(replace(CONFIG, capacity_factor=capacity, min_capacity=1))
    reference = ReferenceMoE(moe)
    inputs = [torch.randn(T, D, requires_grad=True) for _ in range(micro_batches)]
    moe.tap.loss_gradient = 1 / micro_batches  # as the callback sets it under accumulation
    for x in inputs:
        (run(moe, x, recompute).square().sum() / micro_batches).backward()
    for x in inputs:
        x64 = x.detach().double().requires_grad_()
        objective = reference(x64[None]).square().sum()
        objective = objective + WEIGHTS[0] * reference.losses["load_balancing"]
        objective = objective + WEIGHTS[1] * reference.losses["router_z"]
        (objective / micro_batches).backward()
        assert x.grad is not None
        assert_close(x.grad.double(), x64.grad, rtol=1e-6, atol=1e-6)
    expected = gradients(reference)
    ours = gradients(moe)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(ours[name], value, rtol=1e-6, atol=1e-6, msg=partial("{}: {}".format, name))


def test_the_losses_matter_to_the_gradient_above() -> None:
    """Each of the two weights moves the router's gradient by far more than the tolerance."""
    x = torch.randn(T, D)
    grads = []
    for weights in (LossWeights(), LossWeights(WEIGHTS[0]), LossWeights(router_z=WEIGHTS[1])):
        moe = make()
        moe.tap.loss_weights = weights
        moe(x).square().sum().backward()
        grads.append(gradients(moe)["router.weight"])
    assert all(float((a - b).abs().max()) > 1e-3 for i, a in enumerate(grads) for b in grads[:i])


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0)], ids=["float", "tensor"])
def test_loss_scale_scales_the_losses_too(scale: Any) -> None:
    x = torch.randn(T, D)
    plain, scaled = make(), make()
    plain(x).square().sum().backward()
    scaled.tap.loss_gradient = scale
    (scaled(x).square().sum() * 1024).backward()
    for name, value in gradients(plain).items():
        assert_close(gradients(scaled)[name], 1024 * value, rtol=1e-6, atol=1e-6)


def test_values_stay_as_they_are() -> None:
    x = torch.randn(T, D)
    tapped, untapped = make(), make()
    untapped.tap.loss_weights = None
    assert not untapped.tap.in_use
    assert torch.equal(tapped(x), untapped(x))
    y = torch.randn(T, D, requires_grad=True)
    assert torch.equal(tap(tapped, x, y), y)


def tap(moe: MoE, x: Tensor, y: Tensor) -> Tensor:
    tokens = Tokens(x.shape[:-1], training=True)
    chosen = moe.router(x, tokens)
    placed, _ = place(chosen, tokens, moe.router, moe.dispatcher)
    return moe.tap.prepare(Decision(chosen, placed, tokens))(y)


def test_unused_it_returns_what_it_got() -> None:
    moe = make()
    moe.tap.loss_weights = None
    x, y = torch.randn(T, D), torch.randn(T, D, requires_grad=True)
    assert tap(moe, x, y) is y
    moe.tap.observers.append(lambda stats: None)
    assert moe.tap.in_use
    assert tap(moe, x, y) is not y
    without_graph = y.detach()
    assert tap(moe, x, without_graph) is without_graph


@recomputes
@pytest.mark.parametrize("loss_weights", [None, WEIGHTS])
def test_observers_see_every_micro_batch_once(recompute: str | None, loss_weights: LossWeights | None) -> None:
    moe = make()
    moe.tap.loss_weights = loss_weights
    seen: list[RoutingStats] = []
    second: list[RoutingStats] = []
    moe.tap.observers += [seen.append, second.append]
    sizes = [T, 3, 7]
    for i, size in enumerate(sizes):
        y = run(moe, torch.randn(size, D, requires_grad=True), recompute)
        assert len(seen) == i  # in backward, not in forward
        y.sum().backward()
        assert len(seen) == i + 1
    assert [int(stats.tokens_per_expert_E.sum()) for stats in seen] == [size * CONFIG.top_k for size in sizes]
    assert all(a is b for a, b in zip(seen, second, strict=True))


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode", "frozen"])
def test_nobody_is_called_where_nothing_is_trained(how: str) -> None:
    moe = make()
    seen: list[RoutingStats] = []
    moe.tap.observers.append(seen.append)
    x = torch.randn(T, D, requires_grad=how == "eval")
    if how == "eval":
        moe.eval()
        moe(x).sum().backward()  # as a saliency map does
    elif how == "no_grad":
        with torch.no_grad():
            moe(x)
    elif how == "inference_mode":
        with torch.inference_mode():
            moe(x)
    else:
        moe.requires_grad_(False)
        assert not moe(x).requires_grad
    assert seen == []
    # And the next training step is counted as ever.
    moe.requires_grad_().train()
    moe(x).sum().backward()
    assert [int(stats.tokens_per_expert_E.sum()) for stats in seen] == [T * CONFIG.top_k]


def test_no_loss_enters_in_eval() -> None:
    x = torch.randn(T, D)
    grads = []
    for weights in (WEIGHTS, None):
        moe = make().eval()
        moe.tap.loss_weights = weights
        moe(x).sum().backward()
        grads.append(gradients(moe)["router.weight"])
    assert torch.equal(*grads)


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_statistics_are_those_of_the_reference(capacity: float | None) -> None:
    moe = make(replace(CONFIG, capacity_factor=capacity, min_capacity=1))
    reference = ReferenceMoE(moe)
    seen: list[RoutingStats] = []
    moe.tap.observers.append(seen.append)
    x = torch.randn(T, D)
    moe(x).sum().backward()
    reference(x.double()[None])
    (stats,) = seen
    losses = reference.losses
    assert_close(stats.load_balancing_loss.double(), losses["load_balancing"], rtol=1e-6, atol=1e-6)
    assert_close(stats.router_z_loss.double(), losses["router_z"], rtol=1e-6, atol=1e-6)
    assert stats.tokens_per_expert_E.tolist() == reference.tokens_per_expert_E.tolist()
    assert int(stats.num_dropped) == reference.num_dropped
    assert (reference.num_dropped > 0) == (capacity is not None)
    values = (stats.load_balancing_loss, stats.router_z_loss, stats.tokens_per_expert_E, stats.num_dropped)
    assert not any(value.requires_grad for value in values)


def test_bf16_layers_get_the_fp32_losses_gradient() -> None:
    """The aux gradient of a bf16 layer is that of its rounded inputs and weights in fp32."""
    moe = make().bfloat16()
    full = make()
    full.load_state_dict({name: value.float() for name, value in moe.state_dict().items()})
    x = torch.randn(T, D).bfloat16()
    grads = []
    for layer, tokens in ((moe, x), (full, x.float())):
        with_losses = layer(tokens)
        with_losses.backward(torch.zeros_like(with_losses))  # nothing but the losses
        grads.append(gradients(layer)["router.weight"])
    assert float(grads[1].abs().max()) > 1e-3
    assert torch.equal(grads[0], grads[1].bfloat16().double())


def test_no_tokens_are_observed_too() -> None:
    moe = make()
    seen: list[RoutingStats] = []
    moe.tap.observers.append(seen.append)
    moe(torch.zeros(0, D)).sum().backward()
    (stats,) = seen
    assert stats.tokens_per_expert_E.tolist() == [0, 0, 0, 0]
    assert (stats.load_balancing_loss.item(), stats.router_z_loss.item()) == (0.0, 0.0)
    assert all(not grad.any() for grad in gradients(moe).values())
    assert gradients(moe).keys() == {name for name, _ in moe.named_parameters()}

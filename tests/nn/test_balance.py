"""The auxiliary losses against the papers' equations in plain loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe.nn import load_balancing_loss, router_z_loss


def looped_balance(scores: list[list[float]], ids: list[list[int]]) -> float:
    num_tokens, num_experts = len(scores), len(scores[0])
    flat = [expert for row in ids for expert in row]
    total = 0.0
    for expert in range(num_experts):
        f = sum(chosen == expert for chosen in flat) / len(flat)
        p = sum(row[expert] for row in scores) / num_tokens
        total += f * p
    return num_experts * total


def looped_z(logits: list[list[float]]) -> float:
    return sum(math.log(sum(math.exp(logit) for logit in row)) ** 2 for row in logits) / len(logits)


def routed(num_tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 logits and scores, and ids."""
    logits = 2 * torch.randn(num_tokens, num_experts)
    return logits, logits.softmax(-1), logits.argsort(-1, descending=True)[:, :top_k].contiguous()


SHAPES = [(1, 4, 1), (1, 4, 4), (17, 8, 2), (40, 3, 1), (64, 16, 3)]


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SHAPES)
def test_load_balancing_as_by_plain_loops(num_tokens: int, num_experts: int, top_k: int) -> None:
    _, scores, ids = routed(num_tokens, num_experts, top_k)
    expected = looped_balance(scores.double().tolist(), ids.tolist())
    loss = load_balancing_loss(scores, ids)
    assert loss.dtype == torch.float32
    assert_close(loss.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SHAPES)
def test_z_loss_as_by_plain_loops(num_tokens: int, num_experts: int, top_k: int) -> None:
    logits, _, _ = routed(num_tokens, num_experts, top_k)
    loss = router_z_loss(logits)
    assert loss.dtype == torch.float32
    expected = torch.tensor(looped_z(logits.double().tolist()), dtype=torch.float64)
    assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_one_when_uniform_whatever_top_k(top_k: int) -> None:
    scores = torch.full((12, 4), 0.25)
    ids = torch.stack([(torch.arange(12) + k) % 4 for k in range(top_k)], dim=1)
    assert load_balancing_loss(scores, ids).item() == 1.0


@pytest.mark.parametrize("num_experts", [2, 8])
def test_as_many_as_experts_when_one_gets_everything(num_experts: int) -> None:
    scores = torch.zeros(5, num_experts)
    scores[:, 1] = 1.0
    assert load_balancing_loss(scores, torch.ones(5, 1, dtype=torch.long)).item() == num_experts


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert_close(router_z_loss(logits).item(), (math.log(2) ** 2 + math.log(4) ** 2) / 2, rtol=1e-6, atol=0)


def test_the_share_carries_no_gradient() -> None:
    _, scores, ids = routed(10, 4, 2)
    scores.requires_grad_()
    load_balancing_loss(scores, ids).backward()
    # With f constant, the gradient by any token's score of expert i is E * f_i / T.
    share = torch.bincount(ids.flatten(), minlength=4) / 20
    assert scores.grad is not None
    assert_close(scores.grad, (4 * share / 10).expand(10, 4), rtol=1e-6, atol=1e-6)


def test_gradients_as_by_finite_differences() -> None:
    """The losses compute in fp32: their float64 twin is checked by gradcheck, and they against the twin."""
    logits, _, ids = routed(6, 5, 2)
    share = torch.bincount(ids.flatten(), minlength=5).double() / ids.numel()

    def balance(logits: Tensor) -> Tensor:
        return 5 * (share * logits.softmax(-1).mean(0)).sum()

    def z(logits: Tensor) -> Tensor:
        return logits.exp().sum(-1).log().square().mean()

    for ours, twin in ((lambda x: load_balancing_loss(x.softmax(-1), ids), balance), (router_z_loss, z)):
        x32, x64 = logits.clone().requires_grad_(), logits.double().requires_grad_()
        assert torch.autograd.gradcheck(twin, (x64,))
        ours(x32).backward()
        twin(x64).backward()
        assert x32.grad is not None
        assert float(x32.grad.abs().max()) > 1e-3
        assert_close(x32.grad.double(), x64.grad, rtol=1e-6, atol=1e-6)


def test_a_step_against_the_gradient_balances() -> None:
    logits, _, _ = routed(50, 4, 1)
    logits = (logits + torch.tensor([2.0, 0.0, 0.0, 0.0])).requires_grad_()
    before = load_balancing_loss(logits.softmax(-1), logits.argmax(-1, keepdim=True))
    before.backward()
    assert logits.grad is not None
    after = logits.detach() - 200 * logits.grad
    assert load_balancing_loss(after.softmax(-1), after.argmax(-1, keepdim=True)) < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    logits, scores, ids = routed(4096, 4, 1)
    half = scores.to(dtype)
    assert torch.equal(load_balancing_loss(half, ids), load_balancing_loss(half.float(), ids))
    assert torch.equal(router_z_loss(logits.to(dtype)), router_z_loss(logits.to(dtype).float()))


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4], [5e3, 5e3]], requires_grad=True)
    loss = router_z_loss(logits)
    assert_close(loss.item(), (1e8 + (5e3 + math.log(2)) ** 2) / 2, rtol=1e-6, atol=0)
    loss.backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_no_tokens_give_zero_and_stay_connected() -> None:
    values = torch.zeros(0, 4, requires_grad=True)
    for loss in (load_balancing_loss(values, torch.zeros(0, 2, dtype=torch.long)), router_z_loss(values)):
        assert loss.item() == 0.0
        values.grad = None
        loss.backward()
        assert values.grad is not None

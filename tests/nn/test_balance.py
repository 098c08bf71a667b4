"""The auxiliary losses against the papers' equations in plain loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe.nn import importance_loss, load_balancing_loss, load_loss, router_z_loss
from lightning_moe.nn.balance import mean_probabilities, tokens_per_expert


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


# Padding, places without an assignment, and sequences.


def masked_batch(num_sequences: int, length: int, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, scores, ids, valid and assigned; the first sequence is all padding, and some places are empty."""
    logits, scores, ids = routed(num_sequences * length, 5, top_k)
    valid = torch.rand(num_sequences, length) < 0.7
    valid[0] = False
    valid[1:, 0] = True
    valid_T = valid.flatten()
    assigned = valid_T.unsqueeze(1) & (torch.rand(len(ids), top_k) < 0.8)
    assigned[:, 0] = valid_T
    return logits, scores, ids, valid_T, assigned


def looped_balance_of(scores: Tensor, ids: Tensor, valid: Tensor, assigned: Tensor) -> float:
    flat = [ids[t, k].item() for t in range(len(ids)) for k in range(ids.shape[1]) if assigned[t, k]]
    present = [scores[t].double().tolist() for t in range(len(ids)) if valid[t]]
    shares = [flat.count(e) / len(flat) for e in range(scores.shape[1])]
    return sum(len(shares) * share * sum(row[e] for row in present) / len(present) for e, share in enumerate(shares))


@pytest.mark.parametrize(("num_sequences", "length"), [(2, 6), (4, 3), (3, 1)])
def test_masked_losses_as_by_plain_loops(num_sequences: int, length: int) -> None:
    logits, scores, ids, valid, assigned = masked_batch(num_sequences, length)
    expected = looped_balance_of(scores, ids, valid, assigned)
    assert load_balancing_loss(scores, ids, assigned, valid).item() == pytest.approx(expected, rel=1e-6)
    parts = [slice(b * length, (b + 1) * length) for b in range(num_sequences)]
    each = [looped_balance_of(scores[s], ids[s], valid[s], assigned[s]) for s in parts if valid[s].any()]
    by_sequence = load_balancing_loss(scores, ids, assigned, valid, sequence_length=length)
    assert by_sequence.item() == pytest.approx(sum(each) / len(each), rel=1e-6)
    z = looped_z(logits[valid].double().tolist())
    assert router_z_loss(logits, valid).item() == pytest.approx(z, rel=1e-6)
    assert torch.equal(mean_probabilities(scores, valid, length)[0], torch.zeros(5))  # all padding


def test_counts_of_sequences() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [2, 1], [2, 0]])
    assigned = torch.tensor([[True, True], [True, False], [True, True], [False, False]])
    assert tokens_per_expert(ids, 3).tolist() == [[3, 2, 3]]
    assert tokens_per_expert(ids, 3, assigned).tolist() == [[2, 2, 1]]
    assert tokens_per_expert(ids, 3, assigned, sequence_length=2).tolist() == [[2, 1, 0], [0, 1, 1]]
    assert tokens_per_expert(ids, 3, sequence_length=1).tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 1]]


def test_one_when_uniform_in_every_sequence() -> None:
    scores, ids = torch.full((16, 4), 0.25), (torch.arange(16) % 4).unsqueeze(1)
    assert load_balancing_loss(scores, ids, sequence_length=4).item() == 1.0
    # Uneven in every sequence and even over all: only the whole batch looks balanced.
    scores = torch.eye(4).repeat_interleave(3, 0)
    ids = torch.arange(4).repeat_interleave(3).unsqueeze(1)
    assert load_balancing_loss(scores, ids).item() == 1.0
    assert load_balancing_loss(scores, ids, sequence_length=3).item() == 4.0


def squared_variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SHAPES)
def test_importance_and_load_as_by_plain_loops(num_tokens: int, num_experts: int, top_k: int) -> None:
    _, scores, ids = routed(num_tokens, num_experts, top_k)
    weights = scores.gather(1, ids)
    sums = [sum(weights.double()[ids == e].tolist()) for e in range(num_experts)]
    expected = squared_variation(sums)
    assert importance_loss(weights, ids, num_experts).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    expected = squared_variation(scores.double().sum(0).tolist())
    assert load_loss(scores).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_importance_and_load_of_a_masked_batch() -> None:
    _, scores, ids, valid, assigned = masked_batch(4, 5)
    weights = scores.gather(1, ids)
    sums = [sum(weights.double()[(ids == e) & assigned].tolist()) for e in range(5)]
    assert importance_loss(weights, ids, 5, assigned).item() == pytest.approx(squared_variation(sums), rel=1e-5)
    expected = squared_variation(scores[valid].double().sum(0).tolist())
    assert load_loss(scores, valid).item() == pytest.approx(expected, rel=1e-5)


def test_importance_and_load_by_hand() -> None:
    ids = torch.tensor([[0], [1], [0]])
    # Sums 3 and 1: mean 2, variance 1.
    assert importance_loss(torch.tensor([[1.0], [1.0], [2.0]]), ids, 2).item() == 0.25
    assert load_loss(torch.tensor([[1.0, 0.5], [2.0, 0.5]])).item() == 0.25
    assert importance_loss(torch.ones(4, 1), torch.arange(4).unsqueeze(1), 4).item() == 0.0
    assert importance_loss(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.long), 4).item() == 3.0  # E - 1


def test_losses_of_noisy_gates_by_finite_differences() -> None:
    """They are computed in float64 where they are given that."""
    _, scores, ids, valid, assigned = masked_batch(3, 4)
    weights, load = (v.double().requires_grad_() for v in (scores.gather(1, ids), scores))
    assert torch.autograd.gradcheck(lambda w: importance_loss(w, ids, 5, assigned), (weights,))
    assert torch.autograd.gradcheck(lambda v: load_loss(v, valid), (load,))
    assert torch.autograd.gradcheck(lambda v: load_balancing_loss(v, ids, assigned, valid, 4), (load,))
    assert torch.autograd.gradcheck(lambda v: router_z_loss(v, valid), (load,))


@pytest.mark.parametrize("sequence_length", [None, 4])
@pytest.mark.parametrize("num_tokens", [0, 8])
def test_nothing_valid_gives_zero_and_stays_connected(num_tokens: int, sequence_length: int | None) -> None:
    values = torch.randn(num_tokens, 4, requires_grad=True)
    ids, nobody = torch.zeros(num_tokens, 2, dtype=torch.long), torch.zeros(num_tokens, 2, dtype=torch.bool)
    for loss in (
        load_balancing_loss(values.softmax(-1), ids, nobody, nobody[:, 0], sequence_length),
        router_z_loss(values, nobody[:, 0]),
        importance_loss(values[:, :2], ids, 4, nobody),
        load_loss(values, nobody[:, 0]),
    ):
        assert loss.item() == 0.0
        values.grad = None
        loss.backward()
        assert values.grad is not None
        assert not values.grad.any()

"""Over what the losses are taken, and those of noisy gates: their gradient by hand in float64."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_moe import MoE, MoEConfig
from lightning_moe.nn import LossWeights, RoutingStats, Tokens
from lightning_moe.nn.router.base import CHOICE
from lightning_moe.nn.tap import Scope

pytestmark = pytest.mark.filterwarnings("ignore:MoE layers are trained with no AuxLossCallback")

D, B, S, E, K = 8, 3, 5, 4, 2
recomputes = pytest.mark.parametrize("recompute", [None, "reentrant", "non-reentrant"])


def make(weights: LossWeights | None, **changes: Any) -> MoE:
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moe = MoE(D, MoEConfig(**{"num_experts": E, "top_k": K, "intermediate_size": 12, **changes}))
    for parameter in moe.router.parameters():
        nn.init.normal_(parameter)
    moe.tap.loss_weights = weights
    moe.tap.importance = bool(weights and weights.importance)
    moe.tap.load = bool(weights and weights.load)
    return moe


def forward(moe: MoE, x: Tensor, recompute: str | None, **others: Any) -> Tensor:
    layer = partial(moe, **others)
    return layer(x) if recompute is None else cast(Tensor, checkpoint(layer, x, use_reentrant=recompute == "reentrant"))


def losses_only(moe: MoE, x: Tensor, recompute: str | None, **others: Any) -> Tensor:
    """Goes backward with nothing but the losses; the gradient with respect to x."""
    x = x.clone().requires_grad_()
    y = forward(moe, x, recompute, **others)
    y.backward(torch.zeros_like(y))
    assert x.grad is not None
    return x.grad


class ByHand:
    """The router's weights in float64, and the probabilities and counts of a batch with no noise."""

    def __init__(self, moe: MoE) -> None:
        self.weight_ED = cast(Tensor, moe.router.weight).detach().double().requires_grad_()

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.weight_ED.T

    def probs(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(-1)

    def counts(self, x: Tensor) -> Tensor:
        """[E], as many as chose each expert."""
        chosen = self.logits(x).topk(K, dim=-1).indices.flatten()
        return torch.tensor([float((chosen == e).sum()) for e in range(E)], dtype=torch.float64)


def balance(probs: Tensor, counts: Tensor) -> Tensor:
    return E * sum((counts[e] / counts.sum()) * probs[:, e].mean() for e in range(E))


def assert_gradients(moe: MoE, by_hand: ByHand, got_x: Tensor, x64: Tensor) -> None:
    expected = cast(Tensor, by_hand.weight_ED.grad)
    assert float(expected.abs().max()) > 1e-3
    assert_close(cast(Tensor, moe.router.weight.grad).double(), expected, rtol=1e-6, atol=1e-6)
    assert_close(got_x.double(), cast(Tensor, x64.grad), rtol=1e-6, atol=1e-6)
    assert moe.experts.w1.grad is None or not moe.experts.w1.grad.any()


@recomputes
@pytest.mark.parametrize("has_padding", [False, True])
def test_sequence(recompute: str | None, has_padding: bool) -> None:
    moe = make(LossWeights(0.7))
    moe.tap.scope = "sequence"
    seen: list[RoutingStats] = []
    moe.tap.observers.append(seen.append)
    by_hand, x = ByHand(moe), torch.randn(B, S, D)
    lengths = [5, 0, 2] if has_padding else [5, 5, 5]
    valid = torch.arange(S) < torch.tensor(lengths).unsqueeze(1) if has_padding else None
    got = losses_only(moe, x, recompute, valid=valid)

    x64 = x.double().requires_grad_()
    sequences = [x64[b, :length] for b, length in enumerate(lengths) if length]
    loss = sum(balance(by_hand.probs(s), by_hand.counts(s)) for s in sequences) / len(sequences)
    (0.7 * cast(Tensor, loss)).backward()
    assert_gradients(moe, by_hand, got, x64)
    assert [round(float(stats.load_balancing_loss), 5) for stats in seen] == [round(cast(Tensor, loss).item(), 5)]
    assert int(seen[0].tokens_per_expert_E.sum()) == K * sum(lengths)


def test_sequence_is_not_the_micro_batch() -> None:
    """Nor is a batch of single tokens: there is one sequence in [T, D]."""
    x = torch.randn(B, S, D)
    grads: dict[str, Tensor] = {}
    for name, scope, given in (
        ("micro_batch", "micro_batch", x),
        ("flat micro_batch", "micro_batch", x.flatten(0, 1)),
        ("sequence", "sequence", x),
        ("flat sequence", "sequence", x.flatten(0, 1)),
    ):
        moe = make(LossWeights(1.0))
        moe.tap.scope = cast(Scope, scope)
        grads[name] = losses_only(moe, given, None).flatten(0, -2)
    for name in ("flat micro_batch", "flat sequence"):
        assert_close(grads[name], grads["micro_batch"], rtol=1e-6, atol=1e-6)
    assert float((grads["sequence"] - grads["micro_batch"]).abs().max()) > 1e-3


OTHERS = torch.tensor([9, 0, 2, 1])
SUMS: dict[str, Any] = {
    "alone": None,
    "doubled": lambda counts: 2 * counts,
    "with another rank's": lambda counts: counts + OTHERS,
}


@recomputes
@pytest.mark.parametrize("how", SUMS)
def test_global_batch(recompute: str | None, how: str) -> None:
    """Shares are of all that was chosen since the step began, everywhere; probabilities are one's own."""
    moe = make(LossWeights(0.7, 0.05))
    called: list[list[list[int]]] = []

    def sum_over_ranks(counts: Tensor) -> Tensor:
        called.append(counts.tolist())
        return cast(Tensor, SUMS[how](counts))

    moe.tap.scope = "global_batch"
    moe.tap.sum_over_ranks = None if SUMS[how] is None else sum_over_ranks
    moe.tap.loss_gradient = 1 / 3  # of three micro-batches
    seen: list[RoutingStats] = []
    moe.tap.observers.append(seen.append)
    for _ in range(2):  # two steps: the second has forgotten the first
        moe.tap.begin_step()
        moe.zero_grad()
        by_hand = ByHand(moe)
        total, expected, every = torch.zeros(E, dtype=torch.float64), [], []
        for number in (4, 7, 0):
            x = torch.randn(number, S, D)
            got = losses_only(moe, x, recompute)
            x64 = x.double().requires_grad_()
            tokens = x64.flatten(0, 1)
            own = by_hand.counts(tokens)
            every.append([[int(count) for count in own]])
            total = total + (own if SUMS[how] is None else SUMS[how](own))
            if number == 0:
                expected.append(0.0)
                continue
            loss = balance(by_hand.probs(tokens), total)
            z = by_hand.logits(tokens).exp().sum(-1).log().square().mean()
            ((0.7 * loss + 0.05 * z) / 3).backward()
            expected.append(loss.item())
            assert_gradients(moe, by_hand, got, x64)
        assert [float(stats.load_balancing_loss) for stats in seen] == pytest.approx(expected, rel=1e-6)
        assert called == ([] if SUMS[how] is None else every)  # once a micro-batch: it is collective
        seen.clear()
        called.clear()


def test_without_a_new_step_shares_go_on() -> None:
    moe = make(LossWeights(1.0))
    moe.tap.scope = "global_batch"
    first, second = torch.randn(6, D), torch.randn(6, D) + 1
    losses_only(moe, first, None)
    later = losses_only(moe, second, None)
    moe.tap.begin_step()
    anew = losses_only(moe, second, None)
    assert float((later - anew).abs().max()) > 1e-4
    moe.tap.scope = "micro_batch"
    assert_close(losses_only(moe, second, None), anew, rtol=1e-6, atol=1e-6)


def squared_variation(values: list[Tensor]) -> Tensor:
    mean = cast(Tensor, sum(values)) / len(values)
    variance = cast(Tensor, sum((value - mean) ** 2 for value in values)) / len(values)
    return variance / mean**2


@recomputes
@pytest.mark.parametrize("weights", [(0, 0, 0.4, 0), (0, 0, 0, 0.9), (0.3, 0.05, 0.4, 0.9)], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_importance_and_load_of_a_noisy_gate(recompute: str | None, weights: tuple[float, ...], top_k: int) -> None:
    """Shazeer et al. 2017, eqs. 3 to 11, token by token, with the layer's own noise."""
    moe = make(LossWeights(*weights), router="noisy_topk", top_k=top_k, router_dtype="float64").double()
    seen: list[RoutingStats] = []
    moe.tap.observers.append(seen.append)
    x, valid = torch.randn(12, D, dtype=torch.float64), torch.arange(12) % 4 != 1
    torch.manual_seed(77)
    noise = Tokens(torch.Size([12]), training=True).normal(E, CHOICE).double()
    torch.manual_seed(77)
    got = losses_only(moe, x, recompute, valid=valid)

    leaf = x.clone().requires_grad_()
    gate, spread = (p.detach().clone().requires_grad_() for p in moe.router.parameters())
    importance, load = ([torch.zeros((), dtype=torch.float64)] * E for _ in range(2))
    probs, logits, counts = [], [], torch.zeros(E, dtype=torch.float64)
    for t in valid.nonzero().flatten().tolist():
        logit, width = gate @ leaf[t], (1 + (spread @ leaf[t]).exp()).log()
        noisy = logit + noise[t] * width
        best = sorted(range(E), key=lambda e, noisy=noisy: -noisy[e].item())[:top_k]
        exps = {e: noisy[e].exp() for e in best}
        for e in best:
            importance[e] = importance[e] + exps[e] / cast(Tensor, sum(exps.values()))
            counts[e] += 1
        for e in range(E):
            others = sorted((noisy[o] for o in range(E) if o != e), key=Tensor.item, reverse=True)
            z = (logit[e] - others[top_k - 1]) / width[e]
            load[e] = load[e] + (1 + torch.erf(z / 2**0.5)) / 2
        probs.append(noisy.softmax(0))
        logits.append(logit)
    losses = [
        balance(torch.stack(probs), counts),
        torch.stack(logits).exp().sum(-1).log().square().mean(),
        squared_variation(importance),
        squared_variation(load),
    ]
    sum(weight * loss for weight, loss in zip(weights, losses, strict=True)).backward()  # type: ignore[union-attr]
    assert leaf.grad is not None
    assert_close(got, leaf.grad, rtol=1e-6, atol=1e-7)
    for name, ours, expected in zip("gw", moe.router.parameters(), (gate, spread), strict=True):
        if expected.grad is not None:
            assert_close(ours.grad, expected.grad, rtol=1e-6, atol=1e-7, msg=partial("{}: {}".format, name))
    if top_k > 1 or weights[3]:  # the weight of one expert alone is 1
        assert float(leaf.grad.abs().max()) > 1e-3

    (stats,) = seen
    reported = (stats.load_balancing_loss, stats.router_z_loss, stats.importance_loss, stats.load_loss)
    for i, (value, loss) in enumerate(zip(reported, losses, strict=True)):
        assert value.item() == pytest.approx(loss.item() if weights[i] or i < 2 else 0.0, rel=1e-6)


def test_importance_goes_by_the_weights_of_any_router() -> None:
    moe = make(LossWeights(importance=0.4, load=0.9))  # which has no noise, hence no load to estimate
    by_hand, x = ByHand(moe), torch.randn(9, D)
    got = losses_only(moe, x, None)
    x64 = x.double().requires_grad_()
    values, ids = by_hand.logits(x64).topk(K, dim=-1)
    sums = [torch.zeros((), dtype=torch.float64)] * E
    for weight_K, id_K in zip(values.softmax(-1), ids, strict=True):
        for weight, e in zip(weight_K, id_K.tolist(), strict=True):
            sums[e] = sums[e] + weight
    (0.4 * squared_variation(sums)).backward()
    assert_gradients(moe, by_hand, got, x64)


@recomputes
@pytest.mark.parametrize(
    "changes",
    [
        {"router": "hash"},
        {"router": "random"},
        {"router": "hash", "capacity_factor": 0.5, "min_capacity": 1, "overflow": "next_expert"},
        {"frozen": True},
        {"frozen": True, "router": "gshard", "capacity_factor": 0.5, "min_capacity": 1},
        {"router": "expert_choice", "capacity_factor": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", [None, LossWeights(0.5, 0.5, 0.5, 0.5)], ids=["unweighed", "weighed"])
def test_a_router_without_gradient_is_counted_once_too(
    recompute: str | None, changes: dict[str, Any], weights: LossWeights | None
) -> None:
    changes = dict(changes)
    frozen = changes.pop("frozen", False)
    moe = make(weights, **changes)
    if frozen:
        moe.router.requires_grad_(False)
    seen: list[RoutingStats] = []
    moe.tap.observers.append(seen.append)
    sizes = [3, 1, 6]
    for size in sizes:
        x, ids = torch.randn(size, S, D), torch.randint(9, (size, S))
        losses_only(moe, x, recompute, token_ids=ids)
    counted = [int(stats.tokens_per_expert_E.sum()) for stats in seen]
    # An expert that chooses takes ceil(1.0 * T / E) of 15, 5 and 30 tokens.
    assert counted == ([16, 8, 32] if moe.router.fits_capacity else [30, 10, 60])
    if frozen:
        assert all(p.grad is None for p in moe.router.parameters())
    values = [value for stats in seen for value in vars(stats).values()]
    assert not any(value.requires_grad for value in values)


@recomputes
def test_losses_do_not_touch_what_a_fixed_router_trains(recompute: str | None) -> None:
    grads = []
    x, ids = torch.randn(B, S, D), torch.randint(9, (B, S))
    for weights in (None, LossWeights(0.5, 0.5, 0.5, 0.5)):
        moe = make(weights, router="hash")
        leaf = x.clone().requires_grad_()
        y = forward(moe, leaf, recompute, token_ids=ids)
        y.square().sum().backward()
        grads.append([leaf.grad, moe.experts.w1.grad, moe.experts.w2.grad])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_layer_whose_input_and_experts_are_frozen_is_seen_through_its_router() -> None:
    moe = make(LossWeights(1.0))
    moe.experts.requires_grad_(False)
    seen: list[RoutingStats] = []
    moe.tap.observers.append(seen.append)
    moe(torch.randn(B, S, D)).sum().backward()
    assert len(seen) == 1
    assert moe.router.weight.grad is not None

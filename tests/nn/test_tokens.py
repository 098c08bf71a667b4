"""Random numbers of tokens: the same in every layout and recomputation, and as good as random."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_moe import MoE, MoEConfig
from lightning_moe.nn import LossWeights, Tokens
from lightning_moe.nn.tokens import hashed_uniform
from lightning_moe.parallel import SINGLE_RANK, ExpertGroups

D = 6
CONFIG = MoEConfig(num_experts=4, top_k=2, intermediate_size=8)
RANDOM: dict[str, dict[str, Any]] = {
    "jitter": {"jitter": 0.3},
    "switch": {"router": "switch", "top_k": 1, "jitter": None},
    "gshard": {"router": "gshard"},
    "noisy_topk": {"router": "noisy_topk"},
    "random": {"router": "random"},
    "expert choice with jitter": {"router": "expert_choice", "capacity_factor": 1.5, "jitter": 0.3},
    "random drop": {"capacity_factor": 0.5, "min_capacity": 1, "drop_priority": "random"},
    "all at once": {
        "router": "gshard",
        "jitter": 0.3,
        "capacity_factor": 0.7,
        "min_capacity": 1,
        "drop_priority": "random",
        "overflow": "next_expert",
    },
}
PLAIN: dict[str, dict[str, Any]] = {
    "topk": {},
    "group_limited": {"router": "group_limited", "num_groups": 2, "topk_groups": 1},
    "sinkhorn": {"router": "sinkhorn"},
    "hash": {"router": "hash"},
    "expert_choice": {"router": "expert_choice", "capacity_factor": 1.5},
    "drop": {"capacity_factor": 0.5, "min_capacity": 1, "overflow": "next_expert"},
    "by position": {"capacity_factor": 0.5, "min_capacity": 1, "drop_priority": "position"},
}
random_ones = pytest.mark.parametrize("changes", RANDOM.values(), ids=RANDOM.keys())
plain_ones = pytest.mark.parametrize("changes", PLAIN.values(), ids=PLAIN.keys())


def make(changes: dict[str, Any]) -> MoE:
    torch.manual_seed(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moe = MoE(D, replace(CONFIG, **changes))
    for parameter in moe.router.parameters():
        nn.init.normal_(parameter)
    moe.tap.loss_weights = LossWeights(0.1, 0.1)
    return moe


def call(moe: MoE, x: Tensor) -> Tensor:
    return moe(x, token_ids=torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % 3)


# The numbers themselves.


def splitmix64(bits: int) -> int:
    """The finaliser as its authors wrote it, in whole numbers modulo 2^64."""
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


def uniform_by_loops(key: int, row: list[int], column: int) -> float:
    golden, bits = 0x9E3779B97F4A7C15, key % 2**64
    for index in (*row, column):
        bits = splitmix64((bits + (index + 1) * golden) % 2**64)
    return ((bits >> 41) + 0.5) / 2**23


@given(
    st.one_of(st.integers(0, 2**62), st.integers(-(2**80), 2**80)),
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2), min_size=1, max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_as_by_whole_numbers_of_any_size(key: int, rows: list[list[int]]) -> None:
    ours = hashed_uniform(key, list(torch.tensor(rows).unbind(1)), width=3)
    assert ours.dtype == torch.float32
    assert ours.tolist() == [[uniform_by_loops(key, row, z) for z in range(3)] for row in rows]


@pytest.mark.parametrize("key", [2**63, 2**64 - 1, -1, -(2**63), 2**64 + 5])
def test_keys_wrap_around(key: int) -> None:
    rows = torch.arange(50)
    assert torch.equal(hashed_uniform(key, [rows], 4), hashed_uniform(key % 2**64, [rows], 4))
    assert hashed_uniform(key, [rows], 1)[7].item() == uniform_by_loops(key, [7], 0)


def numbers(n: int = 40_000, width: int = 4, key: int = 11, stream: int = 0) -> Tensor:
    tokens = Tokens(torch.Size([n]), training=True)
    tokens.__dict__["key"] = key  # as if it had been drawn
    return tokens.uniform(width, stream)


def distance_to_uniform(values: Tensor) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the distribution functions."""
    values = values.flatten().double().sort().values
    steps = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    return float(torch.maximum(steps[1:] - values, values - steps[:-1]).max())


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    a, b = a.flatten().double(), b.flatten().double()
    correlation = float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))
    assert abs(correlation) < 4 / math.sqrt(len(a))
    assert not bool((a == b).double().mean() > 0.01)


def test_they_are_uniform_in_the_open_interval() -> None:
    values = numbers()
    assert values.dtype == torch.float32
    assert float(values.min()) > 0
    assert float(values.max()) < 1
    bound = 1.63 / math.sqrt(values.numel())  # which one of 100 keys would miss
    assert distance_to_uniform(values) < bound
    assert all(distance_to_uniform(column) < 2 * bound for column in values.T)
    assert distance_to_uniform(values**1.02) > bound  # it would tell
    counts = torch.bincount((values.flatten() * 64).long(), minlength=64).double()
    expected = values.numel() / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 63 - 4 * math.sqrt(126) < chi_square < 63 + 4 * math.sqrt(126)


def test_the_smallest_and_largest_stay_inside() -> None:
    """Where all bits are equal: the logarithms of gumbel() and the quantile of normal() stay finite."""
    smallest, largest = torch.tensor(0.5) * 2.0**-23, (torch.tensor(float(2**23 - 1)) + 0.5) * 2.0**-23
    assert 0 < smallest.item() < largest.item() < 1
    for value in (smallest, largest):
        assert bool((-(-value.log()).log()).isfinite())
        assert bool(torch.special.ndtri(value).isfinite())


def test_rows_columns_streams_and_keys_are_uncorrelated() -> None:
    values = numbers()
    for lag in (1, 2, 7, 64):
        assert_uncorrelated(values[lag:], values[:-lag])
    for a in range(4):
        for b in range(a):
            assert_uncorrelated(values[:, a], values[:, b])
            assert_uncorrelated(values[1:, a], values[:-1, b])
    for stream in (1, 2):
        assert_uncorrelated(values, numbers(stream=stream))
    for key in (10, 12, 11 + 2**32, 2**62 - 1):
        assert_uncorrelated(values, numbers(key=key))


@pytest.mark.parametrize(("stream", "other"), [(0, 1), (1, 2), (0, 2)])
def test_no_stream_is_another_one_later(stream: int, other: int) -> None:
    """Jitter of a sequence and the draw for its neighbour are two things."""
    a, b = numbers(1000, stream=stream), numbers(1000, stream=other)
    for lag in range(-4, 5):
        shifted = b.roll(lag, 0)
        assert not bool((a == shifted).float().mean() > 0.01), f"stream {other} is stream {stream} shifted by {lag}"
        assert_uncorrelated(a, shifted)


def test_gumbel_samples_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    tokens = Tokens(torch.Size([40_000]), training=True)
    drawn = (logits + tokens.gumbel(4, 1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 40_000
    assert_close(shares, logits.softmax(-1), rtol=0, atol=4 * 0.5 / math.sqrt(40_000))


def test_normal_is_normal() -> None:
    values = Tokens(torch.Size([40_000]), training=True).normal(3, 1)
    assert distance_to_uniform(torch.special.ndtr(values)) < 1.63 / math.sqrt(values.numel())


# Which token gets which.


def groups_of(rank: int, size: int) -> ExpertGroups:
    return ExpertGroups(data_size=size, data_rank=rank)


@pytest.mark.parametrize("in_batch", [(8,), (7,), (3,), (8, 5), (7, 5), (1, 5), (6, 2, 5)], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("training", [True, False])
def test_a_token_has_the_same_in_every_layout(in_batch: tuple[int, ...], size: int, training: bool) -> None:
    """Rank r has samples r, r + size, ... as DistributedSampler deals them, of [B, D], [B, S, D], [B, G, S, D]."""

    def drawn(shape: tuple[int, ...], groups: ExpertGroups) -> Tensor:
        torch.manual_seed(1)
        values = Tokens(torch.Size(shape), groups=groups, training=training).uniform(3, 1)
        return values.view(*shape, 3)

    whole = drawn(in_batch, SINGLE_RANK)
    assert whole.unique().numel() > 0.99 * whole.numel()
    for rank in range(size):
        expected = whole[rank::size]
        assert torch.equal(drawn(tuple(expected.shape[:-1]), groups_of(rank, size)), expected)


@pytest.mark.parametrize("changes", [RANDOM["jitter"], RANDOM["gshard"], RANDOM["noisy_topk"], RANDOM["random"]])
def test_a_layer_routes_the_same_in_every_layout(changes: dict[str, Any]) -> None:
    x = torch.randn(5, 4, D)

    def run(x: Tensor, groups: ExpertGroups) -> Tensor:
        moe = make(changes)
        moe.groups = groups
        torch.manual_seed(21)
        return moe(x)

    whole = run(x, SINGLE_RANK)
    for rank in range(3):
        assert_close(run(x[rank::3], groups_of(rank, 3)), whole[rank::3], rtol=1e-6, atol=1e-6)
    by_chance = run(x[1::3], SINGLE_RANK) - whole[1::3]
    assert by_chance.abs().max().item() > 1e-3


# The key.


def draws(action: Callable[[], object]) -> int:
    """How many keys the action takes from the default generator."""
    torch.manual_seed(33)
    states = [torch.get_rng_state()]
    for _ in range(4):
        torch.randint(2**62, ())
        states.append(torch.get_rng_state())
    torch.manual_seed(33)
    action()
    return [torch.equal(torch.get_rng_state(), state) for state in states].index(True)


def test_the_key_is_drawn_once_and_only_when_needed() -> None:
    tokens = Tokens(torch.Size([3]), training=True)
    assert draws(lambda: Tokens(torch.Size([3]), training=True).num_valid) == 0
    assert draws(lambda: [tokens.uniform(2, stream) for stream in range(3)]) == 1
    assert draws(lambda: [tokens.gumbel(2, 0), tokens.normal(2, 0)]) == 0  # it has it by now
    still = Tokens(torch.Size([3]))
    assert draws(lambda: [still.uniform(2, 0), still.gumbel(2, 1), still.normal(2, 2)]) == 0


@random_ones
def test_a_layer_with_randomness_draws_one_key_a_pass(changes: dict[str, Any]) -> None:
    moe, x = make(changes), torch.randn(3, 5, D)
    assert draws(lambda: call(moe, x)) == 1
    assert draws(lambda: [call(moe, x), call(moe, x)]) == 2
    moe.eval()
    assert draws(lambda: call(moe, x)) == 0
    # Ranks without tokens draw as the others do, or the next layer would see other keys.
    assert draws(lambda: moe.train()(torch.zeros(0, 5, D))) == 1


@plain_ones
def test_a_layer_without_randomness_draws_none(changes: dict[str, Any]) -> None:
    moe, x = make(changes), torch.randn(3, 5, D)
    assert draws(lambda: call(moe, x)) == 0
    assert draws(lambda: call(moe.eval(), x)) == 0


def test_evaluation_is_a_constant() -> None:
    first = Tokens(torch.Size([4, 3])).uniform(5, 1)
    torch.manual_seed(987)
    assert torch.equal(Tokens(torch.Size([4, 3])).uniform(5, 1), first)
    in_training = [Tokens(torch.Size([4, 3]), training=True).uniform(5, 1) for _ in range(2)]
    for a, b in ((in_training[0], first), (in_training[1], first), tuple(in_training)):
        assert not bool((a == b).any())


@random_ones
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_sees_the_same(changes: dict[str, Any], reentrant: bool) -> None:
    """Two layers, the first one recomputed after the second has drawn its key."""
    inputs = torch.randn(3, 5, D)

    def gradients(recompute: bool, seed: int = 55) -> list[Tensor]:
        layers = [make(changes), make(changes)]
        torch.manual_seed(seed)
        x = leaf = inputs.clone().requires_grad_()
        for layer in layers:
            x = cast(Tensor, checkpoint(layer, x, use_reentrant=reentrant)) if recompute else layer(x)
        x.square().sum().backward()
        grads = [leaf.grad, *(p.grad for layer in layers for p in layer.parameters())]
        return [torch.zeros(1) if grad is None else grad for grad in grads]

    plain, recomputed, other = gradients(False), gradients(True), gradients(False, seed=56)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))  # chance matters here


@pytest.mark.parametrize(
    ("shape", "length"), [((), 1), ((7,), 7), ((2, 7), 7), ((3, 2, 7), 7), ((0,), 0), ((2, 0), 0), ((0, 4), 4)]
)
def test_shapes(shape: tuple[int, ...], length: int) -> None:
    tokens = Tokens(
        torch.Size(shape), valid=torch.ones(shape, dtype=torch.bool), token_ids=torch.zeros(shape, dtype=torch.long)
    )
    assert tokens.sequence_length == length
    assert tokens.num_tokens == math.prod(shape) == int(tokens.num_valid)
    assert tokens.uniform(3, 0).shape == (math.prod(shape), 3)
    assert tokens.valid_T is not None
    assert tokens.token_ids_T is not None
    assert tokens.valid_T.shape == tokens.token_ids_T.shape == (math.prod(shape),)


@pytest.mark.parametrize(
    ("name", "given_shape"), [("valid", [2, 4]), ("valid", [6]), ("token_ids", [3, 2]), ("token_ids", [2, 3, 1])]
)
def test_other_shapes_are_refused(name: str, given_shape: list[int]) -> None:
    message = (
        f"{name} has shape {given_shape}: must be [2, 3], that of x without its last dimension. Give one value per "
        "token."
    )
    wrong: Any = {name: torch.ones(given_shape, dtype=torch.bool)}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Tokens(torch.Size([2, 3]), **wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8], ids=str)
def test_a_mask_of_numbers_is_refused(dtype: torch.dtype) -> None:
    message = f"valid has dtype {dtype}: must be torch.bool, True for a token. Use mask.bool()."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Tokens(torch.Size([2]), valid=torch.ones(2, dtype=dtype))

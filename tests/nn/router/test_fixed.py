"""Routers that learn nothing."""

from __future__ import annotations

import re

import pytest
import torch

from lightning_moe import MoE, MoEConfig
from lightning_moe.nn import Tokens
from lightning_moe.nn.router import make_router
from lightning_moe.nn.router.base import CHOICE, DROP, JITTER, without_padding
from lightning_moe.parallel import ExpertGroups
from tests.nn.router.helpers import chi_square, counts, tokens_of

HASH = MoEConfig(8, router="hash")
RANDOM = MoEConfig(8, router="random")
VOCABULARY = 8000


def hashed(token_ids: torch.Tensor, config: MoEConfig = HASH, **more: object) -> torch.Tensor:
    tokens = Tokens(token_ids.shape, token_ids=token_ids, **more)  # type: ignore[arg-type]
    routing = make_router(4, config)(torch.randn(token_ids.numel(), 4), tokens)
    return routing.topk_ids_TK


def test_same_id_same_experts() -> None:
    ids = torch.randint(VOCABULARY, (6, 50))
    expected = hashed(ids)
    of_id: dict[int, list[int]] = {}
    for token, experts in zip(ids.flatten().tolist(), expected.tolist(), strict=True):
        assert of_id.setdefault(token, experts) == experts
    # Whatever the layer, the pass, the rank, the mode, the place and the dtype of the ids.
    assert torch.equal(hashed(ids), expected)
    assert torch.equal(hashed(ids, training=True), expected)
    assert torch.equal(hashed(ids, groups=ExpertGroups(ep_size=2, ep_rank=1, data_size=2, data_rank=1)), expected)
    assert torch.equal(hashed(ids.flip(0, 1)).flip(0), expected)
    assert torch.equal(hashed(ids.int()), expected)
    torch.manual_seed(123)
    assert torch.equal(hashed(ids, training=True), expected)


def splitmix64(state: int) -> int:
    """The finaliser of Steele, Lea and Flood 2014, on whole numbers without a sign."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def test_hash_is_that_of_splitmix64() -> None:
    """As a checkpoint's experts are worthless with another hash, it must not change from one version to the next."""
    ids = [*range(200), 31_999, 2**40]
    golden = 0x9E3779B97F4A7C15
    for token, experts in zip(
        ids, hashed(torch.tensor(ids), MoEConfig(8, top_k=3, router="hash")).tolist(), strict=True
    ):
        of_token = splitmix64((token + 1) * golden % 2**64)
        numbers = [splitmix64((of_token + (e + 1) * golden) % 2**64) >> 41 for e in range(8)]
        assert experts == sorted(range(8), key=lambda e: (-numbers[e], e))[:3]
    assert hashed(torch.arange(4)).tolist() == [[4, 6], [2, 5], [0, 5], [5, 7]]


@pytest.mark.parametrize("top_k", [1, 2, 5, 8])
@pytest.mark.parametrize("router", ["hash", "random"])
def test_so_many_different_experts_of_equal_weight(router: str, top_k: int) -> None:
    config = MoEConfig(8, top_k=top_k, router=router)
    tokens = tokens_of(100, training=True, token_ids=torch.arange(100))
    routing = make_router(4, config)(torch.randn(100, 4), tokens)
    assert all(len(set(ids)) == top_k for ids in routing.topk_ids_TK.tolist())
    assert bool((routing.topk_scores_TK == 1 / top_k).all())
    assert bool((routing.scores_TE == 1 / 8).all())
    assert bool((routing.logits_TE == 0).all())


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("num_experts", [8, 7])
def test_ids_are_spread_evenly(num_experts: int, top_k: int) -> None:
    ids = hashed(torch.arange(VOCABULARY), MoEConfig(num_experts, top_k=top_k, router="hash"))
    for k in range(top_k):
        statistic, bound = chi_square(
            torch.bincount(ids[:, k], minlength=num_experts), torch.full((num_experts,), VOCABULARY / num_experts)
        )
        assert statistic < bound
    # Neighbouring ids have nothing to do with each other.
    assert abs((ids[1:, 0] == ids[:-1, 0]).float().mean() - 1 / num_experts) < 0.02


@pytest.mark.parametrize("token", [-100, -1, 0, 2**31, 2**62])
def test_any_whole_number_is_an_id(token: int) -> None:
    experts = hashed(torch.tensor([token, token]))
    assert experts[0].tolist() == experts[1].tolist()
    assert len(set(experts[0].tolist())) == 2


def test_no_ids() -> None:
    message = (
        "token_ids=None: router='hash' goes by the ids of the tokens. Call the layer as moe(x, token_ids=ids), or use "
        "router='random'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_router(4, HASH)(torch.randn(3, 4), tokens_of(3))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MoE(4, HASH)(torch.randn(2, 3, 4))


def drawn(num_tokens: int, training: bool, config: MoEConfig = RANDOM) -> torch.Tensor:
    return make_router(4, config)(torch.randn(num_tokens, 4), tokens_of(num_tokens, training)).topk_ids_TK


def test_random_is_new_at_every_pass_in_training() -> None:
    first, second = drawn(400, training=True), drawn(400, training=True)
    assert abs((first[:, 0] == second[:, 0]).float().mean() - 1 / 8) < 0.07
    torch.manual_seed(0)
    again = drawn(400, training=True)
    torch.manual_seed(0)
    assert torch.equal(drawn(400, training=True), again)


def test_random_is_fixed_at_evaluation() -> None:
    first = drawn(400, training=False)
    torch.manual_seed(123)
    assert torch.equal(drawn(400, training=False), first)
    # A token's place decides: what follows it does not matter.
    assert torch.equal(drawn(100, training=False), first[:100])


@pytest.mark.parametrize("training", [False, True])
def test_random_is_even(training: bool) -> None:
    for k, experts in enumerate(drawn(8000, training).t()):
        statistic, bound = chi_square(torch.bincount(experts, minlength=8), torch.full((8,), 1000.0))
        assert statistic < bound, k


def test_random_has_nothing_to_do_with_who_is_dropped() -> None:
    """By chance as well, from other random numbers: not those of a neighbour either."""
    tokens = tokens_of(500, training=True)
    numbers = [tokens.uniform(4, stream) for stream in (JITTER, CHOICE, DROP)]
    for i, one in enumerate(numbers):
        for other in numbers[i + 1 :]:
            for shift in range(-3, 4):
                assert not bool((one == other.roll(shift, 0)).all(1).any())


@pytest.mark.parametrize("router", ["hash", "random"])
def test_padding_is_assigned_nowhere(router: str) -> None:
    valid = torch.rand(40) < 0.5
    tokens = tokens_of(40, training=True, token_ids=torch.arange(40), valid=valid)
    routing = make_router(4, MoEConfig(8, router=router))(torch.randn(40, 4), tokens)
    assert counts(without_padding(routing, tokens)).sum() == 2 * valid.sum()


@pytest.mark.parametrize("router", ["hash", "random"])
def test_nothing_to_learn(router: str) -> None:
    assert make_router(4, MoEConfig(8, router=router)).state_dict() == {}

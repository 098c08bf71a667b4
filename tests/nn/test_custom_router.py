"""A router as a user writes it, with none of what the built-in ones do for overflow and padding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.nn import ROUTERS, LearnedRouter, Routing, RoutingStats, Tokens, register_router

pytestmark = pytest.mark.filterwarnings("ignore:MoE layers are trained with no AuxLossCallback")

D, T = 8, 64


class Twice(LearnedRouter):
    """One expert per token, with a weight that is not its score."""

    def choose(self, x_TD: Tensor, logits_TE: Tensor, tokens: Tokens) -> Routing:
        scores_TE = logits_TE.sigmoid()
        ids_TK = logits_TE.argmax(-1, keepdim=True)
        return Routing(logits_TE, scores_TE, 2 * scores_TE.gather(1, ids_TK), ids_TK)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register_router("twice")(Twice)
    yield
    del ROUTERS["twice"]


def make(**changes: object) -> MoE:
    torch.manual_seed(0)
    return MoE(D, MoEConfig(4, intermediate_size=12, router="twice", **changes))  # type: ignore[arg-type]


def test_next_expert_leaves_the_weights_of_those_that_stay() -> None:
    x = torch.randn(T, D)
    assert torch.equal(make(capacity_factor=100, overflow="next_expert")(x), make()(x))


def test_padding_is_not_assigned_and_takes_no_room() -> None:
    moe = make(capacity_factor=1.0, min_capacity=1)
    seen: list[RoutingStats] = []
    moe.tap.observers.append(seen.append)
    x, valid = torch.randn(T, D, requires_grad=True), torch.arange(T) % 4 == 0
    y = moe(x, valid=valid)
    y.sum().backward()
    assert int(seen[0].tokens_per_expert_E.sum()) == int(valid.sum())
    assert not y[~valid].any()
    assert_close(y[valid], make(capacity_factor=1.0, min_capacity=1)(x[valid]), rtol=1e-6, atol=1e-6)


def test_capacity_goes_by_the_places_that_it_fills() -> None:
    """One per token, whatever ``top_k`` says: an even share is T / 4 rows."""
    moe = make(top_k=2, capacity_factor=1.0, min_capacity=1)
    seen: list[RoutingStats] = []
    moe.tap.observers.append(seen.append)
    with torch.no_grad():
        moe.router.weight.zero_()  # all to expert 0
    moe(torch.randn(T, D)).sum().backward()
    assert int(seen[0].num_dropped) == T - T // 4

"""The layer on several ranks: how often they talk, and that a CUDA graph can hold it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_moe import MoE, MoEConfig
from lightning_moe.nn import experts, placing
from lightning_moe.nn.router import base
from lightning_moe.nn.tap import LossWeights
from lightning_moe.parallel import building_for
from lightning_moe.testing import RankPool
from tests.dispatch.test_dispatchers import LIMIT, groups_of, names
from tests.dispatch.test_fixed_shape import no_waiting

WIDTH = 8


def layer(dispatcher: str, ep_size: int, **fields: Any) -> MoE:
    torch.manual_seed(0)
    with building_for(groups_of(ep_size)):
        moe = MoE(WIDTH, MoEConfig(8, 2, 12, dispatcher=dispatcher, **fields))
    moe.tap.loss_weights = LossWeights(0.1, 0.1)
    return moe


def batch(num_tokens: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(num_tokens, WIDTH, generator=generator, requires_grad=True)


def journeys(dispatcher: str, chunks: int, shared: int, recompute: bool | None) -> tuple[int, int, list[Tensor]]:
    """Collectives started in forward and in backward, and the gradients."""
    moe, x = layer(dispatcher, 2, overlap_chunks=chunks, num_shared_experts=shared), batch()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as forward:
        y: Any = moe(x) if recompute is None else checkpoint(moe, x, use_reentrant=recompute)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as backward:
        y.square().sum().backward()
    counts = [
        sum(number for event, number in Counter(e.name for e in p.events()).items() if event.startswith("c10d::"))
        for p in (forward, backward)
    ]
    assert x.grad is not None
    return counts[0], counts[1], [x.grad, *(p.grad for p in moe.parameters() if p.grad is not None)]


def repeated(dispatcher: str, chunks: int, shared: int, recompute: bool) -> tuple[int, int, int]:
    """Collectives of a forward, of a backward, and what recomputation adds; the gradients are bit for bit the same."""
    forward, backward, grads = journeys(dispatcher, chunks, shared, None)
    first, second, recomputed = journeys(dispatcher, chunks, shared, recompute)
    assert first == forward
    assert all(torch.equal(a, b) for a, b in zip(grads, recomputed, strict=True))
    return forward, backward, second - backward


@names
@pytest.mark.parametrize("shared", [0, 1])
def test_recomputation_brings_no_outputs_back(name: str, shared: int, pool2: RankPool) -> None:
    """Of the sizes, the tokens and the outputs, the last need not travel again."""
    for forward, _, added in pool2.run(repeated, name, 1, shared, False, timeout=LIMIT):
        assert forward == 3
        assert added == 2


@names
def test_reentrant_recomputation_repeats_the_forward_once(name: str, pool2: RankPool) -> None:
    """It cannot know where to stop."""
    for forward, _, added in pool2.run(repeated, name, 1, 0, True, timeout=LIMIT):
        assert added == forward == 3


@names
def test_sizes_are_agreed_once_for_all_chunks(name: str, pool2: RankPool) -> None:
    for forward, _, _ in pool2.run(repeated, name, 3, 0, False, timeout=LIMIT):
        assert forward == 1 + 3 + 3


PADDED = {"capacity_factor": 1.25, "pad_to_capacity": True}


def captured(dispatcher: str) -> None:
    """A pass in which nobody can wait for the device, as in the capture of a CUDA graph."""
    found = []
    for capturing in (False, True):
        moe, x = layer(dispatcher, 2, **PADDED), batch()
        moe(x)  # agrees on the shape
        patch = pytest.MonkeyPatch()
        patch.setattr(experts, "run_in_tiles", by_rows)  # tiles are for the CPU, where looking is free
        patch.setattr(base, "_best_by_passes", lambda *_: None)  # the same
        patch.setattr(placing, "is_capturing", lambda capturing=capturing: capturing)
        try:
            if capturing:
                with no_waiting():
                    y = moe(x)
                    y.square().sum().backward()
            else:
                y = moe(x)
                y.square().sum().backward()
        finally:
            patch.undo()
        assert x.grad is not None
        found.append([y, x.grad, moe.experts.w1.grad, moe.router.weight.grad])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert_close(a, b, rtol=1e-6, atol=1e-6)


def by_rows(x_AD: Tensor, weights_AK: Tensor, plan: Any, w1: Tensor, w2: Tensor, activation: Any) -> Tensor:
    return experts.run_by_rows(x_AD, weights_AK, plan, w1, w2, activation)


@names
def test_a_fixed_shape_can_be_captured(name: str, pool2: RankPool) -> None:
    pool2.run(captured, name, timeout=LIMIT)


def refused(fields: dict[str, Any], message: str, warm: int, num_tokens: int) -> None:
    patch = pytest.MonkeyPatch()
    moe = layer("alltoall", 2, **fields)
    if warm:
        moe(batch(warm))
    patch.setattr(placing, "is_capturing", lambda: True)
    try:
        with pytest.raises(RuntimeError, match=message):
            moe(batch(num_tokens))
    finally:
        patch.undo()


@pytest.mark.parametrize(
    ("fields", "message", "warm"),
    [
        ({}, r"^pad_to_capacity=False: a CUDA graph cannot hold an MoE layer whose sizes depend on the routing\.", 6),
        ({"router": "expert_choice", **PADDED}, r"^router='expert_choice': a CUDA graph cannot hold", 6),
        (PADDED, r"^6 tokens: a CUDA graph is captured, in which ranks cannot agree on a number of tokens\.", 0),
        (PADDED, r"^6 tokens: a CUDA graph is captured", 5),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(fields: dict[str, Any], message: str, warm: int, pool2: RankPool) -> None:
    pool2.run(refused, fields, message, warm, 6, timeout=LIMIT)


def refused_after_evaluation() -> None:
    """Its capacity may be another."""
    moe = layer("fused", 2, eval_capacity_factor=1.0, **PADDED)
    moe.eval()(batch())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "is_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"^6 tokens: a CUDA graph is captured"):
            moe.train()(batch())


def test_a_shape_of_evaluation_is_not_one_of_training(pool2: RankPool) -> None:
    pool2.run(refused_after_evaluation, timeout=LIMIT)

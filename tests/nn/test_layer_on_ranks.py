"""The layer on several ranks: how often they talk, and that a CUDA graph can hold it."""

from __future__ import annotations

import pickle
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


def captured(dispatcher: str, dtype: torch.dtype) -> None:
    """A pass in which nobody can wait for the device, as in the capture of a CUDA graph."""
    found = []
    for capturing in (False, True):
        moe, x = layer(dispatcher, 2, **PADDED).to(dtype), batch().detach().to(dtype).requires_grad_()
        moe(x)  # agrees on the shape
        patch = pytest.MonkeyPatch()
        patch.setattr(experts, "run_in_tiles", experts.run_by_rows)  # tiles are for the CPU, where looking is free
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


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_fixed_shape_can_be_captured(dtype: torch.dtype, name: str, pool2: RankPool) -> None:
    """By grouped_mm, and by a batched product as in a dtype that it does not take: on CUDA all but bf16."""
    pool2.run(captured, name, dtype, timeout=LIMIT)


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


FROZEN = {"nothing": (), "the router": ("router",), "all": ("router", "experts")}


def with_gradient_on(rank: int, dispatcher: str, frozen: str, fields: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
    """The input's gradient, where it has one, and that of one process."""
    moe, x = layer(dispatcher, 2, **fields), batch()
    for name in FROZEN[frozen]:
        moe.get_submodule(name).requires_grad_(False)
    has_gradient = dist.get_rank() == rank
    ids = torch.arange(len(x)) + dist.get_rank()
    y = moe(x.requires_grad_(has_gradient), token_ids=ids)
    assert y.requires_grad
    y.square().sum().backward()
    assert (x.grad is not None) == has_gradient
    torch.manual_seed(0)
    alone = MoE(WIDTH, MoEConfig(8, 2, 12, **fields))
    alone.tap.loss_weights = moe.tap.loss_weights
    z = x.detach().clone().requires_grad_()
    alone(z, token_ids=ids).square().sum().backward()
    assert z.grad is not None
    return x.grad, z.grad


@names
@pytest.mark.parametrize("fields", [{}, {"router": "hash"}, {"capacity_factor": 1.0, "pad_to_capacity": True}], ids=str)
@pytest.mark.parametrize("frozen", FROZEN)
def test_tokens_of_one_rank_alone_have_a_gradient(
    frozen: str, fields: dict[str, Any], name: str, pool2: RankPool
) -> None:
    """As where some ranks' batches hold an image, whose encoder alone is trained; else one would wait for ever."""
    for rank in range(2):
        answers = pool2.run(with_gradient_on, rank, name, frozen, fields, timeout=LIMIT)
        assert answers[1 - rank][0] is None
        if "capacity_factor" not in fields:  # which is that of all ranks together
            assert_close(*answers[rank], rtol=1e-5, atol=1e-6)


def in_float64(dispatcher: str) -> tuple[Tensor, Tensor]:
    """The output of a layer in float64, and that of a loop."""
    moe = layer(dispatcher, 2, router_dtype="float64").double()
    torch.manual_seed(0)
    whole = MoE(WIDTH, MoEConfig(8, 2, 12, router_dtype="float64")).double()
    x = batch().detach().double()
    chosen = (x @ whole.router.weight.T).softmax(-1).topk(2)
    y = torch.zeros_like(x)
    for t, (scores, ids) in enumerate(zip(chosen.values, chosen.indices, strict=True)):
        for weight, expert in zip(scores / scores.sum(), ids.tolist(), strict=True):
            gate, up = (whole.experts.w1[expert] @ x[t]).chunk(2)
            y[t] += weight * (whole.experts.w2[expert] @ (gate * gate.sigmoid() * up))
    return moe(x).detach(), y.detach()


@names
def test_weights_in_float64_stay_so(name: str, pool2: RankPool) -> None:
    for ours, looped in pool2.run(in_float64, name, timeout=LIMIT):
        assert_close(ours, looped, rtol=1e-13, atol=1e-13)


def pickled(ep_size: int) -> str:
    with pytest.raises(TypeError) as error:
        pickle.dumps(layer("fused", ep_size))
    return str(error.value)


def test_a_spread_layer_says_how_to_save_it(pool2: RankPool) -> None:
    assert all("Use trainer.save_checkpoint, or save its state_dict()" in text for text in pool2.run(pickled, 2))
    moe = MoE(WIDTH, MoEConfig(8, 2, 12))
    assert torch.equal(pickle.loads(pickle.dumps(moe)).experts.w1, moe.experts.w1)

"""DeepEP's dispatcher against the torch collectives, on a DeepEP made for CPU ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moe.dispatch import Dispatcher, FixedShape, deep_ep, permute
from lightning_moe.dispatch.deep_ep import DeepEPDispatcher
from lightning_moe.dispatch.deep_ep_buffers import buffer_sizes
from lightning_moe.dispatch.fused import FusedDispatcher
from lightning_moe.nn import GroupedExperts, keep_within_capacity
from lightning_moe.testing import RankPool
from tests.dispatch import fake_deep_ep
from tests.dispatch.test_dispatchers import (
    CASES,
    LAYOUTS,
    LIMIT,
    E,
    cases,
    groups_of,
    identity,
    layouts,
    routes,
    warm_up,
)
from tests.selection import one_in

D, F = 32, 16


@contextmanager
def rounding_as_a_gpu() -> Any:
    """The CPU's embedding_bag, which sums rows, rounds a bf16 tie away from zero; all others to even."""
    before, permute._BAG_DTYPES = permute._BAG_DTYPES, (torch.float32,)
    try:
        yield
    finally:
        permute._BAG_DTYPES = before


@rounding_as_a_gpu()
def run(
    dispatcher: Dispatcher[Any],
    batch: tuple[Tensor, Tensor, Tensor, Tensor | None],
    shape: FixedShape | None = None,
    chunks: int = 1,
    needs_grad: bool = True,
) -> dict[str, Tensor]:
    """Through experts and back."""
    x_TD, ids_TK, scores_TK, kept_TK = batch
    torch.manual_seed(0)
    experts = GroupedExperts(x_TD.shape[1], F, E, "swiglu", dispatcher.groups).to(x_TD.dtype)
    with torch.set_grad_enabled(needs_grad):
        x, scores = (value.clone().requires_grad_(needs_grad) for value in (x_TD, scores_TK))
        parts = [*dispatcher.dispatch(x, scores, dispatcher.plan(ids_TK, kept_TK, shape, chunks))]
        assert len(parts) == chunks
        assert all(part.x_AD.dtype == x.dtype and part.weights_AK.dtype == scores.dtype for part in parts)
        assert all(part.weights_AK.isfinite().all() for part in parts)
        leaving = [dispatcher.combine(experts(part.x_AD, part.weights_AK, part.plan), part) for part in parts]
        y = torch.cat([part.wait() for part in leaving])
    assert y.dtype == x.dtype
    rows = {f"rows {i}": part.plan.rows_E for i, part in enumerate(parts)}
    if not needs_grad:
        return {"y": y, **rows}
    generator = torch.Generator().manual_seed(200 + dist.get_rank())
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    grads = {"x": x.grad, "scores": scores.grad, "w1": experts.w1.grad, "w2": experts.w2.grad}
    assert all(grad is not None for grad in grads.values()), "the graph was cut"
    return {"y": y.detach(), **rows, **cast(dict[str, Tensor], grads)}


def batch_of(
    case: str, ep_size: int, dtype: torch.dtype, width: int = D
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    ids_TK, kept_TK, generator = routes(case, dist.get_rank(), ep_size, top_k=2)
    x_TD = torch.randn(len(ids_TK), width, generator=generator).to(dtype)
    return x_TD, ids_TK, torch.rand(ids_TK.shape, generator=generator), kept_TK


def same_bits(ep_size: int, case: str, chunks: int, needs_grad: bool) -> None:
    """Both sum the ranks' bf16 rows in fp32, in the order of ranks, and round once."""
    groups, batch = groups_of(ep_size), batch_of(case, ep_size, torch.bfloat16)
    with fake_deep_ep.installed():
        ours = run(DeepEPDispatcher(E, groups), batch, chunks=chunks, needs_grad=needs_grad)
    expected = run(FusedDispatcher(E, groups), batch, chunks=chunks, needs_grad=needs_grad)
    assert ours.keys() == expected.keys()
    for what, value in expected.items():
        assert torch.equal(ours[what], value), what
    assert float(ours["y"].float().abs().sum()) > 0 or case in ("all empty", "one rank empty", "one rank drops all")


@pytest.mark.parametrize(
    ("chunks", "needs_grad", "case", "world", "ep_size"), one_in(3, [(1, True), (2, True), (1, False)], CASES, LAYOUTS)
)
def test_bf16_is_that_of_torch_collectives_bit_for_bit(
    world: int, ep_size: int, case: str, chunks: int, needs_grad: bool, get_pool: Callable[..., RankPool]
) -> None:
    pool = get_pool(world)
    pool.run(warm_up, ep_size)
    pool.run(same_bits, ep_size, case, chunks, needs_grad, timeout=LIMIT)


def counted_bytes(ep_size: int, case: str) -> None:
    """Against a plain loop over everybody's tokens; there and back, and the gradients of both."""
    groups, rank = groups_of(ep_size), dist.get_rank() % ep_size
    batch = batch_of(case, ep_size, torch.bfloat16)
    groups.meter.start()
    with fake_deep_ep.installed():
        run(DeepEPDispatcher(E, groups), batch)
    traffic = groups.meter.stop()
    sent, received = 0, 0
    first = dist.get_rank() - rank
    for sender in range(ep_size):
        ids_TK, kept_TK, _ = routes(case, first + sender, ep_size, top_k=2)
        for token in range(len(ids_TK)):
            kept = [kept_TK is None or bool(kept_TK[token, k]) for k in range(2)]
            ranks = {int(ids_TK[token, k]) // (E // ep_size) for k in range(2) if kept[k]} - {sender}
            sent += len(ranks) if sender == rank else 0
            received += rank in ranks
    row, weights, ids = 2 * D, 2 * 4, 2 * 8
    there_and_gradients_back = row + weights + ids, row + weights
    to_others = sent * (there_and_gradients_back[0] + row) + received * (there_and_gradients_back[1] + row)
    from_others = received * (there_and_gradients_back[0] + row) + sent * (there_and_gradients_back[1] + row)
    assert (traffic.sent_bytes, traffic.received_bytes) == (to_others, from_others)
    assert traffic.seconds > 0


@cases
def test_bytes_are_counted(case: str, pool4: RankPool) -> None:
    pool4.run(counted_bytes, 4, case, timeout=LIMIT)


def same_but_for_a_rounding(ep_size: int, case: str) -> None:
    """The kernels round the sum over ranks to bf16, which torch collectives leave in fp32."""
    groups, batch = groups_of(ep_size), batch_of(case, ep_size, torch.float32)
    with fake_deep_ep.installed():
        ours = run(DeepEPDispatcher(E, groups, torch.bfloat16), batch)
    expected = run(FusedDispatcher(E, groups, torch.bfloat16), batch)
    for what, value in expected.items():
        if what in ("y", "x"):
            assert torch.equal(ours[what], value.bfloat16().float()), what
        else:
            assert torch.equal(ours[what], value), what


@cases
def test_fp32_that_travels_as_bf16_differs_by_one_rounding(case: str, pool4: RankPool) -> None:
    pool4.run(same_but_for_a_rounding, 4, case, timeout=LIMIT)


def fixed_shape(ep_size: int, case: str, chunks: int, can_fix: bool) -> None:
    """The kernels' rows behind those that arrived are NaN, and come near no result."""
    groups, (x_TD, ids_TK, scores_TK, kept_TK) = groups_of(ep_size), batch_of(case, ep_size, torch.bfloat16)
    shape = FixedShape(num_tokens=6, rows_per_expert=3)
    kept_TK = keep_within_capacity(ids_TK, scores_TK, E, torch.tensor(3), kept_TK)
    # Every part keeps within the shape of a part by itself.
    per_chunk = shape.of_chunk(chunks).rows_per_expert
    sizes = [len(part) for part in torch.arange(len(x_TD)).tensor_split(chunks)]
    kept_TK = torch.cat(
        [
            keep_within_capacity(ids, scores, E, torch.tensor(per_chunk), kept)
            for ids, scores, kept in zip(ids_TK.split(sizes), scores_TK.split(sizes), kept_TK.split(sizes), strict=True)
        ]
    )
    batch = x_TD, ids_TK, scores_TK, kept_TK
    changes = {} if can_fix else {"Buffer": OldBuffer}
    fake_deep_ep.Buffer.log.clear()
    with fake_deep_ep.installed(**changes):
        deep_ep.buffers_of.cache_clear()
        ours = run(DeepEPDispatcher(E, groups), batch, shape, chunks)
    deep_ep.buffers_of.cache_clear()
    worst = [entry[2] for entry in fake_deep_ep.Buffer.log if entry[:2] == ("dispatch", False)]
    per_rank = min(-(-6 // chunks), per_chunk * (E // ep_size))
    assert worst == [per_rank * ep_size if can_fix else 0] * chunks
    expected = run(FusedDispatcher(E, groups), batch, shape, chunks)
    for what, value in expected.items():
        assert torch.equal(ours[what], value), what


class OldBuffer(fake_deep_ep.Buffer):
    def dispatch(self, x: Tensor, handle: Any = None, async_finish: bool = False, **kwargs: Any) -> tuple[Any, ...]:  # type: ignore[override]
        assert "num_worst_tokens" not in kwargs
        return super().dispatch(x, handle, async_finish=async_finish, **kwargs)


@layouts
@pytest.mark.parametrize(
    ("case", "chunks", "can_fix"),
    [
        ("random", 1, True),
        ("dropped", 2, True),
        ("to one rank", 1, True),
        ("one rank empty", 1, True),
        ("random", 2, False),
    ],
)
def test_fixed_shape(
    world: int, ep_size: int, case: str, chunks: int, can_fix: bool, get_pool: Callable[..., RankPool]
) -> None:
    get_pool(world).run(fixed_shape, ep_size, case, chunks, can_fix, timeout=LIMIT)


def one_buffer(ep_size: int) -> list[tuple[Any, ...]]:
    """Of two widths, and of two layers each; the first layer's backward comes after the buffer grew."""
    groups = groups_of(ep_size)
    fake_deep_ep.Buffer.log.clear()
    deep_ep.buffers_of.cache_clear()
    with fake_deep_ep.installed():
        outputs = []
        for width in (D, D, 2 * D, D):
            x_TD, ids_TK, scores_TK, kept_TK = batch_of("random", ep_size, torch.bfloat16, width)
            dispatcher = DeepEPDispatcher(E, groups)
            x = x_TD.requires_grad_()
            (part,) = dispatcher.dispatch(x, scores_TK, dispatcher.plan(ids_TK, kept_TK))
            before = dict(vars(dispatcher))
            outputs.append((x, dispatcher.combine(identity(part), part).wait()))
            assert vars(dispatcher) == before
        for x, y in reversed(outputs):
            y.sum().backward()
            assert x.grad is not None
            assert x.grad.isfinite().all()
        sizes = buffer_sizes(D, ep_size), buffer_sizes(2 * D, ep_size)
    deep_ep.buffers_of.cache_clear()
    made = [entry for entry in fake_deep_ep.Buffer.log if entry[0] == "new"]
    assert made == [("new", nvlink) for nvlink, _ in sizes]
    return [entry[0] for entry in fake_deep_ep.Buffer.log if entry[0] != "new"]


def test_layers_share_one_buffer_which_grows(pool2: RankPool) -> None:
    for log in pool2.run(one_buffer, 2, timeout=LIMIT):
        forward, backward = ["dispatch", "combine"] * 4, ["dispatch", "combine"] * 4
        assert log == forward + backward


def refusals(ep_size: int) -> None:
    """The stand-in refuses what the real one does, so that the tests above mean something."""
    deep_ep.buffers_of.cache_clear()
    with fake_deep_ep.installed():
        dispatcher = DeepEPDispatcher(E, groups_of(ep_size))
        x_TD, ids_TK, scores_TK, _ = batch_of("random", ep_size, torch.bfloat16)
        (part,) = dispatcher.dispatch(x_TD, scores_TK, dispatcher.plan(ids_TK, None))
        buffer, handle = dispatcher._buffer(D), part.route.handle
        for misuse in (
            lambda: buffer.combine(part.x_AD.float(), handle),
            lambda: buffer.combine(part.x_AD[1:], handle),
            lambda: buffer.dispatch(x_TD, handle=handle, topk_idx=ids_TK, topk_weights=scores_TK),
            lambda: buffer.dispatch(x_TD[1:], handle=handle),
            lambda: buffer.dispatch(x_TD, handle=handle, config=fake_deep_ep.Config(24, 6, 256)),
            lambda: buffer.dispatch(x_TD, handle=handle, async_finish=True, allocate_on_comm_stream=True),
            lambda: buffer.dispatch(x_TD.repeat(1, 40), handle=handle),
        ):
            with pytest.raises(AssertionError):
                misuse()
        with pytest.raises(ValueError, match=r"^dispatch_dtype: DeepEP's kernels move bfloat16, .* torch\.float32\."):
            dispatcher.combine(part.x_AD.float(), part)
        late, _, event = buffer.combine(part.x_AD, handle, async_finish=True)
        assert late.isnan().all()
        event.current_stream_wait()
        assert late.isfinite().all()
    deep_ep.buffers_of.cache_clear()


def test_the_stand_in_refuses_misuse(pool2: RankPool) -> None:
    pool2.run(refusals, 2, timeout=LIMIT)

"""DeepEP's dispatcher against the torch collectives, on a DeepEP made for CPU ranks; and who is chosen, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_module
from torch import Tensor

from lightning_moe.dispatch import Dispatcher, FixedShape, deep_ep, permute
from lightning_moe.dispatch.deep_ep import (
    DeepEPDispatcher,
    HopperDispatcher,
    choose_fused,
    why_not_deep_ep,
    why_not_fixed,
    why_not_hosts,
    why_not_tokens,
)
from lightning_moe.dispatch.deep_ep_buffers import buffer_sizes
from lightning_moe.dispatch.fused import FusedDispatcher
from lightning_moe.nn import GroupedExperts, keep_within_capacity
from lightning_moe.parallel import ExpertGroups
from lightning_moe.testing import RankPool
from tests.dispatch import fake_deep_ep
from tests.dispatch.test_dispatchers import LIMIT, E, cases, groups_of, identity, layouts, routes, warm_up

D, F = 32, 16
INSTALL = "clone github.com/deepseek-ai/DeepEP at v1.2.1 and run `python setup.py install` there"


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


@layouts
@cases
@pytest.mark.parametrize(("chunks", "needs_grad"), [(1, True), (2, True), (1, False)])
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


@contextmanager
def lines_said() -> Any:
    """What is logged, once more in this process."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = rank_zero_module.log
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    deep_ep._say.cache_clear()
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        deep_ep._say.cache_clear()


def chosen_by_dtype(ep_size: int, chunks: int) -> tuple[list[str], list[str]]:
    """On tokens that pretend to be on a GPU."""
    groups = groups_of(ep_size)
    why, deep_ep.why_not_tokens = deep_ep.why_not_tokens, lambda _, *args: why("cuda", *args)
    try:
        said = []
        for dtype in (torch.bfloat16, torch.float32):
            batch = batch_of("dropped", ep_size, dtype)
            with fake_deep_ep.installed(), lines_said() as lines:
                ours = [run(HopperDispatcher(E, groups), batch, chunks=chunks) for _ in range(2)][-1]
            for what, value in run(FusedDispatcher(E, groups), batch, chunks=chunks).items():
                assert torch.equal(ours[what], value), what
            said.append(lines)
    finally:
        deep_ep.why_not_tokens = why
    return said[0], said[1]


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_first_tokens_decide_and_the_log_says_it_once(chunks: int, pool2: RankPool) -> None:
    (bf16, fp32), *others = pool2.run(chosen_by_dtype, 2, chunks, timeout=LIMIT)
    assert bf16 == [
        "dispatcher='fused': DeepEP's kernels, because deep_ep 1.2.1 is installed and the GPUs are Hopper or newer."
    ]
    reason = "DeepEP's kernels move bfloat16 and the tokens travel as float32 (dispatch_dtype='bfloat16')"
    assert fp32 == [f"dispatcher='fused': torch collectives, because {reason}."]
    assert others == [([], [])]  # rank zero only


def chosen_on_cpu(ep_size: int) -> tuple[str, list[str]]:
    with lines_said() as lines:
        dispatchers = [choose_fused(E, groups_of(ep_size)) for _ in range(2)]
    return type(dispatchers[0]).__name__, lines


def test_choice_on_cpu_ranks(pool2: RankPool) -> None:
    gloo = "the ranks talk by cpu:gloo,cuda:gloo and not by NCCL"
    reason = gloo if torch.cuda.is_available() else "there is no CUDA device"
    said = f"dispatcher='fused': torch collectives, because {reason}."
    assert pool2.run(chosen_on_cpu, 2) == [("FusedDispatcher", [said]), ("FusedDispatcher", [])]


def test_choice_without_process_groups() -> None:
    groups = ExpertGroups(2, ep_group=cast(Any, object()))
    with lines_said() as lines:
        assert type(choose_fused(8, groups, torch.bfloat16)) is FusedDispatcher
    assert len(lines) == 1
    with pytest.raises(ValueError, match="this one needs an expert-parallel process group"):
        choose_fused(8, ExpertGroups(2))
    with pytest.raises(ValueError, match="num_experts=7"):
        choose_fused(7, groups)


class Site:
    """Ranks as `why_not_deep_ep` sees them: this one, and what the others answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranks: int = 2) -> None:
        self.patch, self.ranks = monkeypatch.setattr, ranks
        self.others: list[tuple[str | None, str]] = [(None, "this-host")] * (ranks - 1)
        self.patch(torch.cuda, "is_available", lambda: True)
        self.patch(torch.cuda, "get_device_capability", lambda: (9, 0))
        self.patch(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
        self.dist = SimpleNamespace(
            is_initialized=lambda: True,
            get_backend_config=lambda group: "cuda:nccl",
            all_gather_object=self.gather,
        )
        self.patch(deep_ep, "dist", self.dist)  # no more of it: the guards around every test ask torch's
        self.patch(deep_ep.socket, "gethostname", lambda: "this-host")

    def gather(self, answers: list[Any], mine: Any, group: Any) -> None:
        answers[:] = [mine, *self.others]

    def reason(self, num_local_experts: int = 4) -> str | None:
        return why_not_deep_ep(cast(Any, object()), self.ranks, num_local_experts)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Any:
    with fake_deep_ep.installed():
        yield Site(monkeypatch)


def test_nothing_is_in_the_way(site: Site) -> None:
    assert site.reason() is None
    groups = ExpertGroups(2, ep_group=cast(Any, object()))
    with lines_said() as lines:
        assert type(choose_fused(8, groups, torch.bfloat16)) is HopperDispatcher
    assert lines == []  # the first tokens decide


def test_no_cuda_device(site: Site) -> None:
    site.patch(torch.cuda, "is_available", lambda: False)
    assert site.reason() == "there is no CUDA device"


def test_no_process_group(site: Site) -> None:
    site.dist.is_initialized = lambda: False
    assert site.reason() == "no process group is running"


def test_no_nccl(site: Site) -> None:
    site.dist.get_backend_config = lambda group: "cpu:gloo,cuda:gloo"
    assert site.reason() == "the ranks talk by cpu:gloo,cuda:gloo and not by NCCL"


def test_an_older_gpu(site: Site) -> None:
    site.patch(torch.cuda, "get_device_capability", lambda: (8, 0))
    site.others = [("compute capability 8.0 is below 9.0, Hopper's", "this-host")]
    assert site.reason() == "compute capability 8.0 is below 9.0, Hopper's"


def test_gpus_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_deep_ep.installed():
        for ranks, reason in ((2, None), (4, "on this-host NVLink joins NVIDIA H100 PCIe in pairs only")):
            site = Site(monkeypatch, ranks)
            site.patch(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
            assert site.reason() == reason


def without_deep_ep(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(name: str) -> ModuleType:
        assert name == "deep_ep"
        raise error

    monkeypatch.setattr(deep_ep, "import_module", refuse)


def test_not_installed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    without_deep_ep(monkeypatch, ModuleNotFoundError("No module named 'deep_ep'", name="deep_ep"))
    assert site.reason() == f"on this-host deep_ep is not installed ({INSTALL})"
    site.others = [(f"deep_ep is not installed ({INSTALL})", "other-host")]
    with lines_said() as lines:
        choose_fused(8, ExpertGroups(2, ep_group=cast(Any, object())))
    assert lines == [f"dispatcher='fused': torch collectives, because deep_ep is not installed ({INSTALL})."]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'x'", name="x"), "ModuleNotFoundError: No module named 'x'"),
        (ImportError("undefined symbol: y\nmore"), "ImportError: undefined symbol: y"),
        (AssertionError(), "AssertionError: "),
    ],
)
def test_a_broken_installation(site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    without_deep_ep(monkeypatch, error)
    assert site.reason() == f"on this-host deep_ep cannot be imported ({said})"


@pytest.mark.parametrize("buffer", [None, object])
def test_another_interface(monkeypatch: pytest.MonkeyPatch, buffer: Any) -> None:
    with fake_deep_ep.installed(Buffer=buffer):
        reason = "this deep_ep has no class Buffer, the interface of its version 1 (v1.2.1 is known to have it)"
        assert Site(monkeypatch).reason() == f"on this-host {reason}"


def test_a_peer_cannot(site: Site) -> None:
    site.others = [("deep_ep is not there", "other-host")]
    assert site.reason() == "on other-host deep_ep is not there"


def test_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_deep_ep.installed():
        assert Site(monkeypatch, 3).reason() == "on this-host DeepEP's kernels are not made for expert_parallel_size=3"
        without_nvshmem = "deep_ep is built without NVSHMEM, for the ranks of one node only"
        assert Site(monkeypatch, 16).reason() == f"on this-host {without_nvshmem}"
        monkeypatch.setattr(fake_deep_ep.Config, "get_rdma_buffer_size_hint", lambda *_: 4096)
        assert Site(monkeypatch, 16).reason() == "the 16 ranks are not 8 to a node"
        site = Site(monkeypatch, 16)
        site.others = [(None, "this-host")] * 7 + [(None, "other-host")] * 8
        assert site.reason() is None
        assert buffer_sizes(256, 16)[1] == 4096


def test_number_of_experts(site: Site) -> None:
    assert site.reason(128) is None
    assert site.reason(129) == "on this-host 129 experts on a rank are more than 128"


@pytest.mark.parametrize(
    ("hosts", "reason"),
    [
        ("aa", None),
        ("ab", "the 2 ranks are not on one node"),
        ("a" * 4 + "b" * 4, "the 8 ranks are not on one node"),
        ("a" * 8 + "b" * 8, None),
        ("ab" * 8, "the 16 ranks are not 8 to a node"),
        ("a" * 16, "the 16 ranks are not 8 to a node"),
    ],
)
def test_hosts(hosts: str, reason: str | None) -> None:
    assert why_not_hosts([*hosts]) == reason


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (("cuda", torch.bfloat16, 4096, 8, 8), None),
        (("cuda", torch.bfloat16, 8176, 32, 8), None),
        (("cpu", torch.bfloat16, 4096, 8, 8), "the tokens are on cpu"),
        (
            ("cuda", torch.float16, 4096, 8, 8),
            "DeepEP's kernels move bfloat16 and the tokens travel as float16 (dispatch_dtype='bfloat16')",
        ),
        (("cuda", torch.bfloat16, 4104, 8, 8), "hidden_size=4104 is not a multiple of 16 up to 8176"),
        (("cuda", torch.bfloat16, 8192, 8, 8), "hidden_size=8192 is not a multiple of 16 up to 8176"),
        (("cuda", torch.bfloat16, 4112, 8, 8), None),
        (("cuda", torch.bfloat16, 4112, 8, 16), "hidden_size=4112 is not a multiple of 256 up to 8176"),
        (("cuda", torch.bfloat16, 4096, 33, 8), "33 experts of a token are more than 32"),
    ],
)
def test_tokens(tokens: tuple[Any, ...], reason: str | None) -> None:
    assert why_not_tokens(*tokens) == reason


def test_deterministic_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = "cuda", torch.bfloat16, 4096, 8, 8
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    reason = "deterministic torch writes to memory that DeepEP's kernels fill (fill_uninitialized_memory=False)"
    assert why_not_tokens(*tokens) == reason
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        assert why_not_tokens(*tokens) is None
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def test_why_not_fixed() -> None:
    with fake_deep_ep.installed():
        assert why_not_fixed(8) is None
        assert why_not_fixed(16) == "DeepEP's kernels fix sizes within a node only"
    with fake_deep_ep.installed(Buffer=OldBuffer):
        assert why_not_fixed(8) == "this version of DeepEP has no num_worst_tokens"


def test_sizes_that_are_not_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = DeepEPDispatcher(8, ExpertGroups(2, ep_group=cast(Any, object())))
    with fake_deep_ep.installed(Buffer=OldBuffer), lines_said() as lines:
        assert dispatcher._num_worst_tokens(FixedShape(4, 2)) == 0
        reason = "this version of DeepEP has no num_worst_tokens"
        assert lines == [f"dispatcher='fused': the host waits in spite of pad_to_capacity=True, because {reason}."]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"^dispatcher='fused': a CUDA graph cannot hold DeepEP's dispatch, be"):
            dispatcher._num_worst_tokens(FixedShape(4, 2))

"""Who moves the tokens of dispatcher='fused', DeepEP's kernels or torch collectives, and what the log says of why."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_module

from lightning_moe.dispatch import FixedShape, deep_ep
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
from lightning_moe.parallel import ExpertGroups
from lightning_moe.testing import RankPool
from tests.dispatch import fake_deep_ep
from tests.dispatch.test_deep_ep import OldBuffer, batch_of, run
from tests.dispatch.test_dispatchers import LIMIT, E, groups_of

INSTALL = "clone github.com/deepseek-ai/DeepEP at v1.2.1 and run `python setup.py install` there"


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

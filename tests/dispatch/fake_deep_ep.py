"""DeepEP's class ``Buffer`` (1.2.1, within a node) on CPU ranks with gloo: same signatures, same checks, same results.

Stricter than the real one where that shows a mistake: what an operation returns is garbage until its event is waited
for, and the rows behind those that arrived stay garbage, as they do in memory that nobody wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

__version__ = "1.2.1"
topk_idx_t = torch.int64
_GARBAGE = {torch.bfloat16: float("nan"), torch.float32: float("nan"), torch.int64: 10**6, torch.int32: 10**6}


class Config:
    def __init__(self, num_sms: int, send: int, receive: int, rdma_send: int = 6, rdma_receive: int = 128) -> None:
        self.num_sms, self.receive = num_sms, receive

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        slots = self.num_sms // 2 * min(num_ranks, 8) * self.receive
        return -(-slots * (hidden_bytes + 128 * (8 + 4 + 4)) // 128) * 128

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        raise RuntimeError("NVSHMEM is disabled during compilation")


class EventHandle:
    def __init__(self, land: Callable[[], None] = lambda: None) -> None:
        self.land = land

    def current_stream_wait(self) -> None:
        self.land()


class EventOverlap:
    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None) -> None:
        self.event, self.extra_tensors = event, extra_tensors

    def current_stream_wait(self) -> None:
        assert self.event is not None
        self.event.current_stream_wait()


class Buffer:
    num_sms = 20
    log: ClassVar[list[tuple[Any, ...]]] = []  # what was asked of it, for tests

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
    ) -> None:
        assert num_nvl_bytes % 128 == 0
        assert num_rdma_bytes == 0, "within a node"
        sizes: list[Any] = [None] * group.size()
        dist.all_gather_object(sizes, num_nvl_bytes, group)
        assert len(set(sizes)) == 1
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.num_nvl_bytes = num_nvl_bytes
        self.log.append(("new", num_nvl_bytes))

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, 6, 256)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Buffer.get_dispatch_config(num_ranks)

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        _check_events(previous_event, async_finish, allocate_on_comm_stream)
        assert topk_idx.dim() == 2
        assert topk_idx.is_contiguous()
        assert topk_idx.dtype == topk_idx_t
        assert ((topk_idx >= -1) & (topk_idx < num_experts)).all()
        local = num_experts // self.group_size
        is_token_in_rank = torch.stack(
            [((topk_idx >= r * local) & (topk_idx < (r + 1) * local)).any(1) for r in range(self.group_size)], 1
        ).contiguous()
        per_expert = torch.stack([(topk_idx == e).sum() for e in range(num_experts)]).int()
        return is_token_in_rank.sum(0).int(), None, per_expert, is_token_in_rank, _event(lambda: None, async_finish)

    def dispatch(
        self,
        x: Tensor,
        handle: tuple[Tensor, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        config = config or self.get_dispatch_config(self.group_size)
        _check_events(previous_event, async_finish, allocate_on_comm_stream)
        self._check_rows(x, config)
        self.log.append(("dispatch", handle is not None, num_worst_tokens))
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            prefix, channels, _, src_idx, is_token_in_rank, _ = handle
            assert channels.shape == (self.group_size, config.num_sms // 2)
            assert is_token_in_rank.shape == (len(x), self.group_size)
            rows = self._to_ranks(x, is_token_in_rank, prefix)
            recv_x, landed = _arriving(rows, len(src_idx))
            return recv_x, None, None, None, None, _event(landed, async_finish)
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert is_token_in_rank.shape == (len(x), self.group_size)
        assert topk_idx.shape == topk_weights.shape
        assert len(topk_idx) == len(x)
        assert topk_idx.shape[1] <= 32
        assert topk_weights.dtype == torch.float32
        assert topk_idx.is_contiguous()
        assert topk_weights.is_contiguous()
        counts = [torch.empty_like(num_tokens_per_rank) for _ in range(self.group_size)]
        dist.all_gather(counts, num_tokens_per_rank, group=self.group)
        prefix = torch.stack(counts).cumsum(0).int()
        arriving = int(prefix[-1, self.rank])
        assert num_worst_tokens == 0 or arriving <= num_worst_tokens
        local = len(num_tokens_per_expert) // self.group_size
        ids, src_idx = (
            self._to_ranks(t, is_token_in_rank, prefix) for t in (topk_idx, torch.arange(len(x)).unsqueeze(1))
        )
        ids = torch.where(ids // local == self.rank, ids - self.rank * local, -1)
        weights = self._to_ranks(topk_weights, is_token_in_rank, prefix).masked_fill(ids < 0, 0)
        size = num_worst_tokens or arriving
        recv_x, x_landed = _arriving(self._to_ranks(x, is_token_in_rank, prefix), size)
        recv_ids, ids_landed = _arriving(torch.cat([ids, ids.new_full((size - arriving, ids.shape[1]), -1)]), size)
        recv_weights, weights_landed = _arriving(weights, size)
        recv_src_idx, src_landed = _arriving(src_idx[:, 0].int(), size)

        def landed() -> None:
            for land in (x_landed, ids_landed, weights_landed, src_landed):
                land()

        per_expert = [] if num_worst_tokens else [int((ids == e).sum()) for e in range(local)]
        channels = torch.zeros(self.group_size, config.num_sms // 2, dtype=torch.int32)
        send_head = torch.where(is_token_in_rank, 0, -1).int()
        new_handle = (prefix, channels, channels.clone(), recv_src_idx, is_token_in_rank, send_head)
        return recv_x, recv_ids, recv_weights, per_expert, new_handle, _event(landed, async_finish)

    def combine(
        self,
        x: Tensor,
        handle: tuple[Tensor, ...],
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        config = config or self.get_combine_config(self.group_size)
        _check_events(previous_event, async_finish, allocate_on_comm_stream)
        self._check_rows(x, config)
        self.log.append(("combine",))
        prefix, _, channels, src_idx, is_token_in_rank, _ = handle
        assert channels.shape == (self.group_size, config.num_sms // 2)
        assert len(src_idx) == len(x)
        summed = self._to_sources(x, is_token_in_rank, prefix)
        out, landed = _arriving(summed, len(summed))
        if topk_weights is None:
            return out, None, _event(landed, async_finish)
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        assert len(topk_weights) == len(x)
        summed_weights = self._to_sources(topk_weights, is_token_in_rank, prefix)
        out_weights, weights_landed = _arriving(summed_weights, len(summed_weights))
        return out, out_weights, _event(lambda: (landed(), weights_landed())[0], async_finish)

    def _check_rows(self, x: Tensor, config: Config) -> None:
        assert x.dtype == torch.bfloat16
        assert x.dim() == 2
        assert x.is_contiguous()
        assert x.shape[1] % 16 == 0
        assert x.shape[1] <= 8176
        assert config.get_nvl_buffer_size_hint(2 * x.shape[1], self.group_size) <= self.num_nvl_bytes, (
            "buffer too small"
        )

    def _arrivals(self, prefix: Tensor) -> list[int]:
        return torch.diff(prefix[:, self.rank], prepend=prefix.new_zeros(1)).tolist()

    def _to_ranks(self, rows: Tensor, is_token_in_rank: Tensor, prefix: Tensor) -> Tensor:
        leaving = torch.cat([rows[is_token_in_rank[:, r]] for r in range(self.group_size)])
        received = rows.new_empty(int(prefix[-1, self.rank]), *rows.shape[1:])
        splits = self._arrivals(prefix), is_token_in_rank.sum(0).tolist()
        dist.all_to_all_single(received, leaving, *splits, group=self.group)
        return received

    def _to_sources(self, rows: Tensor, is_token_in_rank: Tensor, prefix: Tensor) -> Tensor:
        """Sums in fp32, in the order of ranks, and rounds once."""
        splits = is_token_in_rank.sum(0).tolist()
        leaving = rows[: int(prefix[-1, self.rank])].contiguous()
        received = rows.new_empty(sum(splits), rows.shape[1])
        dist.all_to_all_single(received, leaving, splits, self._arrivals(prefix), group=self.group)
        summed = torch.zeros(len(is_token_in_rank), rows.shape[1])
        for rank, part in enumerate(received.split(splits)):
            summed[is_token_in_rank[:, rank]] += part.float()
        return summed.to(rows.dtype)


def _arriving(rows: Tensor, size: int) -> tuple[Tensor, Callable[[], None]]:
    """Garbage, and what makes it the rows."""
    result = rows.new_full((size, *rows.shape[1:]), _GARBAGE[rows.dtype])

    def land() -> None:
        result[: len(rows)] = rows

    return result, land


def _event(land: Callable[[], None], async_finish: bool) -> EventOverlap:
    if async_finish:
        return EventOverlap(EventHandle(land))
    land()
    return EventOverlap(None)


def _check_events(previous_event: EventOverlap | None, async_finish: bool, on_comm_stream: bool) -> None:
    assert not on_comm_stream or (previous_event is not None and async_finish)
    assert not (torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory)


@contextmanager
def installed(**changes: Any) -> Iterator[ModuleType]:
    """As if ``deep_ep`` were installed in this process."""
    module = ModuleType("deep_ep")
    names = {"Buffer": Buffer, "Config": Config, "EventOverlap": EventOverlap, "topk_idx_t": topk_idx_t}
    vars(module).update(names | {"__version__": __version__} | changes)
    before = sys.modules.get("deep_ep")
    sys.modules["deep_ep"] = module
    try:
        yield module
    finally:
        if before is None:
            del sys.modules["deep_ep"]
        else:
            sys.modules["deep_ep"] = before

"""``fused`` on Hopper GPUs: DeepEP's kernels take every token once to each of its ranks, over NVLink and RDMA.

For the class ``Buffer`` of DeepEP 1.x, normal ("high-throughput") kernels, which DeepEP 2.x keeps as its legacy
interface (github.com/deepseek-ai/DeepEP, DeepSeek 2025). The limits below are those of 1.2.1.

Shapes: T local tokens, D width, K experts per token, E experts, L local experts, W ranks, A tokens that arrive here.
"""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_moe.dispatch.base import Dispatched, Dispatcher, FixedShape, Route, chunk_sizes, ep_group_of
from lightning_moe.dispatch.deep_ep_buffers import RANKS_OF_NODE, buffers_of
from lightning_moe.dispatch.exchange import ExchangeRoute
from lightning_moe.dispatch.fused import FusedDispatcher
from lightning_moe.dispatch.permute import plan_permutation, triton_kernels
from lightning_moe.parallel import ExpertGroups
from lightning_moe.parallel.collectives import Pending, travel

_MAX_LOCAL_EXPERTS = 128
"""Experts of a rank: one thread of a block counts for each."""

_MAX_TOP_K = 32
"""Experts of a token: one lane of a warp copies each."""

_MAX_WIDTH = 8176
"""Half a token and a barrier fit into the 8 KiB that a warp has for its copies."""

_HOW_TO_INSTALL = "clone github.com/deepseek-ai/DeepEP at v1.2.1 and run `python setup.py install` there"

T = TypeVar("T")


@dataclass(frozen=True)
class DeepEPRoute(Route):
    """Adds what the kernels plan from.

    Args:
        topk_ids_TK: The tokens' experts.
        kept_TK: False where an assignment is dropped; ``None`` is dropless.
        shape: Sizes to pad to, of this part; ``None`` moves what there is.
        handle: The kernels' own notes on who sends what to whom, known once tokens are sent; they serve any number
            of ways back and forth.
        moved: Rows to and from other ranks, scalars; 0 while nobody counts.
    """

    topk_ids_TK: Tensor
    kept_TK: Tensor | None
    shape: FixedShape | None
    handle: tuple[Any, ...] | None = None
    moved: tuple[Tensor | int, Tensor | int] = (0, 0)


class DeepEPDispatcher(Dispatcher[DeepEPRoute]):
    """One row per token and rank, in bf16, by DeepEP's kernels.

    The same rows in the same order as :class:`~lightning_moe.dispatch.fused.FusedDispatcher`. The sums over ranks are
    made by the kernels: in fp32 and rounded to bf16 once within a node, once more between nodes.

    ``plan`` waits for nobody: the host waits in ``send``, once for every part, for the number of tokens that arrive.
    With a fixed shape it does not wait at all, see :func:`why_not_fixed`.
    """

    def __init__(self, num_experts: int, groups: ExpertGroups, wire_dtype: torch.dtype | None = None) -> None:
        super().__init__(num_experts, groups, wire_dtype)
        self.group, self.meter = ep_group_of(groups), groups.meter

    @override
    def plan(
        self, topk_ids_TK: Tensor, kept_TK: Tensor | None, shape: FixedShape | None = None, num_chunks: int = 1
    ) -> list[DeepEPRoute]:
        sizes = chunk_sizes(len(topk_ids_TK), num_chunks)
        kept = [None] * num_chunks if kept_TK is None else kept_TK.split(sizes)
        shape = None if shape is None else shape.of_chunk(num_chunks)
        chunks = zip(sizes, topk_ids_TK.split(sizes), kept, strict=True)
        return [DeepEPRoute(size, ids, kept, shape) for size, ids, kept in chunks]

    @override
    def send(self, x_TD: Tensor, topk_scores_TK: Tensor, route: DeepEPRoute) -> Pending[Dispatched[DeepEPRoute]]:
        dtype, scores_dtype, width = x_TD.dtype, topk_scores_TK.dtype, x_TD.shape[1]
        ids_TK, num_worst_tokens = self._ids_for_kernels(route), self._num_worst_tokens(route.shape)
        sent: list[Any] = []  # what `there` learns besides the tensors

        def there(x_TD: Tensor, scores_TK: Tensor) -> Pending[tuple[Tensor, ...]]:
            # No previous_event: the kernels wait for all that this stream has to do so far, as NCCL's do. Nothing but
            # the event makes this stream wait for them.
            buffer = self._buffer(width)
            per_rank, per_node, per_expert, is_in_rank_TW, _ = buffer.get_dispatch_layout(
                ids_TK, self.num_experts, async_finish=True
            )
            x_AD, ids_AK, weights_AK, rows_of_experts, handle, event = buffer.dispatch(
                self._rows(x_TD),
                topk_idx=ids_TK,
                topk_weights=scores_TK.float().contiguous(),
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=is_in_rank_TW,
                num_tokens_per_expert=per_expert,
                async_finish=True,
                **({"num_worst_tokens": num_worst_tokens} if num_worst_tokens else {}),
            )
            sent.extend((handle, None if num_worst_tokens else sum(rows_of_experts)))
            return self._after(event, x_AD.device, lambda: received(x_AD, weights_AK, ids_AK))

        def received(x_AD: Tensor, weights_AK: Tensor, ids_AK: Tensor) -> tuple[Tensor, ...]:
            sent.append(self._moved(ids_TK, ids_AK))
            self._count(sent[2], width, ids_TK.shape[1] * (weights_AK.element_size() + ids_AK.element_size()))
            if num_worst_tokens:  # only the ids say which rows are none; a weight may be whatever was in memory
                weights_AK = weights_AK.masked_fill_(ids_AK < 0, 0)
            return x_AD.to(dtype), weights_AK.to(scores_dtype), ids_AK

        def back(grad_x_AD: Tensor, grad_weights_AK: Tensor) -> Pending[tuple[Tensor, ...]]:
            grad_x_TD, grad_scores_TK, event = self._buffer(width).combine(
                self._rows(grad_x_AD),
                sent[0],
                topk_weights=grad_weights_AK.float().contiguous(),
                async_finish=True,
            )
            self._count(sent[2][::-1], width, grad_weights_AK.shape[1] * grad_scores_TK.element_size())
            return self._after(event, grad_x_TD.device, lambda: (grad_x_TD.to(dtype), grad_scores_TK.to(scores_dtype)))

        pending = travel(there, back, x_TD, topk_scores_TK)

        def arrive(tensors: tuple[Tensor, ...]) -> Dispatched[DeepEPRoute]:
            handle, num_rows, moved = sent
            return self._arrived(replace(route, handle=handle, moved=moved), num_rows, *tensors)

        return pending.then(arrive)

    def _arrived(
        self, route: DeepEPRoute, num_rows: int | None, x_AD: Tensor, weights_AK: Tensor, ids_AK: Tensor
    ) -> Dispatched[DeepEPRoute]:
        rows_per_expert = None if route.shape is None else route.shape.rows_per_expert * self.groups.ep_size
        ids_AK = ids_AK.long()  # of local experts; -1 where the expert is on another rank
        plan = plan_permutation(ids_AK, len(self.local_experts), ids_AK >= 0, num_rows, rows_per_expert)
        return Dispatched(x_AD, weights_AK, plan, route)

    @override
    def combine(self, y_AD: Tensor, state: Dispatched[DeepEPRoute]) -> Pending[Tensor]:
        dtype, width, handle, moved = y_AD.dtype, y_AD.shape[1], state.route.handle, state.route.moved

        def there(y_AD: Tensor) -> Pending[tuple[Tensor, ...]]:
            self._count(moved[::-1], width)
            y_TD, _, event = self._buffer(width).combine(self._rows(y_AD), handle, async_finish=True)
            return self._after(event, y_TD.device, lambda: (y_TD.to(dtype),))

        def back(grad_TD: Tensor) -> Pending[tuple[Tensor, ...]]:
            rows = self._rows(grad_TD)
            self._count(moved, width)
            grad_AD, *_, event = self._buffer(width).dispatch(rows, handle=handle, async_finish=True)
            return self._after(event, grad_AD.device, lambda: (grad_AD.to(dtype),))

        return travel(there, back, y_AD).then(lambda arrived: arrived[0])

    def _rows(self, rows: Tensor) -> Tensor:
        wire_dtype = self.on_wire(rows.dtype)
        if wire_dtype != torch.bfloat16:
            raise ValueError(
                f"dispatch_dtype: DeepEP's kernels move bfloat16, and these rows are {rows.dtype}. Return the experts' "
                "outputs in the dtype of their input, or use dispatch_dtype='bfloat16'."
            )
        return rows.to(wire_dtype).contiguous()

    def _ids_for_kernels(self, route: DeepEPRoute) -> Tensor:
        ids_TK = route.topk_ids_TK if route.kept_TK is None else torch.where(route.kept_TK, route.topk_ids_TK, -1)
        return ids_TK.to(getattr(import_module("deep_ep"), "topk_idx_t", torch.int64)).contiguous()

    def _num_worst_tokens(self, shape: FixedShape | None) -> int:
        """Rows to reserve, so that the host need not learn how many arrive; 0 where it has to."""
        if shape is None:
            return 0
        if (reason := why_not_fixed(self.groups.ep_size)) is None:
            per_rank = min(shape.num_tokens, shape.rows_per_expert * len(self.local_experts))
            return max(per_rank * self.groups.ep_size, 1)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"dispatcher='fused': a CUDA graph cannot hold DeepEP's dispatch, because {reason}. "
                "Use dispatcher='alltoall', or leave the layer out of the graph."
            )
        _say(f"dispatcher='fused': the host waits in spite of pad_to_capacity=True, because {reason}.")
        return 0

    def _buffer(self, width: int) -> Any:
        return buffers_of(self.group).for_width(width)

    def _moved(self, ids_TK: Tensor, ids_AK: Tensor) -> tuple[Tensor | int, Tensor | int]:
        """Rows to and from other ranks, of the experts that they are for: global and local ids, -1 is none."""
        if not self.meter.is_on:
            return 0, 0
        rank_TK = ids_TK.div(len(self.local_experts), rounding_mode="floor")
        is_mine_T = (rank_TK == self.groups.ep_rank).any(1)
        to_all = sum((rank_TK == rank).any(1).sum() for rank in range(self.groups.ep_size))
        return to_all - is_mine_T.sum(), (ids_AK >= 0).any(1).sum() - is_mine_T.sum()

    def _count(self, moved: tuple[Tensor | int, Tensor | int], width: int, further_bytes: int = 0) -> None:
        self.meter.add(*(number * (2 * width + further_bytes) for number in moved))  # rows are bfloat16

    def _after(self, event: Any, device: torch.device, result: Callable[[], T]) -> Pending[T]:
        def wait() -> T:
            with self.meter.waiting(device):
                event.current_stream_wait()
            return result()

        return Pending(wait)


class HopperDispatcher(Dispatcher[Any]):
    """``fused`` where DeepEP can run: its kernels for tokens that they take, torch collectives for others.

    The dtype of the tokens is not known before they come. It is the same on all ranks, and so is what this one does.
    """

    def __init__(self, num_experts: int, groups: ExpertGroups, wire_dtype: torch.dtype | None = None) -> None:
        super().__init__(num_experts, groups, wire_dtype)
        self.kernels = DeepEPDispatcher(num_experts, groups, wire_dtype)
        self.collectives = FusedDispatcher(num_experts, groups, wire_dtype)

    @override
    def plan(
        self, topk_ids_TK: Tensor, kept_TK: Tensor | None, shape: FixedShape | None = None, num_chunks: int = 1
    ) -> list[DeepEPRoute]:
        return self.kernels.plan(topk_ids_TK, kept_TK, shape, num_chunks)

    @override
    def send(self, x_TD: Tensor, topk_scores_TK: Tensor, route: DeepEPRoute) -> Pending[Dispatched[Any]]:
        wire_dtype, top_k = self.on_wire(x_TD.dtype), topk_scores_TK.shape[1]
        reason = why_not_tokens(x_TD.device.type, wire_dtype, x_TD.shape[1], top_k, self.groups.ep_size)
        _say(_which_runs(reason))
        if reason is None:
            return self.kernels.send(x_TD, topk_scores_TK, route)
        (planned,) = self.collectives.plan(route.topk_ids_TK, route.kept_TK, route.shape)
        return self.collectives.send(x_TD, topk_scores_TK, planned)

    @override
    def combine(self, y_AD: Tensor, state: Dispatched[Any]) -> Pending[Tensor]:
        if isinstance(state.route, ExchangeRoute):
            return self.collectives.combine(y_AD, state)
        return self.kernels.combine(y_AD, state)


def choose_fused(num_experts: int, groups: ExpertGroups, wire_dtype: torch.dtype | None = None) -> Dispatcher[Any]:
    """What ``fused`` stands for in these groups; the log says it once, where DeepEP can run with the first tokens.

    Collective over the EP group where that has NCCL.

    Raises:
        ValueError: the groups have no process group, or ``num_experts`` is not divisible by its size.
    """
    num_local_experts = len(groups.local_experts(num_experts))
    if reason := why_not_deep_ep(ep_group_of(groups), groups.ep_size, num_local_experts):
        _say(_which_runs(reason))
        return FusedDispatcher(num_experts, groups, wire_dtype)
    return HopperDispatcher(num_experts, groups, wire_dtype)


def why_not_deep_ep(group: dist.ProcessGroup, ep_size: int, num_local_experts: int) -> str | None:
    """Why DeepEP's kernels cannot serve this group, or ``None``; the same on all its ranks.

    Collective over the group where it has NCCL: a rank that went another way than its peers would hang them all.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not dist.is_initialized():
        return "no process group is running"
    if "nccl" not in (backend := dist.get_backend_config(group)):
        return f"the ranks talk by {backend} and not by NCCL"
    answers: list[Any] = [None] * ep_size
    dist.all_gather_object(answers, (_why_not_here(ep_size, num_local_experts), socket.gethostname()), group=group)
    for reason, host in answers:
        if reason is not None:
            return f"on {host} {reason}" if any(other != reason for other, _ in answers) else reason
    return why_not_hosts([host for _, host in answers])


def _why_not_here(ep_size: int, num_local_experts: int) -> str | None:
    if (capability := torch.cuda.get_device_capability()) < (9, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 9.0, Hopper's"
    if ep_size > 2 and (name := torch.cuda.get_device_name()).endswith(("PCIe", "NVL")):
        return f"NVLink joins {name} in pairs only"
    try:
        buffer: Any = getattr(import_module("deep_ep"), "Buffer", None)
    except ModuleNotFoundError as error:
        return f"deep_ep is not installed ({_HOW_TO_INSTALL})" if error.name == "deep_ep" else _broken(error)
    except (ImportError, AssertionError, OSError, RuntimeError) as error:  # its import checks libraries
        return _broken(error)
    if not hasattr(buffer, "get_dispatch_layout"):
        return "this deep_ep has no class Buffer, the interface of its version 1 (v1.2.1 is known to have it)"
    try:
        config = buffer.get_dispatch_config(ep_size)
    except AssertionError:
        return f"DeepEP's kernels are not made for expert_parallel_size={ep_size}"
    if ep_size > RANKS_OF_NODE:
        try:
            config.get_rdma_buffer_size_hint(256, ep_size)
        except RuntimeError:
            return "deep_ep is built without NVSHMEM, for the ranks of one node only"
    if num_local_experts > _MAX_LOCAL_EXPERTS:
        return f"{num_local_experts} experts on a rank are more than {_MAX_LOCAL_EXPERTS}"
    return None


def _broken(error: Exception) -> str:
    first_line = next(iter(str(error).splitlines()), "")
    return f"deep_ep cannot be imported ({type(error).__name__}: {first_line})"


def why_not_hosts(hosts: Sequence[str]) -> str | None:
    """Why the kernels cannot serve ranks that live on these hosts, or ``None``.

    >>> why_not_hosts(["a", "a", "b", "b"])
    'the 4 ranks are not on one node'
    >>> why_not_hosts(["a"] * 8 + ["b"] * 8)
    """
    if len(hosts) <= RANKS_OF_NODE:
        return None if len(set(hosts)) == 1 else f"the {len(hosts)} ranks are not on one node"
    nodes = [set(hosts[start : start + RANKS_OF_NODE]) for start in range(0, len(hosts), RANKS_OF_NODE)]
    if any(len(node) > 1 for node in nodes) or len(set.union(*nodes)) < len(nodes):
        return f"the {len(hosts)} ranks are not {RANKS_OF_NODE} to a node"
    return None


def why_not_tokens(device_type: str, wire_dtype: torch.dtype, width: int, top_k: int, ep_size: int) -> str | None:
    """Why the kernels cannot move such tokens, or ``None``.

    >>> why_not_tokens("cuda", torch.float32, 1024, 2, 8)
    "DeepEP's kernels move bfloat16 and the tokens travel as float32 (dispatch_dtype='bfloat16')"
    """
    multiple = 256 if ep_size > RANKS_OF_NODE else 16
    if device_type != "cuda":
        return f"the tokens are on {device_type}"
    if wire_dtype != torch.bfloat16:
        name = str(wire_dtype).removeprefix("torch.")
        return f"DeepEP's kernels move bfloat16 and the tokens travel as {name} (dispatch_dtype='bfloat16')"
    if width % multiple or width > _MAX_WIDTH:
        return f"hidden_size={width} is not a multiple of {multiple} up to {_MAX_WIDTH}"
    if top_k > _MAX_TOP_K:
        return f"{top_k} experts of a token are more than {_MAX_TOP_K}"
    fills_memory = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if torch.are_deterministic_algorithms_enabled() and fills_memory:
        return "deterministic torch writes to memory that DeepEP's kernels fill (fill_uninitialized_memory=False)"
    return None


def why_not_fixed(ep_size: int) -> str | None:
    """Why the host has to wait for sizes even where they are fixed, or ``None``."""
    if ep_size > RANKS_OF_NODE:
        return "DeepEP's kernels fix sizes within a node only"
    if "num_worst_tokens" not in inspect.signature(import_module("deep_ep").Buffer.dispatch).parameters:
        return "this version of DeepEP has no num_worst_tokens"
    return None


def _which_runs(reason: str | None) -> str:
    if reason is not None:
        kernels = " with Triton kernels" if torch.cuda.is_available() and triton_kernels() else ""
        return f"dispatcher='fused': torch collectives{kernels}, because {reason}."
    version = getattr(import_module("deep_ep"), "__version__", "of unknown version")
    why = f"deep_ep {version} is installed and the GPUs are Hopper or newer"
    return f"dispatcher='fused': DeepEP's kernels, because {why}."


@cache
def _say(line: str) -> None:
    """Once in a process: every layer has the same to say."""
    rank_zero_info(line)

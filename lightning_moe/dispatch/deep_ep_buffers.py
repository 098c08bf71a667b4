"""The memory through which DeepEP's kernels send."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch.distributed as dist

RANKS_OF_NODE = 8
"""Ranks that NVLink joins; in a larger group every 8 consecutive ranks are a node."""


class Buffers:
    """The memory of one group through which all layers send, forward and backward: their transfers follow each other.

    Args:
        group: Its ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.buffer: Any = None
        self.width = 0

    def for_width(self, width: int) -> Any:
        """A buffer for tokens of this width or a smaller one. Collective where a wider one is needed."""
        if width > self.width:
            self.buffer, self.width = None, width  # the old one is given back first; handles outlive it
            self.buffer = import_module("deep_ep").Buffer(self.group, *buffer_sizes(width, self.group.size()))
        return self.buffer


@cache
def buffers_of(group: dist.ProcessGroup) -> Buffers:
    """As long as the process lives: a buffer's end is collective, and not to be left to the garbage collector."""
    return Buffers(group)


def buffer_sizes(width: int, ep_size: int) -> tuple[int, int]:
    """Bytes of a buffer that NVLink reaches and of one that RDMA reaches."""
    buffer, num_bytes = import_module("deep_ep").Buffer, 2 * width
    configs = buffer.get_dispatch_config(ep_size), buffer.get_combine_config(ep_size)
    nvlink = max(config.get_nvl_buffer_size_hint(num_bytes, ep_size) for config in configs)
    if ep_size <= RANKS_OF_NODE:  # a build without NVSHMEM refuses the question
        return nvlink, 0
    return nvlink, max(config.get_rdma_buffer_size_hint(num_bytes, ep_size) for config in configs)

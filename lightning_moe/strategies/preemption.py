"""Signals that end a run early, agreed on by all ranks before any of them acts.

Lightning 2.6 calls collectives from inside its handlers (SIGTERM broadcasts, SLURM's SIGUSR1 saves a checkpoint), while
other ranks are in the middle of others: they hang (its issue 20806). Here a handler only takes note. All ranks learn of
it with a batch of theirs, and act together at the end of one that takes an optimizer step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

Handler = Callable[..., Any]
_END, _REQUEUE = 0, 1


class Preemption(L.Callback):
    """Watches for SIGTERM, and under SLURM for the signal that asks for a requeue, while a Trainer fits."""

    def __init__(self) -> None:
        self._requested = torch.zeros(2, dtype=torch.int32)  # of this rank, and of any
        self._agreed = torch.zeros(2, dtype=torch.int32)
        self._asking: tuple[dist.Work, Tensor] | None = None
        self._requeue: Callable[[], Any] | None = None
        self._group: dist.ProcessGroup | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._requested.zero_()
        self._agreed.zero_()
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # its own: a save in the background has another
        if threading.current_thread() is not threading.main_thread():
            return
        # Lightning puts back what was there before its own handlers, and so before these.
        before = trainer._signal_connector._original_handlers.get(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._note(_END, before if callable(before) else None))
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            number = environment.requeue_signal or signal.SIGUSR1
            handler = signal.getsignal(number)
            if callable(handler):
                self._requeue = partial(handler, number, None)
                signal.signal(number, self._note(_REQUEUE, None))

    def _note(self, what: int, then: Handler | None) -> Handler:
        def handle(signum: int, frame: FrameType | None) -> None:
            self._requested[what] = 1
            if then is not None:
                then(signum, frame)

        return handle

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Hears what ranks asked for by the batch before, and asks again; nobody waits for the answer."""
        self._hear()
        asked = self._requested.clone()
        if self._group is None:
            self._agreed = torch.maximum(self._agreed, asked)
        else:
            self._asking = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True), asked

    def _hear(self) -> None:
        if self._asking is not None:
            (work, asked), self._asking = self._asking, None
            work.wait()
            self._agreed = torch.maximum(self._agreed, asked)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not self._agreed.any() or trainer.fit_loop._should_accumulate():
            return  # between two steps a checkpoint would lack the gradients of the micro-batches before
        if self._agreed[_REQUEUE] and self._requeue is not None:
            self._requested[_REQUEUE] = self._agreed[_REQUEUE] = 0
            self._requeue()
        if self._agreed[_END] and not trainer.received_sigterm:
            rank_zero_info("SIGTERM: the run ends here.")
            trainer._signal_connector.received_sigterm = True  # Lightning looks at it when the batch is over

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._hear()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._asking = None
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

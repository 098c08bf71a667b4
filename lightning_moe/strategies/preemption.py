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
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_moe.strategies.agreement import Agreement

Handler = Callable[..., Any]
_END, _REQUEUE = 0, 1
NUM_REQUESTS = 2


class Preemption(L.Callback):
    """Watches for SIGTERM, and under SLURM for the signal that asks for a requeue, while a Trainer fits.

    Args:
        agreement: Of ``NUM_REQUESTS``; among the Trainer's callbacks before this one.
    """

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._requeue: Callable[[], Any] | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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
            self._agreement.requested[what] = 1
            if then is not None:
                then(signum, frame)

        return handle

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        requested, agreed = self._agreement.requested, self._agreement.agreed
        if not agreed.any() or trainer.fit_loop._should_accumulate():
            return  # between two steps a checkpoint would lack the gradients of the micro-batches before
        if agreed[_REQUEUE] and self._requeue is not None:
            requested[_REQUEUE] = agreed[_REQUEUE] = 0
            self._requeue()
        if agreed[_END] and not trainer.received_sigterm:
            rank_zero_info("SIGTERM: the run ends here.")
            trainer._signal_connector.received_sigterm = True  # Lightning looks at it when the batch is over

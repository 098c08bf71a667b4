"""What ranks tell each other with every batch, so that none waits for one that does something else.

Each asks when a batch begins, and hears what any has said when its forward pass is over, which has brought the ranks
together anyway: so nobody waits long. It is before the backward pass, in which a rank whose epoch ends takes an
optimizer step, while others would accumulate.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store
from typing_extensions import override

_PATIENCE = 10.0  # seconds between the failures of ranks that fail together
_NONE, _LAST, _MORE = range(3)  # what a rank says of its batches: it has none, this is the last, there are more


class Agreement(L.Callback):
    """Refuses ranks with different numbers of batches, in training and evaluation, and passes on requests.

    Where a step takes the iterator of its loader, nobody knows which batch is the last, and nothing is refused.

    Args:
        num_requests: Number of things that a rank may ask all for.

    Attributes:
        requested: 1 for each of them that this rank asks for.
        agreed: 1 for each that any has asked for; the same on every rank when a batch ends.
    """

    def __init__(self, num_requests: int) -> None:
        self.requested = torch.zeros(num_requests, dtype=torch.int32)
        self.agreed = torch.zeros(num_requests, dtype=torch.int32)
        self._forget()

    def _forget(self) -> None:
        self.requested.zero_()
        self.agreed.zero_()
        self._group: dist.ProcessGroup | None = None
        self._asking: tuple[dist.Work | None, Tensor, str, int] | None = None
        self._asked = 0  # times
        self._had_batch = False  # in this epoch of training

    def _ask(self, trainer: L.Trainer, batches: int, number: int) -> None:
        asked, work = torch.cat([self.requested, torch.zeros(3, dtype=torch.int32)]), None
        asked[len(self.requested) + batches] = 1
        self._asked += 1
        if trainer.world_size > 1:
            if self._group is None:
                self._group = dist.new_group(backend="gloo")  # its own: a save in the background has another
            work = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True)
        stage = trainer.state.stage
        assert stage is not None
        self._asking = work, asked, stage.dataloader_prefix or "", number

    def _hear(self) -> None:
        """Waits for the answer, if something was asked.

        Raises:
            MisconfigurationException: some ranks have batches where others have none; all raise it.
        """
        if self._asking is None:
            return
        (work, asked, stage, number), self._asking = self._asking, None
        if work is not None:
            work.wait()
        requested, batches = asked.split([len(self.requested), 3])
        self.agreed = torch.maximum(self.agreed, requested)
        if batches.sum() > 1:
            problem = f"batch {number} is the last one of some ranks, and others have more"
            remedy = f"Give each rank as many, as DistributedSampler does, or use limit_{stage}_batches={number}."
            if batches[_NONE]:
                problem, remedy = "some ranks have no batch, and others have", "Give each rank as many."
            raise MisconfigurationException(
                f"{stage}_dataloader: {problem}. Experts are spread over ranks, which take batches together. {remedy}"
            )

    def _begin(self, trainer: L.Trainer, batch_idx: int) -> None:
        loop: Any = trainer.fit_loop.epoch_loop if trainer.training else trainer._active_loop
        self._ask(trainer, _LAST if loop.batch_progress.is_last_batch else _MORE, batch_idx + 1)

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._begin(trainer, batch_idx)
        if not self._had_batch:
            self._had_batch = True
            self._hear()  # at once: a rank without any batch comes into no forward pass

    @override
    def on_before_backward(self, *_: Any) -> None:
        self._hear()

    @override
    def on_train_batch_end(self, *_: Any) -> None:  # manual optimization may have had no backward pass
        self._hear()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self._had_batch:
            self._ask(trainer, _NONE, 0)
            self._hear()
        self._had_batch = False

    def _begin_evaluation(self, trainer: L.Trainer) -> None:
        """Unlike in training, the first batches are fetched by now, if there are any."""
        loop: Any = trainer._active_loop
        self._ask(trainer, _NONE if loop._data_fetcher.done else _MORE, 0)
        self._hear()

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._begin_evaluation(trainer)

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._begin(trainer, batch_idx)

    @override
    def on_validation_batch_end(self, *_: Any) -> None:
        self._hear()

    @override
    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._begin_evaluation(trainer)

    @override
    def on_test_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self._begin(trainer, batch_idx)

    @override
    def on_test_batch_end(self, *_: Any) -> None:
        self._hear()

    @override
    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._begin_evaluation(trainer)

    @override
    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self._begin(trainer, batch_idx)

    @override
    def on_predict_batch_end(self, *_: Any) -> None:
        self._hear()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """A checkpoint is the work of all ranks: one that fails by itself would wait for the others for ever.

        Raises:
            RuntimeError: a callback would save one now, and not all ranks have failed.
        """
        saves = [
            callback
            for callback in trainer.checkpoint_callbacks
            if getattr(callback, "save_on_exception", False) or isinstance(callback, OnExceptionCheckpoint)
        ]
        alone = bool(saves) and self._group is not None and not self._all_fail(self._group)
        self._forget()  # and not the group: its end could wait for ranks that are gone
        if alone:
            raise RuntimeError(
                f"{type(saves[0]).__name__}: no checkpoint is saved on this {type(exception).__name__}, because not "
                "all ranks have failed, and a checkpoint takes all of them."
            ) from exception

    def _all_fail(self, group: dist.ProcessGroup) -> bool:
        """By the store: a collective that others do not come to could not be given up, and would hold up the end."""
        store, world = _get_default_store(), dist.get_world_size(group)
        keys = [f"lightning_moe/failed/{group.group_name}/{self._asked}/{rank}" for rank in range(world)]
        try:
            store.set(keys[dist.get_rank(group)], "")
            store.wait(keys, timedelta(seconds=_PATIENCE))
        except RuntimeError:
            return False
        return True

    @override
    def teardown(self, *_: Any, **__: Any) -> None:
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._forget()

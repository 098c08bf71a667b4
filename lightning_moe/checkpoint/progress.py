"""Lightning's counts of epochs and batches, as a checkpoint has them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any


def before_epoch_end(loop: dict[str, Any], max_epochs: int | None) -> dict[str, Any]:
    """The state of a fit loop that was saved at the end of an epoch, as it was before that epoch counted as over.

    From the former, Lightning 2.6 goes on with an epoch of one batch when there is no validation, and counts a step
    of its loggers twice when there is; from the latter, which it saves in ``on_train_batch_end``, it goes on rightly.

    Args:
        loop: ``checkpoint["loops"]["fit_loop"]``.
        max_epochs: Of the run that resumes; a run that has them all is left alone.
    """
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    is_over = (
        batches["is_last_batch"]
        and batches["current"]["completed"] == batches["current"]["ready"] > 0
        and epochs["current"]["processed"] == epochs["current"]["ready"]
    )
    if not is_over or (max_epochs is not None and 0 <= max_epochs <= epochs["current"]["processed"]):
        return loop
    loop = deepcopy(loop)
    for kind in ("total", "current"):
        loop["epoch_loop.batch_progress"][kind]["completed"] -= 1
        epoch = loop["epoch_progress"][kind]
        epoch["processed"] = epoch["completed"] = epoch["ready"] - 1
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    return loop


def is_within_epoch(loop: dict[str, Any]) -> bool:
    """Whether the state of a fit loop was saved between two batches of an epoch."""
    batches = loop["epoch_loop.batch_progress"]
    return bool(batches["current"]["ready"]) and not batches["is_last_batch"]

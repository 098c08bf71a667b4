"""What our own backward passes share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Grads = TypeVar("Grads")


def first_order(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """Makes a ``backward`` refuse gradients of gradients: see :func:`check_first_order`."""

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Grads:
        check_first_order()
        return backward(ctx, *grads)

    return checked


def check_first_order() -> None:
    """For a backward whose result has no graph of its own.

    torch's ``once_differentiable`` puts an error on the way of gradients of gradients, but ``torch.autograd.grad``
    leaves out whatever leads to none of its inputs, and that error with it: the gradient would be wrong in silence.

    Raises:
        RuntimeError: backward was called with ``create_graph=True``.
    """
    if torch.is_grad_enabled():  # in backward, only to make a graph of it
        raise RuntimeError(
            "create_graph=True: the gradient of a gradient does not pass through the experts of an MoE layer. Take the "
            "penalty's gradient with respect to other parts of the model only, or without create_graph."
        )


def in_backward() -> bool:
    """Whether this thread is in a backward pass, where a forward can only be a recomputation."""
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint knows it

"""Moving tokens to their experts and back."""

from lightning_moe.dispatch.base import Dispatched, Dispatcher
from lightning_moe.dispatch.registry import DISPATCHERS, make_dispatcher

__all__ = ["DISPATCHERS", "Dispatched", "Dispatcher", "make_dispatcher"]

"""Moving tokens to their experts and back."""

from lightning_moe.dispatch.base import Dispatched, Dispatcher, FixedShape
from lightning_moe.dispatch.registry import DISPATCHERS, make_dispatcher

__all__ = ["DISPATCHERS", "Dispatched", "Dispatcher", "FixedShape", "make_dispatcher"]

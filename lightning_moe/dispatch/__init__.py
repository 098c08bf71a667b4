"""Moving tokens to their experts and back."""

from lightning_moe.dispatch.base import Dispatched, Dispatcher, FixedShape, Route
from lightning_moe.dispatch.registry import DISPATCHERS, make_dispatcher, make_tuner
from lightning_moe.dispatch.tune import DispatchTuner

__all__ = [
    "DISPATCHERS",
    "DispatchTuner",
    "Dispatched",
    "Dispatcher",
    "FixedShape",
    "Route",
    "make_dispatcher",
    "make_tuner",
]

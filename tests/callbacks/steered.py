"""Routers that go by the data, for a guard to watch, and what it says.

Which experts a token gets is in the data: layer 0 reads features 0 to 3, one for each expert, and layer 1 the others.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moe.callbacks.collapse_guard import RouterCollapseGuard
from lightning_moe.data import ResumableDataLoader
from tests.callbacks.runs import Side, layers_of, quiet
from tests.toy import WIDTH

Pairs = list[tuple[int, int]]  # of experts, best first
EVEN: Pairs = [(0, 1), (1, 2), (2, 3), (3, 0)]
COLLAPSED: Pairs = [(0, 1), (1, 0)]
PATIENCE, CHECK = 6, 3


def tokens(pairs: Pairs, others: Pairs = EVEN, count: int = 16, sharp: float = 1.0) -> tuple[Tensor, Tensor]:
    """A batch of one sequence whose tokens go to these experts in turn, in layer 0 and in layer 1."""
    x = torch.zeros(1, count, WIDTH)
    for token, (mine, other) in enumerate(islice(zip(cycle(pairs), cycle(others), strict=False), count)):
        for features, (first, second) in ((0, mine), (4, other)):
            x[0, token, features + first], x[0, token, features + second] = 2 * sharp, sharp
    return x, torch.zeros(1, count, 3)


class Steered(Side):
    """Routers that go by the data; a token of zeros is padding. It keeps the gradients of the routers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.router_gradients: list[float] = []
        super().__init__(*args, **{"learning_rate": 0.0, **kwargs})

    def build(self) -> None:
        super().build()
        for index, layer in enumerate(layers_of(self)):
            layer.router.weight.data = torch.eye(WIDTH)[4 * index : 4 * index + 4].clone()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x)
        for block in self.blocks:
            y = y + block(x, x.abs().sum(-1) > 0)
        return self.out(torch.tanh(y))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grad = layers_of(self)[0].router.weight.grad
        if grad is not None:
            self.router_gradients.append(float(grad.norm()))


def batches(data: Sequence[tuple[Tensor, Tensor]]) -> DataLoader[Any]:
    return ResumableDataLoader(list(data), batch_size=None)


class Heard:
    """What the guard says while it is entered."""

    steps = 0

    def __enter__(self) -> Heard:
        self.warned: list[str] = []
        self.told: list[str] = []
        self._caught = warnings.catch_warnings(record=True)
        self._warnings = self._caught.__enter__()
        warnings.simplefilter("always")
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self.told.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(self._handler)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("lightning.pytorch.utilities.rank_zero").removeHandler(self._handler)
        self._caught.__exit__(None, None, None)
        mine = "RouterCollapseGuard"
        self.warned = [text for w in self._warnings or [] if (text := str(w.message)).startswith(mine)]
        self.told = [text for text in self.told if text.startswith(mine)]


def guard(**options: Any) -> RouterCollapseGuard:
    return RouterCollapseGuard(**{"patience": PATIENCE, "check_every_n_steps": CHECK, **options})


def steps_of(texts: list[str]) -> list[int]:
    return [int(found.group(1)) for text in texts if (found := re.match(r"RouterCollapseGuard, step (\d+)", text))]


def guarded(data: Sequence[tuple[Tensor, Tensor]], watch: RouterCollapseGuard, **options: Any) -> Heard:
    """A run of one process over the data, once."""
    model = options.pop("model", None) or Steered()
    extra, validation = options.pop("callbacks", []), options.pop("validation", None)
    with Heard() as heard:
        trainer = quiet(callbacks=[*extra, watch], max_epochs=1, **options)
        trainer.fit(model, batches(data), *([] if validation is None else [batches(validation)]))
    heard.steps = trainer.global_step
    assert not any(layer.tap.watchers for layer in layers_of(model))
    return heard

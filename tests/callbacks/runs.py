"""Runs that the tests of the callbacks share, and a model whose routers plain loops can follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_moe import ExpertParallelStrategy, MoE
from lightning_moe.nn.router import LearnedRouter
from tests.toy import BATCH, Toy, ToyData


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[dict[str, float]] = []

    name = "memory"
    version = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append({name: value for name, value in metrics.items() if name.startswith("moe/")})


def rank() -> int:
    return torch.distributed.get_rank()


def quiet(**options: Any) -> L.Trainer:
    """A Trainer of one CPU process, unless the options say otherwise."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return L.Trainer(**{**defaults, **options})


def parallel(world: int, ep_size: int, stage: int = 1, **options: Any) -> L.Trainer:
    """A Trainer of the ranks of a pool."""
    return quiet(devices=world, strategy=ExpertParallelStrategy(ep_size, stage=stage), **options)


class Side(Toy):
    """Both MoE layers stand side by side and read the input itself; ``task`` weighs the task's loss."""

    def __init__(self, *args: Any, task: float = 1.0, **kwargs: Any) -> None:
        self.task = task
        super().__init__(*args, **kwargs)

    def build(self) -> None:
        super().build()
        for layer in layers_of(self):
            if isinstance(layer.router, LearnedRouter):
                layer.router.weight.data *= 10  # scores that differ enough for steps of the bias to be small

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x)
        x = x.detach().requires_grad_()  # a reentrant checkpoint passes no gradient on otherwise
        for block in self.blocks:
            if self.recompute and self.training:
                y = y + checkpoint(block, x, use_reentrant=self.recompute == "reentrant")
            else:
                y = y + block(x)
        return self.out(torch.tanh(y))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.task * super().loss(batch)


class Manual(Side):
    """Steps by itself, in every ``accumulate``-th batch."""

    automatic_optimization = False

    def __init__(self, *args: Any, accumulate: int = 1, **kwargs: Any) -> None:
        self.accumulate = accumulate
        super().__init__(*args, **kwargs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def uneven(rank: int, batches: int) -> ToyData:
    """Each rank's own data, with sequences of another length than those of its neighbour."""
    return ToyData(batches * BATCH, seed=20 + rank, length=3 + rank)


def in_order(data: ToyData) -> DataLoader[Any]:
    return DataLoader(data, batch_size=BATCH)


def windows(batches: int, accumulate: int, steps: int) -> Iterator[tuple[int, bool]]:
    """Every batch of so many steps, and whether it ends one; the last batch of an epoch always does."""
    done = 0
    while done < steps:
        for batch in range(batches):
            ends = (batch + 1) % accumulate == 0 or batch + 1 == batches
            done += ends
            yield batch, ends
            if done == steps:
                return


def tokens_of(data: ToyData, batch: int) -> Tensor:
    """What the routers of :class:`Side` see in a batch, [B, S, D] in float64."""
    return data.x[batch * BATCH : (batch + 1) * BATCH].double()


def selected(choice_E: Tensor, top_k: int) -> list[int]:
    """The best experts, the lower id first among equals."""
    return sorted(range(len(choice_E)), key=lambda expert: (-choice_E[expert].item(), expert))[:top_k]


def layers_of(module: nn.Module) -> list[MoE]:
    return [part for part in module.modules() if isinstance(part, MoE)]


def start_weights(**options: Any) -> list[Tensor]:
    """The routers' weights before training, in float64."""
    return [layer.router.weight.detach().double() for layer in layers_of(Side(**options))]

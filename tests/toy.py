"""A small regression task with two MoE layers, and its training in one process by plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_moe import MoE, MoEConfig
from lightning_moe.testing.reference import ReferenceMoE, reference_of

WIDTH = 8
CONFIG = MoEConfig(num_experts=4, top_k=2, intermediate_size=12)


class Toy(L.LightningModule):
    """Regression with two MoE layers; ``lazy`` builds them in configure_model."""

    def __init__(
        self,
        config: MoEConfig = CONFIG,
        lazy: bool = False,
        recompute: str | None = None,
        two_groups: bool = False,
        scheduler: Callable[[Any], Any] | None = None,
        optimizer: Callable[..., Any] = torch.optim.AdamW,
        learning_rate: float = 1e-2,
        padding: bool = False,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.micro_batch = 0
        self.config, self.recompute, self.two_groups = config, recompute, two_groups
        self.scheduler, self.optimizer, self.learning_rate = scheduler, optimizer, learning_rate
        self.blocks = nn.ModuleList()
        self.grad_norms: list[float] = []
        if not lazy:
            self.build()

    def build(self) -> None:
        torch.manual_seed(0)
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.blocks.extend(MoE(WIDTH, self.config) for _ in range(2))
        self.out = nn.Linear(WIDTH, 3)

    def configure_model(self) -> None:
        if not self.blocks:
            self.build()

    def forward(self, x: Tensor) -> Tensor:
        token_ids = (x[..., 0].float() * 10).floor().long()
        valid = x[..., 1].float() > -1 if self.padding else None
        x = self.inp(x)
        for block in self.blocks:
            if self.recompute and self.training:
                x = x + checkpoint(block, x, valid, token_ids, use_reentrant=self.recompute == "reentrant")
            else:
                x = x + block(x, valid, token_ids)
        return self.out(torch.tanh(x))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x).float(), y.float())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        torch.manual_seed(self.micro_batch)  # as in train_reference, so that routers draw the same there
        self.micro_batch += 1
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        norm = getattr(self.trainer.strategy, "global_grad_norm", lambda: None)()
        if norm is not None and len(self.grad_norms) < self.trainer.global_step:
            self.grad_norms.append(norm)

    def configure_optimizers(self) -> Any:
        if self.two_groups:
            decay = [p for p in self.parameters() if p.ndim > 1]
            rest = [p for p in self.parameters() if p.ndim <= 1]
            groups: Any = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        else:
            groups = self.parameters()
        optimizer = self.optimizer(groups, lr=self.learning_rate)
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"},
        }


class ToyData(Dataset[tuple[Tensor, Tensor]]):
    """Random pairs of sequences; every item differs."""

    def __init__(self, size: int, seed: int = 1, length: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, length, WIDTH, generator=generator)
        self.y = torch.randn(size, length, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


BATCH = 4


def loader(data: ToyData, world_size: int = 1, rank: int = 0, batch_size: int = BATCH) -> DataLoader[Any]:
    """In order: rank r of W sees rows r, r + W, ... (Lightning's own sampler shuffles whatever it is told)."""
    sampler = DistributedSampler(data, world_size, rank, shuffle=False)
    return DataLoader(data, batch_size=batch_size, sampler=sampler)


@dataclass
class Trained:
    """What is compared between two ways of training.

    ``output`` is for the first batch of a rank, or for those of all ranks in turn.
    """

    state: dict[str, Tensor]
    grad_norms: list[float]
    output: Tensor


def first_batches(data: ToyData, world_size: int) -> Tensor:
    """The first batch of every rank, one after the other."""
    return data.x[: world_size * BATCH]


def train_reference(
    model: Toy,
    data: ToyData,
    world_size: int,
    steps: int,
    accumulate: int = 1,
    clip: float | None = None,
    load_balancing: float = 0.0,
    router_z: float = 0.0,
    dtype: torch.dtype = torch.float64,
    bias_rate: float = 0.0,
) -> Trained:
    """The run of one process over the same global batches, by hand: reference layers, torch's own clipping."""
    twin = reference_of(model, world_size, dtype)
    assert isinstance(twin, Toy)
    twin.train()
    configured = twin.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    scheduler = configured["lr_scheduler"]["scheduler"] if isinstance(configured, dict) else None
    layers = [block for block in twin.blocks if isinstance(block, ReferenceMoE)]
    norms, micro_batch, per_epoch = [], 0, len(data) // world_size // BATCH
    for _ in range(steps):
        optimizer.zero_grad()
        loads = [torch.zeros_like(layer.tokens_per_expert_E) for layer in layers]
        for _ in range(accumulate):
            torch.manual_seed(micro_batch)
            first = micro_batch % per_epoch * BATCH
            rows = [i * world_size + rank for rank in range(world_size) for i in range(first, first + BATCH)]
            loss = nn.functional.mse_loss(twin(data.x[rows].to(dtype)), data.y[rows].to(dtype))
            for layer, load_E in zip(layers, loads, strict=True):
                load_E.add_(layer.tokens_per_expert_E)
                loss = loss + load_balancing / len(layers) * layer.losses["load_balancing"]
                loss = loss + router_z / len(layers) * layer.losses["router_z"]
            (loss / accumulate).backward()
            micro_batch += 1
            if micro_batch % per_epoch == 0:
                break  # Lightning steps on the last batch of an epoch
        norm = nn.utils.clip_grad_norm_(twin.parameters(), clip if clip is not None else float("inf"))
        norms.append(float(norm))
        optimizer.step()
        for layer, load_E in zip(layers, loads, strict=True):
            for expert, load in enumerate(load_E.tolist()):
                if bias_rate:
                    mean = sum(load_E.tolist()) / len(load_E)
                    layer.router.expert_bias[expert] += bias_rate * ((mean > load) - (mean < load))
        if scheduler is not None:
            scheduler.step()
    twin.eval()
    with torch.no_grad():
        output = twin(first_batches(data, world_size).to(dtype))
    return Trained({k: v.detach() for k, v in twin.state_dict().items()}, norms, output)

"""What a rank does for checkpoints.py: it trains one step, then saves and loads in either format."""

from __future__ import annotations

import ctypes
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_moe import AuxLossCallback, ExpertParallelStrategy, MoE, MoEConfig
from lightning_moe.checkpoint import loading, saving, storage
from lightning_moe.engine import zero_state
from lightning_moe.engine.deepspeed import plain_checkpoints

OURS, NO_FSYNC, DEEPSPEED = "ours", "ours, no fsync", "DeepSpeed"
LAYERS, EXPERTS, HIDDEN, TOKENS = 8, 8, 512, 32


@dataclass(frozen=True)
class Layout:
    """How a run is spread.

    Args:
        world: Ranks.
        ep_size: Of one EP group.
        stage: Of ZeRO.
    """

    world: int
    ep_size: int
    stage: int

    def __str__(self) -> str:
        return f"{self.world} ranks, ep {self.ep_size}, ZeRO {self.stage}"


class Stack(L.LightningModule):
    """MoE layers with a dense one before each, and about so many parameters, of which the experts have most."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.ffn = max(1, round(parameters / (LAYERS * EXPERTS * 3 * HIDDEN) / 32)) * 32
        self.dense = nn.ModuleList()
        self.experts = nn.ModuleList()

    def configure_model(self) -> None:
        if not self.experts:
            config = MoEConfig(num_experts=EXPERTS, top_k=2, intermediate_size=self.ffn)
            self.dense.extend(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))
            self.experts.extend(MoE(HIDDEN, config) for _ in range(LAYERS))

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        for dense, experts in zip(self.dense, self.experts, strict=True):
            x = x + experts(dense(x))
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


_held: list[L.Trainer] = []
"""On a rank: the Trainer of the layout that is measured."""


def train(layout: Layout, parameters: int) -> dict[str, float]:
    """Makes the run and takes one step, so that the optimizer has its moments.

    Returns:
        Threads of torch, parameters on this rank, and bytes of the largest part of a tensor that it has.
    """
    warnings.filterwarnings("ignore")
    _held.clear()
    gc.collect()
    torch.manual_seed(dist.get_rank())
    model = Stack(parameters)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=layout.world,
        strategy=ExpertParallelStrategy(layout.ep_size, stage=layout.stage),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AuxLossCallback()],
    )
    trainer.fit(model, DataLoader([torch.randn(TOKENS, HIDDEN) for _ in range(layout.world)]))
    _held.append(trainer)
    masters = _masters()
    return {
        "threads": torch.get_num_threads(),
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        "largest": max(master.numel * master.owner.element_size() for master in masters),
    }


def _masters() -> list[zero_state.Master]:
    module = _held[0].lightning_module
    return list(zero_state.masters(_held[0].strategy.deepspeed_engine, dict(module.named_parameters())).values())


# ------------------------------------------------------------------------------------ save and load


def save(name: str, path: str) -> None:
    """What Lightning does at ``trainer.save_checkpoint`` with either strategy."""
    trainer = _held[0]
    if name != DEEPSPEED:
        with without_fsync() if name == NO_FSYNC else nullcontext():
            trainer.save_checkpoint(path)
        return
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
    with _as_deepspeed():
        DeepSpeedStrategy.save_checkpoint(trainer.strategy, checkpoint, path)
    trainer.strategy.barrier("Trainer.save_checkpoint")


def load(name: str, path: str) -> None:
    """What Lightning does at ``trainer.fit(ckpt_path=...)`` with either strategy, once the model is set up."""
    strategy = _held[0].strategy
    if name != DEEPSPEED:
        strategy.load_checkpoint(path)
        return
    with _as_deepspeed():
        DeepSpeedStrategy.load_checkpoint(strategy, path)


@contextmanager
def _as_deepspeed() -> Iterator[None]:
    """DeepSpeed's own way with experts; at ZeRO 3, where it has none for ours, its way with any parameters."""
    strategy = _held[0].strategy
    with plain_checkpoints(strategy.deepspeed_engine) if strategy.zero_stage_3 else nullcontext():
        yield


@contextmanager
def without_fsync() -> Iterator[None]:
    """Files are left in the page cache inside this scope."""
    before, os.fsync = os.fsync, lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = before


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Seconds that our format spends in ``fsync`` and on ``checksum``, on this rank."""
    seconds = {"fsync": 0.0, "checksum": 0.0}
    places = [
        (os, "fsync", "fsync"),
        (storage, "describe_file", "checksum"),
        (saving, "describe_file", "checksum"),
        (loading, "problems", "checksum"),
    ]
    originals = [getattr(module, name) for module, name, _ in places]

    def timed(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                seconds[what] += time.perf_counter() - start

        return run

    for (module, name, what), original in zip(places, originals, strict=True):
        setattr(module, name, timed(original, what))
    try:
        yield seconds
    finally:
        for (module, name, _), original in zip(places, originals, strict=True):
            setattr(module, name, original)


ACTIONS = {"save": save, "load": load}


def time_one(action: str, name: str, path: str) -> dict[str, float]:
    """Seconds of a save or a load of all ranks, and what of them is :func:`stopwatch`'s on this one."""
    gc.collect()
    gc.disable()
    try:
        with stopwatch() as seconds:
            dist.barrier()
            start = time.perf_counter()
            ACTIONS[action](name, path)
            dist.barrier()
            seconds["seconds"] = time.perf_counter() - start
    finally:
        gc.enable()
    return seconds


def fsync_all(path: str) -> float:
    """Seconds that it takes the ranks together to bring a folder's files, which they divide, onto the disk."""
    mine = _mine(path)
    dist.barrier()
    start = time.perf_counter()
    for file in mine:
        storage.sync(file)
    dist.barrier()
    return time.perf_counter() - start


def read_all(path: str) -> None:
    """Brings a folder's files into the page cache."""
    for file in _mine(path):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 22):
                pass


def _mine(path: str) -> list[Path]:
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    return files[dist.get_rank() :: dist.get_world_size()]


# ------------------------------------------------------------------------------------------ checks


def survives(name: str, path: str) -> bool:
    """Whether a load brings back exactly what zeros have been written over: weights, masters and moments."""
    before = [tensor.clone() for tensor in _state()]
    for tensor in _state():
        tensor.zero_()
    load(name, path)
    after = _state()
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _state() -> list[Tensor]:
    engine, module = _held[0].strategy.deepspeed_engine, _held[0].lightning_module
    tensors = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in module.parameters()]
    for master in _masters():
        moments = zero_state.moments(zero_state.base_optimizer(engine), master)
        tensors += [master.part_of(tensor) for tensor in (master.owner, *moments.values())]
    return tensors


# ------------------------------------------------------------------------------------------ memory


def status(process: int | str, field: str) -> int:
    """Bytes that the kernel says a process has of something."""
    with open(f"/proc/{process}/status") as stream:
        for line in stream:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise KeyError(field)


def watch_one(action: str, name: str, path: str) -> dict[str, float]:
    """Runs a save or a load for the sampler in the parent.

    Returns:
        ``begin`` and ``end`` by the clock that all processes share, ``anonymous`` bytes at the beginning, and how far
        ``resident`` memory grew by the kernel's own high-water mark, below 0 where that cannot be set back.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would hide what is allocated anew
    dist.barrier()
    can_reset = True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        can_reset = False
    before, anonymous, begin = status("self", "VmRSS"), status("self", "RssAnon"), time.monotonic()
    ACTIONS[action](name, path)
    end = time.monotonic()
    resident = status("self", "VmHWM") - before if can_reset else -1
    dist.barrier()
    return {"begin": begin, "end": end, "anonymous": anonymous, "resident": resident}

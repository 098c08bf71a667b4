"""A run that resumes is the run that was not interrupted: on the same layout bit for bit, on any other to rounding."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_moe import AuxLossCallback, ExpertBiasUpdate, MoE, MoECheckpointIO, MoEConfig
from lightning_moe.checkpoint import Checkpoint, directory, storage
from lightning_moe.data import ResumableDataLoader
from lightning_moe.testing import RankError, RankPool
from tests.callbacks.runs import parallel, quiet
from tests.toy import Toy, ToyData, loader

Layout = tuple[int, int, int]  # ranks, expert_parallel_size, ZeRO stage
LAYOUTS: list[Layout] = [(1, 1, 0), (2, 1, 2), (2, 2, 1), (4, 2, 1), (4, 2, 3), (4, 4, 2)]
GLOBAL_BATCH = 16


def warmup(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))


# ------------------------------------------------------------------------------------- same layout


class Noisy(Toy):
    """With everything that draws random numbers: dropout and jitter, from the process's generators as they stand."""

    def __init__(self, **options: Any) -> None:
        config = MoEConfig(num_experts=4, top_k=2, intermediate_size=12, jitter=0.1, expert_bias=True)
        super().__init__(config, scheduler=warmup, two_groups=True, **options)
        self.dropout = nn.Dropout(0.2)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self(self.dropout(x)).float(), y.float())
        self.losses.append(float(loss.detach()))
        return loss


def fit_noisy(
    layout: Layout, precision: Any, epochs: int, path: str | None = None, *savers: ModelCheckpoint,
    kind: type[DataLoader[Any]] = ResumableDataLoader,
) -> tuple[list[float], dict[str, Tensor]]:  # fmt: skip
    """Losses of this rank, and what its optimizer and model hold in the end."""
    world, ep_size, stage = layout
    L.seed_everything(11, verbose=False)  # of the sampler
    torch.manual_seed(dist.get_rank() if path is None else 99)  # what a fresh process has is not what was saved
    model = Noisy()
    trainer = parallel(
        world, ep_size, stage, max_epochs=epochs, precision=precision, accumulate_grad_batches=2, gradient_clip_val=0.5,
        enable_checkpointing=bool(savers), use_distributed_sampler=True,
        callbacks=[AuxLossCallback(), ExpertBiasUpdate(0.01), *savers],
    )  # fmt: skip
    data = kind(ToyData(world * 4 * 9), batch_size=4, shuffle=True)  # nine batches an epoch: the last window is short
    trainer.fit(model, data, ckpt_path=path)
    return model.losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def saved_and_resumed(folder: str, layout: Layout, precision: Any, steps: dict[int, int]) -> None:
    savers = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=step, save_top_k=-1) for step in steps]
    losses, weights = fit_noisy(layout, precision, 3, None, *savers)
    assert len(losses) == len(set(losses)) == 27
    for step, batches in steps.items():
        resumed, same = fit_noisy(layout, precision, 3, path=str(Path(folder) / f"step={step}.ckpt"))
        assert len(resumed) >= 10
        assert resumed == losses[batches:], f"resumed at step {step}"
        for name, tensor in weights.items():
            assert torch.equal(tensor, same[name]), f"{name} after resuming at step {step}"


# Steps end after batches 2 4 6 8 9: in the middle of an epoch, at its end, and in the middle of the second.
STEPS = {3: 6, 5: 9, 7: 13}


@pytest.mark.parametrize(
    ("layout", "precision", "steps"),
    [
        ((2, 2, 1), "32-true", STEPS),
        ((2, 2, 3), "bf16-true", {7: 13}),
        ((2, 2, 0), "bf16-mixed", {3: 6}),
        *(
            pytest.param(layout, precision, STEPS, marks=pytest.mark.grid)
            for layout in ((2, 1, 1), (2, 2, 0), (2, 2, 2), (2, 2, 3), (4, 2, 1), (4, 2, 3))
            for precision in ("32-true", "bf16-true", "bf16-mixed")
        ),
    ],
    ids=str,
)
def test_same_layout_is_bit_identical(
    layout: Layout, precision: str, steps: dict[int, int], get_pool: Any, tmp_path: Path
) -> None:
    get_pool(layout[0]).run(saved_and_resumed, str(tmp_path), layout, precision, steps)


def end_of_epoch(folder: str) -> None:
    """With torch's own loader, whose position in an epoch nobody knows, from the end of an epoch."""
    saver = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    losses, _ = fit_noisy((2, 2, 1), "32-true", 3, None, saver, kind=DataLoader)
    resumed, _ = fit_noisy((2, 2, 1), "32-true", 3, kind=DataLoader, path=str(Path(folder) / "epoch=0.ckpt"))
    assert resumed == losses[9:]


def test_end_of_an_epoch_is_bit_identical_with_any_loader(get_pool: Any, tmp_path: Path) -> None:
    get_pool(2).run(end_of_epoch, str(tmp_path))


# ------------------------------------------------------------------------------------ other layout

SAVED_AT, STEPS_AFTER = 4, 5


class Recording(Toy):
    """Keeps the losses; draws nothing at random, so that one process and many see the same."""

    def __init__(self, **options: Any) -> None:
        super().__init__(scheduler=warmup, two_groups=True, **options)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss


class SaveOnStart(L.Callback):
    """Saves what was loaded, before anything is trained."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def of_rank(world: int) -> Any:
    """This rank's loader; all ranks' batches together are the same whatever their number."""
    return loader(ToyData(4 * GLOBAL_BATCH), world, dist.get_rank() if world > 1 else 0, GLOBAL_BATCH // world)


def mean_losses(losses: list[float]) -> list[float]:
    """Over ranks."""
    of_ranks: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, losses)
    return [sum(of_step) / len(of_ranks) for of_step in zip(*of_ranks, strict=True)]


def fit(layout: Layout, path: str | None, *callbacks: L.Callback, model: Toy | None = None) -> list[float]:
    world, ep_size, stage = layout
    model = Recording() if model is None else model
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = parallel(world, ep_size, stage, max_steps=SAVED_AT + STEPS_AFTER, gradient_clip_val=0.5,
                       callbacks=list(callbacks), enable_checkpointing=saves)  # fmt: skip
    trainer.fit(model, of_rank(world), ckpt_path=path)
    return mean_losses(model.losses)


def whole_run(folder: str, layout: Layout) -> list[float]:
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVED_AT, save_top_k=-1)
    return fit(layout, None, saver)[SAVED_AT:]


@pytest.fixture(scope="module")
def whole(get_pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where the run of a layout was saved, and the losses that followed."""
    done: dict[Layout, tuple[str, list[float]]] = {}

    def of(layout: Layout) -> tuple[str, list[float]]:
        if layout not in done:
            folder = str(tmp_path_factory.mktemp("whole"))
            losses = get_pool(layout[0]).run(whole_run, folder, layout)[0]
            done[layout] = f"{folder}/step={SAVED_AT}.ckpt", losses
        return done[layout]

    return of


def pairs() -> list[Any]:
    """All ordered pairs; by default some in which every layout saves once and loads once."""
    default = list(zip(LAYOUTS, [LAYOUTS[i] for i in (4, 3, 5, 0, 2, 1)], strict=True))
    assert len({to for _, to in default}) == len(LAYOUTS)
    every = [(source, to) for source in LAYOUTS for to in LAYOUTS]
    return [pytest.param(*pair, marks=[] if pair in default else [pytest.mark.grid]) for pair in every]


@pytest.mark.parametrize(("source", "to"), pairs(), ids=str)
def test_other_layout_continues_the_run(source: Layout, to: Layout, whole: Any, get_pool: Any, tmp_path: Path) -> None:
    path, losses = whole(source)
    again = tmp_path / "again.ckpt"
    resumed = get_pool(to[0]).run(fit, to, path, SaveOnStart(str(again)))[0]
    assert resumed == pytest.approx(losses, abs=1e-5)
    assert_same_tensors(Checkpoint(path), Checkpoint(again), layout=to)


def assert_same_tensors(one: Checkpoint, other: Checkpoint, layout: Layout) -> None:
    """Weights, moments, counts of steps and hyper-parameters, bit for bit."""
    assert (other.manifest.layout.world_size, other.manifest.layout.stage) == (layout[0], layout[2])
    assert other.manifest.tensors == one.manifest.tensors
    assert {name.split("/")[1] for name in one.manifest.tensors if name.startswith("optimizer/")} == {
        "exp_avg", "exp_avg_sq"}  # fmt: skip
    for name in one.manifest.tensors:
        assert torch.equal(one.tensor(name), other.tensor(name)), name
    left, right = one.run(), other.run()
    assert left["scalars"].keys() == {n.removeprefix("model/") for n in one.manifest.tensors if n.startswith("model/")}
    assert left["scalars"] == right["scalars"] == {name: {"step": torch.tensor(4.0)} for name in left["scalars"]}
    assert left["optimizer_groups"] == right["optimizer_groups"]
    assert len(left["optimizer_groups"]) == 2
    assert left["lightning"]["lr_schedulers"] == right["lightning"]["lr_schedulers"]
    assert len(left["lightning"]["lr_schedulers"][0]["base_lrs"]) == 2


# ------------------------------------------------------------------------------------- no strategy


def alone(path: str | None, *callbacks: L.Callback) -> list[float]:
    """The run of a single process that knows nothing of the strategy, from a folder with the plugin's help."""
    model = Recording()
    trainer = quiet(max_steps=SAVED_AT + STEPS_AFTER, gradient_clip_val=0.5, plugins=[MoECheckpointIO()],
                    callbacks=list(callbacks), enable_checkpointing=bool(callbacks))  # fmt: skip
    trainer.fit(model, of_rank(1), ckpt_path=path)
    return model.losses


def test_from_ranks_to_one_process_without_a_strategy(whole: Any) -> None:
    path, losses = whole((4, 2, 3))
    assert alone(path) == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("to", [(2, 2, 1), (4, 2, 3), pytest.param((1, 1, 0), marks=pytest.mark.grid)], ids=str)
def test_from_one_process_without_a_strategy_to_ranks(to: Layout, get_pool: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=SAVED_AT, save_top_k=-1)
    losses = alone(None, saver)[SAVED_AT:]
    path = tmp_path / f"step={SAVED_AT}.ckpt"
    assert path.is_file()
    assert get_pool(to[0]).run(fit, to, str(path))[0] == pytest.approx(losses, abs=1e-5)


# -------------------------------------------------------------------------------- expert by expert


class Constants(Recording):
    """Expert i of every layer is full of i + 1, and nothing is trained."""

    def build(self) -> None:
        super().build()
        for layer in (module for module in self.modules() if isinstance(module, MoE)):
            for place, expert in enumerate(layer.experts.expert_ids):
                for weight in layer.experts.parameters():
                    weight.data[place] = expert + 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def save_constants(path: str, layout: Layout) -> None:
    world, ep_size, stage = layout
    trainer = parallel(world, ep_size, stage, max_steps=1)
    trainer.fit(Constants(lazy=False), of_rank(world))
    trainer.save_checkpoint(path)


def constants_read_back(path: str, layout: Layout) -> None:
    from lightning_moe.testing.state import full_state

    world, ep_size, stage = layout
    trainer = parallel(world, ep_size, stage, max_steps=2)
    trainer.fit(model := Constants(), of_rank(world), ckpt_path=path)
    state = full_state(trainer)
    for name, weight in state.items():
        if ".experts." in name:
            assert weight.flatten(1).tolist() == [[i + 1.0] * weight[0].numel() for i in range(4)], name
    assert sum(".experts." in name for name in state) == 4
    assert len(model.losses) == 1


@pytest.mark.parametrize(("source", "to"), pairs(), ids=str)
def test_every_expert_comes_back_as_itself(source: Layout, to: Layout, get_pool: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "constants.ckpt")
    get_pool(source[0]).run(save_constants, path, source)
    get_pool(to[0]).run(constants_read_back, path, to)


# ------------------------------------------------------------------------------------------ killed


def killed(folder: str, victims: list[int], where: str, call: int) -> None:
    """A run that saves every step, as the third and as ``last``, until some ranks are killed in the middle of a save."""
    place, name = {"commit": (directory, "commit"), "write": (storage, "write_file")}[where]
    original, calls = getattr(place, name), 0

    def dying(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and dist.get_rank() in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    with patch.object(place, name, dying):
        fit((2, 2, 1), None, last_in(folder))


def last_in(folder: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVED_AT, save_last=True, save_top_k=1)


def resumed_from_last(folder: str) -> tuple[list[float], list[float]]:
    whole = fit((2, 2, 1), None)
    return whole, fit((2, 2, 1), "last", last_in(folder))


@pytest.mark.grid
@pytest.mark.parametrize(
    ("victims", "where", "call"),
    # The fourth save is the second of "last", after step 8.
    [([0, 1], "write", 4), ([1], "write", 3), ([0], "commit", 4), ([0], "commit", 3)],
)
def test_killed_run_continues_from_last(
    victims: list[int], where: str, call: int, fragile_pool: RankPool, get_pool: Any, tmp_path: Path
) -> None:
    with pytest.raises(RankError):
        fragile_pool.run(killed, str(tmp_path), victims, where, call, timeout=60)
    whole, resumed = get_pool(2).run(resumed_from_last, str(tmp_path))[0]
    assert resumed == whole[SAVED_AT:]

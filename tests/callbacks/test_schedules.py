"""Settings of the layers that change by optimizer step."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_moe import AuxLossCallback, CapacitySchedule, MoEConfig, TopKSchedule
from lightning_moe.cli import MoECLI
from tests.callbacks.runs import in_order, layers_of, parallel, quiet, rank
from tests.commands import write_text
from tests.test_cli import from_a_shell
from tests.toy import BATCH, CONFIG, Toy, ToyData

Values = list[tuple[int, float | None]]
OWN = replace(CONFIG, top_k=2, capacity_factor=3.0)


class Recording(Toy):
    """Keeps what is in force in every batch of training, and the experts that a token gets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_force: Values = []
        self.widths: list[int] = []
        for layer in layers_of(self):
            layer.router.register_forward_hook(self.look)

    def look(self, module: Any, args: Any, routing: Any) -> None:
        if self.training:
            self.widths.append(routing.topk_ids_TK.shape[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert values(self)[0] == values(self)[1]
        self.in_force.append(values(self)[0])
        return super().training_step(batch, batch_idx)


def values(module: torch.nn.Module) -> Values:
    """Of both layers."""
    return [(layer.config.top_k, layer.config.capacity_factor) for layer in layers_of(module)]


def schedules() -> list[L.Callback]:
    return [AuxLossCallback(), TopKSchedule({3: 1, 1: 3}), CapacitySchedule({0: 2.0, 2: None, 4: 0.5})]


EXPECTED: Values = [(2, 2.0), (3, 2.0), (3, None), (1, None), (1, 0.5), (1, 0.5)]


def test_value_in_force_at_each_step() -> None:
    model = Recording(OWN)
    quiet(callbacks=schedules(), max_steps=6).fit(model, in_order(ToyData(6 * BATCH)))
    assert model.in_force == EXPECTED
    assert model.widths == [top_k for top_k, _ in EXPECTED for _ in range(2)]
    assert values(model) == EXPECTED[-1:] * 2, "the last value stays"


def test_accumulation_counts_as_one_step() -> None:
    """Seven batches an epoch in windows of 3, 3, 1."""
    model = Recording(OWN)
    data, validation = in_order(ToyData(7 * BATCH)), in_order(ToyData(BATCH))
    quiet(
        callbacks=schedules(), max_steps=6, accumulate_grad_batches=3, val_check_interval=2, num_sanity_val_steps=2
    ).fit(model, data, validation)
    windows = [3, 3, 1, 3, 3, 1]
    assert model.in_force == [value for value, size in zip(EXPECTED, windows, strict=True) for _ in range(size)]


def test_dispatchers_and_routers_take_the_new_value() -> None:
    """Fixed shapes depend on both settings."""
    config = replace(OWN, pad_to_capacity=True, router="noisy_topk", overflow="next_expert", eval_capacity_factor=1.0)
    model = Recording(config)
    quiet(callbacks=[AuxLossCallback(), TopKSchedule({0: 1, 1: 4}), CapacitySchedule({1: 0.5, 2: 2})], max_steps=3).fit(
        model, in_order(ToyData(3 * BATCH))
    )
    assert model.in_force == [(1, 3.0), (4, 0.5), (4, 2)]
    assert model.widths == [1, 1, 4, 4, 4, 4]


def test_a_schedule_starts_at_its_first_step() -> None:
    assert list(TopKSchedule({5: 1, 0: 2}).by_step.items()) == [(0, 2), (5, 1)]


# ---------------------------------------------------------------------------------- checkpoints


def saved_and_resumed(folder: str, stage: int | None) -> dict[str, Any]:
    """What is in force in a run resumed after three of six steps, and where its checkpoint is evaluated."""

    def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
        options = {"callbacks": [*schedules(), *callbacks], "max_steps": 6, **options}
        return quiet(**options) if stage is None else parallel(2, 2, stage, **options)

    data = ToyData(3 * BATCH, seed=1 if stage is None else rank())
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1, monitor=None)
    trainer(saver, enable_checkpointing=True).fit(Recording(OWN), in_order(data))
    path = str(Path(folder) / "step=3.ckpt")
    resumed = Recording(OWN)
    trainer().fit(resumed, in_order(data), ckpt_path=path)
    found: dict[str, Any] = {"fit": resumed.in_force}
    for stage_of_trainer in ("validate", "test", "predict"):
        model = Recording(OWN)
        options = {} if stage_of_trainer == "predict" else {"verbose": False}
        getattr(trainer(), stage_of_trainer)(model, in_order(data), ckpt_path=path, **options)
        found[stage_of_trainer] = values(model)
    model = Recording(OWN)
    trainer().validate(model, in_order(data), verbose=False)
    found["no checkpoint"] = values(model)
    return found


def check(found: dict[str, Any]) -> None:
    assert found.pop("fit") == EXPECTED[3:]
    assert found.pop("no checkpoint") == [(2, 3.0)] * 2
    assert found == dict.fromkeys(("validate", "test", "predict"), [EXPECTED[2]] * 2)


@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoint_has_the_value_in_force(stage: int, get_pool: Any, tmp_path: Path) -> None:
    for found in get_pool(2).run(saved_and_resumed, str(tmp_path), stage):
        check(found)


def test_checkpoint_of_one_process(tmp_path: Path) -> None:
    check(saved_and_resumed(str(tmp_path), None))


def test_resumed_with_another_schedule(tmp_path: Path) -> None:
    """Steps decide, and the schedule of now."""
    trainer = quiet(callbacks=schedules(), max_steps=3)
    trainer.fit(Recording(OWN), in_order(ToyData(3 * BATCH)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    model = Recording(OWN)
    quiet(callbacks=[AuxLossCallback(), TopKSchedule({0: 4, 5: 1})], max_steps=6).fit(
        model, in_order(ToyData(3 * BATCH)), ckpt_path=tmp_path / "a.ckpt"
    )
    assert [top_k for top_k, _ in model.in_force] == [4, 4, 1]


# ----------------------------------------------------------------------------------- in a config

CALLBACKS = """
trainer:
  accelerator: cpu
  devices: 1
  strategy: auto
  max_steps: 3
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  callbacks:
    - class_path: lightning_moe.TopKSchedule
      init_args: {top_k: {0: 3, 2: 1}}
    - class_path: lightning_moe.CapacitySchedule
      init_args:
        capacity_factor:
          1: 1.5
          2: null
model:
  class_path: lightning_moe.models.MoELanguageModel
  init_args: {hidden_size: 16, num_heads: 2, num_layers: 2, moe: {num_experts: 4, intermediate_size: 8}}
"""


@pytest.mark.parametrize("on_the_command_line", [False, True])
def test_schedules_from_yaml(on_the_command_line: bool, tmp_path: Path) -> None:
    seen: Values = []

    class Look(L.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            seen.append(values(pl_module)[0])

    text = CALLBACKS
    args = ["fit", "--config", "run.yaml", f"--data.path={write_text(tmp_path / 'text')}", "--data.batch_size=2"]
    if on_the_command_line:
        text = re.sub(r"  callbacks:\n(    .+\n)+", "", text)
        args += ["--trainer.callbacks+=lightning_moe.TopKSchedule", "--trainer.callbacks.top_k={0: 3, 2: 1}"]
        args += ["--trainer.callbacks+=lightning_moe.CapacitySchedule"]
        args += ["--trainer.callbacks.capacity_factor={1: 1.5, 2: null}"]
    (tmp_path / "run.yaml").write_text(text)
    with from_a_shell():
        cli = MoECLI(args[1:], run=False)
        cli.trainer.callbacks.append(Look())  # type: ignore[attr-defined]
        cli.trainer.fit(cli.model, cli.datamodule)
    assert seen == [(3, None), (3, 1.5), (1, None)]


# --------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("make", [TopKSchedule, CapacitySchedule])
def test_steps_are_whole_numbers(make: Any) -> None:
    field = make.field
    message = f"{field}={{}}: must have at least one step. Use {{0: value}}, for example."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make({})
    for step in (-1, 1.5, "0", True, None):
        message = (
            f"{field}: {step!r} must be an optimizer step, a whole number of at least 0. Use {{0: value, 1000: value}}, "
            "for example."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            make({0: 1, step: 2} if step is not True else {True: 2})


EXPERT_CHOICE = MoEConfig(num_experts=4, intermediate_size=8, router="expert_choice", capacity_factor=2.0)


@pytest.mark.parametrize(
    ("config", "schedule", "message"),
    [
        (
            CONFIG,
            TopKSchedule({0: 2, 5: 7}),
            "TopKSchedule, step 5: top_k=7: must be from 1 to num_experts=4. Lower top_k or add experts.",
        ),
        (
            CONFIG,
            TopKSchedule({0: 0}),
            "TopKSchedule, step 0: top_k=0: must be from 1 to num_experts=4. Lower top_k or add experts.",
        ),
        (
            CONFIG,
            TopKSchedule({3: 1.5}),  # type: ignore[dict-item]
            "TopKSchedule, step 3: top_k=1.5: must be a whole number. Write it without a point or quotes.",
        ),
        (
            replace(CONFIG, router="gshard"),
            TopKSchedule({9: 1}),
            (
                "TopKSchedule, step 9: top_k=1: router='gshard' takes 2 experts per token. Use top_k=2, or "
                "router='topk'."
            ),
        ),
        (
            MoEConfig(num_experts=4, top_k=1, intermediate_size=8, router="switch"),
            TopKSchedule({2: 2}),
            ("TopKSchedule, step 2: top_k=2: router='switch' takes 1 expert per token. Use top_k=1, or router='topk'."),
        ),
        (
            CONFIG,
            CapacitySchedule({0: 1.0, 4: -1.0}),
            (
                "CapacitySchedule, step 4: capacity_factor=-1.0: must be a finite number above 0. Use 1.25, or null to "
                "drop nothing."
            ),
        ),
        (
            EXPERT_CHOICE,
            CapacitySchedule({0: 1.0, 4: None}),
            (
                "CapacitySchedule, step 4: capacity_factor=None: router='expert_choice' needs it, the mean number of "
                "experts per token. Use 2, for example."
            ),
        ),
        (
            replace(CONFIG, capacity_factor=1.0, overflow="next_expert"),
            CapacitySchedule({6: None}),
            (
                "CapacitySchedule, step 6: overflow='next_expert': without a capacity_factor nothing overflows. Set "
                "capacity_factor, to 1.25 for example, or use overflow='drop'."
            ),
        ),
    ],
    ids=lambda x: x.partition(":")[0] if isinstance(x, str) else "",
)
def test_wrong_value_is_refused_before_any_forward(config: MoEConfig, schedule: Any, message: str) -> None:
    class Silent(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("A forward pass came first.")

    data = in_order(ToyData(BATCH))
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}$"):
        quiet(callbacks=[schedule], max_steps=1, num_sanity_val_steps=2).fit(Silent(config), data, data)


def test_expert_choice_takes_its_capacity() -> None:
    """There the factor is the mean number of experts per token, in evaluation too."""
    model = Toy(EXPERT_CHOICE)
    quiet(callbacks=[AuxLossCallback(), CapacitySchedule({0: 1.0, 1: 3.0})], max_steps=2).fit(
        model, in_order(ToyData(2 * BATCH))
    )
    assert [layer.config.capacity_factor for layer in layers_of(model)] == [3.0, 3.0]


def test_nothing_of_a_fit_reaches_another_model() -> None:
    trainer = quiet(callbacks=[AuxLossCallback(0.0), TopKSchedule({0: 3})], max_steps=1)
    trainer.fit(Toy(), in_order(ToyData(BATCH)))
    other = Toy()
    trainer.validate(other, in_order(ToyData(BATCH)), verbose=False)
    assert {layer.config.top_k for layer in layers_of(other)} == {2}


def test_one_expert_at_last_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"^top_k=1: router='topk' divides the one weight by itself"):
        quiet(callbacks=[AuxLossCallback(0.0), TopKSchedule({0: 1})], max_steps=1).fit(Toy(), in_order(ToyData(BATCH)))

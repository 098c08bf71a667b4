"""Every wrong setting fails before the first forward, on every rank, in seconds, and says what to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_moe import AuxLossCallback, ExpertLoadMonitor, ExpertParallelStrategy, MoEConfig, SampleText
from tests.strategies.test_training import rank, trainer_for
from tests.toy import CONFIG, Toy, ToyData, loader

SECONDS = 5


def refused(start: Callable[..., Any], *args: Any) -> tuple[str, str, float, bool]:
    """Type, message and time of what ``start`` raises on this rank, and whether a forward had run."""
    forwards = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: forwards.append(type(module)))
    began = time.monotonic()
    try:
        start(*args)
    except Exception as error:  # noqa: BLE001 - the message is what is tested
        return type(error).__name__, str(error), time.monotonic() - began, bool(forwards)
    finally:
        handle.remove()
    return "", "nothing was raised", time.monotonic() - began, bool(forwards)


def assert_refused(results: list[Any], kind: str, message: str) -> None:
    assert len(results) == 2
    for raised, said, seconds, forwards in results:
        assert said == message
        assert raised == kind
        assert seconds < SECONDS
        assert not forwards


def fit(model: L.LightningModule, **options: Any) -> None:
    options = {"callbacks": [], **options}
    trainer_for(**options).fit(model, loader(ToyData(16), 2, rank()))


def with_size(size: Any) -> None:
    fit(Toy(), ep_size=size)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            0,
            (
                "expert_parallel_size=0: must be 'auto' or a whole number of at least 1. Use 1 to keep every expert on every "
                "rank."
            ),
        ),
        (
            -2,
            (
                "expert_parallel_size=-2: must be 'auto' or a whole number of at least 1. Use 1 to keep every expert on "
                "every rank."
            ),
        ),
        (
            "all",
            (
                "expert_parallel_size='all': must be 'auto' or a whole number of at least 1. Use 1 to keep every expert "
                "on every rank."
            ),
        ),
        (
            3,
            (
                "expert_parallel_size=3: must not be above the number of ranks, 2. Lower it, or start 3 ranks (devices x "
                "num_nodes)."
            ),
        ),
    ],
)
def test_expert_parallel_size(size: Any, message: str, get_pool: Any) -> None:
    assert_refused(get_pool(2).run(refused, with_size, size), "ValueError", message)


def with_three_of_four() -> None:
    trainer_for(3, world=4, callbacks=[]).fit(Toy(MoEConfig(num_experts=12)), loader(ToyData(16), 4, rank()))


def test_expert_parallel_size_that_does_not_divide_the_world(get_pool: Any) -> None:
    message = "expert_parallel_size=3: must divide the number of ranks, 4. Use one of 1, 2, 4."
    results = get_pool(4).run(refused, with_three_of_four)
    assert [(said, seconds < SECONDS, forwards) for _, said, seconds, forwards in results] == [
        (message, True, False)
    ] * 4


def test_stage() -> None:
    with pytest.raises(ValueError, match=r"^stage=4: must be 0, 1, 2 or 3\. Use 1 to shard optimizer states\.$"):
        ExpertParallelStrategy(stage=4)


def with_config(lazy: bool, **changes: Any) -> None:
    fit(Toy(replace(CONFIG, **changes), lazy=lazy))


def with_five_experts(lazy: bool) -> None:
    with_config(lazy, num_experts=5)


def with_unknown_dispatcher(lazy: bool) -> None:
    with_config(lazy, dispatcher="telepathy")


def with_local_dispatcher(lazy: bool) -> None:
    with_config(lazy, dispatcher="local")


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            with_five_experts,
            (
                "num_experts=5: must be divisible by expert_parallel_size=2. Use 6 experts, or another "
                "expert_parallel_size."
            ),
        ),
        (
            with_unknown_dispatcher,
            (
                "dispatcher='telepathy': unknown. Known: allgather, alltoall, auto, fused, local, tune. One of your own "
                "has to be in lightning_moe.dispatch.DISPATCHERS before the model is built."
            ),
        ),
        (
            with_local_dispatcher,
            (
                "dispatcher='local': expert_parallel_size is 2, and this dispatcher sends nothing to "
                "other ranks. Use dispatcher='auto', or expert_parallel_size=1."
            ),
        ),
    ],
)
def test_layer_settings(lazy: bool, start: Any, message: str, get_pool: Any) -> None:
    assert_refused(get_pool(2).run(refused, start, lazy), "ValueError", message)


class Dense(Toy):
    """No MoE layer at all."""

    def build(self) -> None:
        self.inp = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)


def without_moe() -> None:
    fit(Dense())


class TwoSizes(Toy):
    """DeepSpeed's own layers with different ep_size."""

    def build(self) -> None:
        from deepspeed.moe.layer import MoE as NativeMoE

        self.inp = nn.Linear(8, 8)
        self.blocks.extend(NativeMoE(8, nn.Linear(8, 8), num_experts=4, ep_size=size) for size in (2, 1))
        self.out = nn.Linear(8, 3)


def with_two_sizes() -> None:
    fit(TwoSizes())


class TwoOptimizers(Toy):
    """As for a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.inp.parameters(), lr=0.1), torch.optim.SGD(self.blocks.parameters(), lr=0.1)


def with_two_optimizers() -> None:
    fit(TwoOptimizers())


def clipped_by_value() -> None:
    fit(Toy(), gradient_clip_val=0.5, gradient_clip_algorithm="value")


def with_strategy_option(name: str, stage: int) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ExpertParallelStrategy(2, stage=stage, **{name: False}),
        logger=False,
        max_steps=1,
        enable_progress_bar=False,
    )
    trainer.fit(Toy(), loader(ToyData(16), 2, rank()))


def without_contiguous_gradients() -> None:
    with_strategy_option("contiguous_gradients", 1)


def without_reduce_scatter() -> None:
    with_strategy_option("reduce_scatter", 2)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            without_moe,
            (
                "strategy='expert_parallel': Dense has no MoE layer. Build one with lightning_moe.MoE in __init__ or "
                "configure_model, or use strategy='deepspeed'."
            ),
        ),
        (
            with_two_sizes,
            (
                "blocks.1.ep_size=1: every MoE layer of a model uses the same, and expert_parallel_size is 2. "
                "Set both to one number."
            ),
        ),
        (
            with_two_optimizers,
            (
                "configure_optimizers returned 2 optimizers and 0 schedulers: ZeRO works with one optimizer "
                "and at most one scheduler. Return one optimizer with several parameter groups, or chain schedulers with "
                "torch.optim.lr_scheduler.SequentialLR."
            ),
        ),
        (
            clipped_by_value,
            (
                "gradient_clip_algorithm='value': gradients are partitioned over ranks and can only be clipped "
                "by norm. Use gradient_clip_algorithm='norm'."
            ),
        ),
        (
            without_contiguous_gradients,
            (
                "contiguous_gradients=False: with ZeRO 1 the gradients of experts would be reduced "
                "over the wrong ranks. Leave it at True, or use stage 0 or 3."
            ),
        ),
        (
            without_reduce_scatter,
            (
                "reduce_scatter=False: with ZeRO 2 the gradients of experts would be reduced over the "
                "wrong ranks. Leave it at True, or use stage 0 or 3."
            ),
        ),
    ],
)
def test_model_and_trainer(start: Any, message: str, get_pool: Any) -> None:
    assert_refused(get_pool(2).run(refused, start), "MisconfigurationException", message)


def test_trainer_of_pytorch_lightning() -> None:
    import pytorch_lightning

    with pytest.raises(ValueError, match="which a Trainer of pytorch_lightning cannot use") as caught:
        pytorch_lightning.Trainer(accelerator="cpu", strategy=ExpertParallelStrategy(2))
    assert str(caught.value).startswith(
        "You selected an invalid strategy name: `strategy=ExpertParallelStrategy(expert_parallel_size=2) of "
        "lightning.pytorch, which a Trainer of pytorch_lightning cannot use: import Trainer, LightningModule and "
        "callbacks from 'lightning' instead`."
    )


@pytest.mark.parametrize("callback", [AuxLossCallback(), ExpertLoadMonitor()], ids=lambda c: type(c).__name__)
def test_callbacks_in_a_trainer_of_pytorch_lightning(callback: Any, recwarn: Any) -> None:
    import pytorch_lightning

    class Model(pytorch_lightning.LightningModule):
        """Of the other package."""

        def training_step(self, batch: Any, batch_idx: int) -> None:
            """Never reached."""

        def configure_optimizers(self) -> None:
            """Never reached."""

    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", callbacks=[callback], logger=False, max_steps=1, enable_checkpointing=False
    )
    with pytest.raises(Exception, match=r"MoE|Lightning") as caught:
        trainer.fit(Model(), loader(ToyData(16)))
    assert str(caught.value) == (
        f"{type(callback).__name__}: the Trainer is of pytorch_lightning, and this callback of lightning. Import Trainer, "
        "LightningModule and callbacks from 'lightning'."
    )


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            AuxLossCallback(),
            (
                "AuxLossCallback: Dense has no lightning_moe.MoE layer. Build one in "
                "__init__ or configure_model, or leave the callback out."
            ),
        ),
        (
            ExpertLoadMonitor(),
            (
                "ExpertLoadMonitor: Dense has no lightning_moe.MoE layer. Build one in __init__ or "
                "configure_model, or leave the callback out."
            ),
        ),
        (
            SampleText(),
            "SampleText: Dense has no method generate(prompt, num_bytes). Add one, or leave the callback out.",
        ),
    ],
    ids=["aux_loss", "expert_load", "sample_text"],
)
def test_callbacks_without_what_they_need(callback: Any, message: str) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        max_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(Exception, match="Dense") as caught:
        trainer.fit(Dense(), loader(ToyData(16)))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"load_balancing": -0.1},
            "load_balancing=-0.1: must be a finite number of at least 0. Use 0 to leave it out.",
        ),
        ({"router_z": float("nan")}, "router_z=nan: must be a finite number of at least 0. Use 0 to leave it out."),
        ({"warmup_steps": -1}, "warmup_steps=-1: must be 0 or more. Use 0 for full weights at once."),
        ({"scope": "galaxy"}, "scope='galaxy': unknown. Known: micro_batch, sequence, global_batch."),
    ],
)
def test_aux_loss_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        AuxLossCallback(**options)
    assert str(caught.value) == message

"""Models and layers that live longer than one run, or are not quite ours."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe import AuxLossCallback, ExpertParallelStrategy, MoE
from tests.strategies.test_refusals import assert_refused, refused
from tests.strategies.test_training import rank, trainer_for
from tests.toy import BATCH, CONFIG, Toy, ToyData, loader, train_reference


def fitted_twice(stage: int, sizes: tuple[int, int]) -> tuple[dict[str, Tensor], list[int], str]:
    from lightning_moe.testing.state import full_state

    model = Toy(optimizer=torch.optim.SGD, learning_rate=0.3)
    made = []
    for size in sizes:
        trainer = trainer_for(size, stage, callbacks=[AuxLossCallback(0.0)])
        trainer.fit(model, loader(ToyData(2 * BATCH * 3), 2, rank()))
        assert isinstance(trainer.strategy, ExpertParallelStrategy)
        assert trainer.strategy.expert_groups is not None
        made.append(id(trainer.strategy.expert_groups.ep_group))
    block: Any = model.blocks[0]
    return full_state(trainer), made, f"{block.ep_size} {block.ep_group_name}"


@pytest.mark.parametrize(
    ("stage", "sizes"),
    [
        (0, (1, 2)),
        (1, (2, 2)),
        (2, (1, 2)),
        (3, (2, 2)),
        *(pytest.param(*case, marks=pytest.mark.grid) for case in ((0, (2, 2)), (1, (1, 2)), (2, (2, 2)))),
    ],
)
def test_a_second_fit_goes_on(stage: int, sizes: tuple[int, int], get_pool: Any) -> None:
    reference = train_reference(Toy(optimizer=torch.optim.SGD, learning_rate=0.3), ToyData(2 * BATCH * 3), 2, 6)
    for state, groups, adopted in get_pool(2).run(fitted_twice, stage, sizes):
        assert adopted == "2 ep_size_2"
        assert (groups[0] == groups[1]) == (sizes[0] == sizes[1])
        for name, expected in reference.state.items():
            assert_close(state[name], expected.float(), rtol=1e-5, atol=1e-6, msg=name)


def refit_elsewhere() -> None:
    fitted_twice(3, (1, 2))


def test_zero_3_does_not_change_the_size(get_pool: Any) -> None:
    message = (
        "expert_parallel_size=2: ZeRO 3 has partitioned this layer's experts for 1 in an earlier run. Build the model "
        "anew for the new size."
    )
    results = get_pool(2).run(refused, refit_elsewhere)
    assert [said for _, said, _, _ in results] == [message, message]


class Doubled(MoE):
    """A user's own layer."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return 2 * super().forward(x, *args)


class DoubledToy(Toy):
    """Uses it."""

    def build(self) -> None:
        super().build()
        torch.manual_seed(0)
        self.blocks[0] = Doubled(8, CONFIG)


def output_of_subclass() -> tuple[Tensor, Tensor]:
    model = DoubledToy()
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(rank()))
    before = model.blocks[0](x)
    trainer_for(max_steps=1, callbacks=[]).validate(model, loader(ToyData(16), 2, rank()), verbose=False)
    return before.detach(), model.blocks[0](x).detach()


def test_a_subclass_keeps_its_own_forward(get_pool: Any) -> None:
    for before, after in get_pool(2).run(output_of_subclass):
        assert_close(after, before, rtol=1e-5, atol=1e-6)


class Frozen(Toy):
    """Trains everything but the experts."""

    def configure_optimizers(self) -> Any:
        for block in self.blocks:
            block.experts.requires_grad_(False)
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fit_frozen(stage: int) -> None:
    trainer_for(stage=stage, max_steps=1).fit(Frozen(), loader(ToyData(16), 2, rank()))


def test_frozen_experts_at_zero_2(get_pool: Any) -> None:
    message = (
        "configure_optimizers returned an optimizer without any expert's parameters: with ZeRO 2 DeepSpeed needs some. "
        "Use stage 0 or 3 to train with all experts frozen."
    )
    assert_refused(get_pool(2).run(refused, fit_frozen, 2), "MisconfigurationException", message)


def test_frozen_experts_at_zero_0(get_pool: Any) -> None:
    get_pool(2).run(fit_frozen, 0)


def ddp_after_ep() -> str:
    model, data = Toy(), loader(ToyData(16), 2, rank())
    trainer_for(max_steps=1).fit(model, data)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", callbacks=[AuxLossCallback()], max_steps=1,
                        logger=False, enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    try:
        trainer.fit(model, data)
    except Exception as error:  # noqa: BLE001 - the message is what is tested
        return str(error)
    return "trained"


def test_ddp_after_ep_is_refused(get_pool: Any) -> None:
    message = (
        "strategy=DDPStrategy: Toy was sharded by an earlier ExpertParallelStrategy, so that each rank has other experts, "
        "and this strategy would mix them up. Build the model anew."
    )
    assert get_pool(2).run(ddp_after_ep) == [message, message]


def test_input_of_another_width() -> None:
    with pytest.raises(ValueError, match="last dimension") as caught:
        MoE(8, CONFIG)(torch.randn(4, 16))
    assert str(caught.value) == (
        "x has shape [4, 16]: its last dimension must be hidden_size=8. Build the layer for the width of the model."
    )

"""Every kind of MoE layer inside the language model: pyramids, routers, and what a checkpoint rebuilds."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_moe import AuxLossCallback, ExpertBiasUpdate, ExpertParallelStrategy, MoE, MoEConfig
from lightning_moe.models import MoELanguageModel
from lightning_moe.nn import ROUTERS
from lightning_moe.nn import layer as layer_module
from tests.models.test_language_model import MOE, SMALL, loader, make, text, trainer

OF_ROUTER: dict[str, dict[str, Any]] = {
    "switch": {"top_k": 1},
    "expert_choice": {"capacity_factor": 2.0},
    "group_limited": {"num_groups": 2, "topk_groups": 1},
}


def config_of(router: str, **settings: Any) -> MoEConfig:
    return MoEConfig(
        **{"num_experts": 4, "intermediate_size": 16, "router": router, **OF_ROUTER.get(router, {}), **settings}
    )


def moe_layers(model: torch.nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


# ------------------------------------------------------------------------------------------ pyramid


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"experts_by_layer": [2, 8]}, [2, 8]),
        ({"experts_by_layer": None}, [4, 4]),
        ({"num_layers": 5, "moe_every": 2, "experts_by_layer": [2, 6]}, [None, 2, None, 6, None]),
        ({"num_layers": 3, "moe_every": 3, "experts_by_layer": [3]}, [None, None, 3]),
    ],
    ids=str,
)
def test_experts_by_layer(settings: dict[str, Any], expected: list[int | None]) -> None:
    model = make(**settings)
    assert model.transformer is not None
    blocks = [block.feed_forward for block in model.transformer.blocks]
    assert [block.num_experts if isinstance(block, MoE) else None for block in blocks] == (
        expected if len(blocks) == len(expected) else [4, 4]
    )
    for layer in moe_layers(model):
        assert layer.config == replace(MOE, num_experts=layer.num_experts).resolved(), (
            "nothing else differs between layers"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            (
                {"experts_by_layer": given, "num_layers": 5, "moe_every": 2},
                (
                    f"experts_by_layer={given}: must have one number for each of the 2 MoE layers. Give as many, or leave "
                    "it out for moe.num_experts in every layer."
                ),
            )
            for given in ([], [4], [4, 4, 4])
        ),
        (
            {"experts_by_layer": [4, 0]},
            "experts_by_layer=[4, 0], MoE layer 1: num_experts=0: must be at least 1. Use 8, for example.",
        ),
        (
            {"experts_by_layer": [1, 4]},
            (
                "experts_by_layer=[1, 4], MoE layer 0: top_k=2: must be from 1 to num_experts=1. Lower top_k or add "
                "experts."
            ),
        ),
        (
            {"experts_by_layer": [4, 8.0]},
            (
                "experts_by_layer=[4, 8.0], MoE layer 1: num_experts=8.0: must be a whole number. Write it without a "
                "point or quotes."
            ),
        ),
        (
            {"experts_by_layer": [4, 3], "moe": config_of("group_limited")},
            (
                "experts_by_layer=[4, 3], MoE layer 1: num_groups=2: must divide num_experts=3. Use a number of groups "
                "that does, or another number of experts."
            ),
        ),
    ],
    ids=lambda x: str(x["experts_by_layer"]) if isinstance(x, dict) else "",
)
def test_wrong_pyramid_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MoELanguageModel(**{"moe": MOE, **settings})


class WithSGD(MoELanguageModel):
    """What the weights move by is the gradient."""

    def configure_model(self) -> None:
        torch.manual_seed(0)
        super().configure_model()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def pyramid_data(world: int, rank: int) -> DataLoader[Any]:
    tokens = torch.randint(256, (24, 17), generator=torch.Generator().manual_seed(3))
    sampler = DistributedSampler(tokens, world, rank, shuffle=False)  # type: ignore[arg-type]
    return DataLoader(tokens, batch_size=8 // world, sampler=sampler)  # type: ignore[arg-type]


def pyramid_in_ranks(stage: int) -> tuple[dict[str, Tensor], list[int]]:
    from lightning_moe.testing.state import full_state

    model = WithSGD(MOE, **SMALL, experts_by_layer=[2, 6])  # type: ignore[arg-type]
    fit = trainer(
        devices=2, strategy=ExpertParallelStrategy(2, stage=stage), max_steps=3, callbacks=[AuxLossCallback(0.0)]
    )
    fit.fit(model, pyramid_data(2, torch.distributed.get_rank()))
    return full_state(fit), [layer.num_local_experts for layer in moe_layers(model)]


@pytest.fixture(scope="module")
def pyramid_of_one() -> dict[str, Tensor]:
    model = WithSGD(MOE, **SMALL, experts_by_layer=[2, 6])  # type: ignore[arg-type]
    # The routers' losses would be taken over other micro-batches: here the task's alone is compared.
    trainer(max_steps=3, callbacks=[AuxLossCallback(0.0)]).fit(model, pyramid_data(1, 0))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", range(4))
def test_pyramid_in_two_ranks_is_that_of_one_process(
    stage: int, pyramid_of_one: dict[str, Tensor], get_pool: Any
) -> None:
    for state, local in get_pool(2).run(pyramid_in_ranks, stage):
        assert local == [1, 3]
        assert state.keys() == pyramid_of_one.keys()
        for name, weight in pyramid_of_one.items():
            torch.testing.assert_close(state[name], weight, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------ routers


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_every_router_trains(router: str) -> None:
    moe = config_of(router, num_shared_experts=1, shared_expert_gate=True)
    model = MoELanguageModel(moe, **SMALL, learning_rate=0.05, warmup_steps=0)  # type: ignore[arg-type]
    callbacks: list[L.Callback] = [AuxLossCallback(0.1, 0.01, importance=0.1)]
    callbacks += [ExpertBiasUpdate()] if moe.expert_bias else []
    tokens = text()
    model.configure_model()
    before = float(model.eval().token_losses(tokens).mean())
    fit = trainer(max_steps=4, callbacks=callbacks)
    fit.fit(model, loader(tokens), loader(tokens))
    assert fit.callback_metrics["train_loss"].isfinite()
    assert float(model.eval().token_losses(tokens).mean()) < before - 0.05


def test_hash_router_gets_the_tokens() -> None:
    """The same byte goes to the same experts in every layer, wherever it stands."""
    model = make(moe=config_of("hash")).eval()
    seen: list[Tensor] = []
    for layer in moe_layers(model):
        layer.router.register_forward_hook(lambda _, args, routing: seen.append(routing.topk_ids_TK))
    tokens = torch.randint(4, (3, 20))
    model(tokens)
    experts: dict[int, set[tuple[int, ...]]] = {}
    for ids_TK in seen:
        for token, ids_K in zip(tokens.flatten().tolist(), ids_TK.tolist(), strict=True):
            experts.setdefault(token, set()).add(tuple(ids_K))
    assert {token: len(found) for token, found in experts.items()} == {0: 1, 1: 1, 2: 1, 3: 1}
    assert len({next(iter(found)) for found in experts.values()}) > 1


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"expert_choice"}))
def test_no_other_router_sees_later_bytes(router: str) -> None:
    model = make(moe=config_of(router, eval_capacity_factor=None)).eval()
    tokens = text(2, 11)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    torch.testing.assert_close(model(tokens)[:, :7], model(changed)[:, :7])


def test_expert_choice_in_a_causal_model_warns_once() -> None:
    message = (
        "router='expert_choice': the experts choose among all tokens of a batch, later ones included, so that a causal "
        "model sees its future: its loss is too good, and generation will not be as good as it. Use router='topk' for a "
        "model that is to generate."
    )
    layer_module._warn_of_looking_ahead.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            make(moe=config_of("expert_choice"))
        MoE(8, config_of("expert_choice"))
    assert [str(warning.message) for warning in caught] == [message]


# -------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("moe", "settings"),
    [
        (
            config_of("group_limited", route_scale=2.5, num_shared_experts=1, shared_expert_gate=True),
            {"experts_by_layer": [4, 8]},
        ),
        (config_of("switch", capacity_factor=1.5, overflow="next_expert", jitter=0.05), {}),
        (config_of("sinkhorn", router_dtype="float64", sinkhorn_iterations=7, sinkhorn_tolerance=0.1), {}),
        (config_of("expert_choice", pad_to_capacity=True, residual=True), {"experts_by_layer": None}),
        (config_of("topk", score_function="sigmoid", expert_bias=True, eval_capacity_factor=2.0), {}),
        (config_of("topk", score_before_topk=False, normalize_topk=False, drop_priority="random"), {}),
    ],
    ids=lambda x: x.router if isinstance(x, MoEConfig) else "",
)
def test_a_checkpoint_rebuilds_the_model(moe: MoEConfig, settings: dict[str, Any], tmp_path: Path) -> None:
    model = MoELanguageModel(moe, **SMALL, **settings)  # type: ignore[arg-type]
    callbacks: list[L.Callback] = [AuxLossCallback(), *([ExpertBiasUpdate(0.1)] if moe.resolved().expert_bias else [])]
    fit = trainer(max_steps=1, callbacks=callbacks)
    fit.fit(model, loader(text()))
    fit.save_checkpoint(tmp_path / "one.ckpt")
    loaded = MoELanguageModel.load_from_checkpoint(tmp_path / "one.ckpt")
    assert loaded.moe == moe
    assert loaded.hparams["moe"] == asdict(moe)
    assert loaded.hparams == model.hparams
    assert loaded.experts_by_layer == settings.get("experts_by_layer")
    tokens = text()
    torch.testing.assert_close(loaded.eval()(tokens), model.eval()(tokens), rtol=0, atol=0)
    for one, other in zip(moe_layers(loaded), moe_layers(model), strict=True):
        assert (one.router.state_dict().keys() >= {"expert_bias"}) == bool(moe.resolved().expert_bias)
        if moe.resolved().expert_bias:
            assert one.router.expert_bias.any()
            assert torch.equal(one.router.expert_bias, other.router.expert_bias)

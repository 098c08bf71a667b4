"""The settings of layers, losses and schedules as keys of the command: their values, defaults and messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from lightning_moe.cli import MoECLI
from tests.test_cli import MOE, QUICKSTART, flat, from_a_shell, lookup, printed, refused, without

# Another value than the default for each; all of them go together.
OF_LAYERS: dict[str, Any] = {
    "router": "noisy_topk",
    "overflow": "next_expert",
    "drop_priority": "position",
    "score_function": "sigmoid",
    "score_before_topk": False,
    "route_scale": 2.5,
    "expert_bias": True,
    "router_dtype": "float64",
    "jitter": 0.02,
    "num_groups": 4,
    "topk_groups": 2,
    "sinkhorn_tolerance": 0.01,
    "sinkhorn_iterations": 20,
    "pad_to_capacity": True,
    "num_shared_experts": 1,
    "shared_expert_gate": True,
}
OF_LOSSES: dict[str, Any] = {
    "scope": "global_batch",
    "importance": 0.5,
    "load": 0.5,
    "decay": "cosine",
    "decay_steps": 50,
    "final_ratio": 0.5,
}


def settings_below(command: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the arguments change."""
    before, after = flat(without(capsys)), flat(printed(capsys, *command))
    assert before.keys() == after.keys()
    return {key: value for key, value in after.items() if before[key] != value}


@pytest.mark.parametrize("place", ["command line", "yaml"])
def test_every_setting_of_layers_and_losses(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if place == "yaml":
        written = {"model": {"init_args": {"moe": OF_LAYERS}}, "aux_loss": OF_LOSSES}
        (tmp_path / "all.yaml").write_text(yaml.safe_dump(written))
        args = ["--config", "all.yaml"]
    else:
        args = [f"--model.moe.{name}={value}" for name, value in OF_LAYERS.items()]
        args += [f"--aux_loss.{name}={value}" for name, value in OF_LOSSES.items()]
    expected = {MOE + name: value for name, value in OF_LAYERS.items()}
    expected |= {"aux_loss." + name: value for name, value in OF_LOSSES.items()}
    assert settings_below(args, capsys) == expected


def test_null_is_the_routers_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Each on top of another value, of the command line and of a file."""
    nulls = ["model.moe.score_function", "model.moe.expert_bias", "model.moe.jitter", "model.moe.intermediate_size"]
    nulls += ["model.moe.eval_capacity_factor", "model.experts_by_layer", "aux_loss.decay_steps"]
    given = ["--model.moe.score_function=sigmoid", "--model.moe.expert_bias=true", "--model.moe.jitter=0.5"]
    given += ["--model.moe.intermediate_size=8", "--model.moe.eval_capacity_factor=2", "--aux_loss.decay=linear"]
    given += ["--model.experts_by_layer=[4,8]", "--aux_loss.decay_steps=9"]
    keys = [key.replace("model.", "model.init_args.") for key in nulls]
    config = printed(capsys, *given)
    assert all(lookup(config, key) is not None for key in keys)
    for spelling in ([f"--{key}=null" for key in nulls], [part for key in nulls for part in (f"--{key}", "null")]):
        config = printed(capsys, *given, *spelling)
        assert {key: lookup(config, key) for key in keys} == dict.fromkeys(keys)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.moe.router=group_limited"], {"score_function": "sigmoid", "expert_bias": True, "jitter": 0.0}),
        (
            ["--model.moe.router=switch", "--model.moe.top_k=1"],
            {"score_function": "softmax", "expert_bias": False, "jitter": 0.01},
        ),
        ([], {"score_function": "softmax", "expert_bias": False, "jitter": 0.0}),
    ],
    ids=lambda x: " ".join(x) or "topk" if isinstance(x, list) else "",
)
def test_router_has_its_own_defaults(args: list[str], expected: dict[str, Any]) -> None:
    """As ``MoEConfig`` says, which a default that has been filled in for another router must not hide."""
    with from_a_shell():
        cli = MoECLI(["--config", QUICKSTART, "--trainer.logger=false", *args], run=False)
    assert {name: getattr(cli.model.moe.resolved(), name) for name in expected} == expected


def test_help_has_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    for help_of, keys in (
        (["--help"], [f"--aux_loss.{name}" for name in OF_LOSSES]),
        (
            ["--model.help=lightning_moe.models.MoELanguageModel"],
            [*(f"--model.moe.{name}" for name in OF_LAYERS), "--model.experts_by_layer"],
        ),
    ):
        with pytest.raises(SystemExit) as ended, from_a_shell():
            MoECLI(["fit", *help_of])
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert [key for key in keys if f"{key} " not in out] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--model.moe.router=gshard", "--model.moe.top_k=3"],
            "top_k=3: router='gshard' takes 2 experts per token. Use top_k=2, or router='topk'.",
        ),
        (
            ["--model.moe.jitter=0.1", "--model.moe.router=hash"],
            (
                "jitter=0.1: router='hash' does not read it. Leave it out, or use router='expert_choice' or "
                "'group_limited' or 'gshard' or 'noisy_topk' or 'sinkhorn' or 'switch' or 'topk'."
            ),
        ),
        (
            ["--model.experts_by_layer=[8]"],
            (
                "experts_by_layer=[8]: must have one number for each of the 2 MoE layers. Give as many, or leave it out "
                "for moe.num_experts in every layer."
            ),
        ),
        (
            ["--model.experts_by_layer=[8,1]"],
            (
                "experts_by_layer=[8, 1], MoE layer 1: top_k=2: must be from 1 to num_experts=1. Lower top_k or add "
                "experts."
            ),
        ),
        (
            ["--aux_loss.decay_steps=5"],
            (
                "decay='none': decay_steps=5 and final_ratio=0.0 would do nothing. Use decay='linear' or 'cosine', or "
                "leave them out."
            ),
        ),
        (
            ["--trainer.callbacks=lightning_moe.TopKSchedule", "--trainer.callbacks.top_k={-1: 2}"],
            (
                "top_k: -1 must be an optimizer step, a whole number of at least 0. Use {0: value, 1000: value}, for "
                "example."
            ),
        ),
        (
            ["--trainer.callbacks=lightning_moe.ExpertBiasUpdate", "--trainer.callbacks.rate=0"],
            "rate=0.0: must be a finite number above 0. Use 0.001, or leave the callback out.",
        ),
        (
            ["--model.moe.dispatcher=alltoal"],
            (
                "dispatcher='alltoal': unknown. Known: allgather, alltoall, auto, fused, local, tune. One of your own has to "
                "be in lightning_moe.dispatch.DISPATCHERS before the model is built."
            ),
        ),
        (
            ["--model.moe.router=topkk"],
            (
                "router='topkk': unknown. Known: expert_choice, group_limited, gshard, hash, noisy_topk, random, sinkhorn, "
                "switch, topk. One of your own has to be registered before the model is built, by "
                "lightning_moe.nn.register_router."
            ),
        ),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_wrong_combination(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *args)
    assert said.endswith(f"\nerror: {message}\n")
    assert "Traceback" not in said

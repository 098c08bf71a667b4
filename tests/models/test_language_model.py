from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_moe import AuxLossCallback, MoE, MoEConfig
from lightning_moe.models import MoELanguageModel
from lightning_moe.models.language_model import lr_factor
from lightning_moe.models.transformer import apply_rotary, rotary_tables
from lightning_moe.nn.accounting import active_flops_per_token

SMALL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=16)


def make(**settings: Any) -> MoELanguageModel:
    model = MoELanguageModel(**{"moe": MOE, **SMALL, **settings})
    model.configure_model()
    return model


def text(num_sequences: int = 8, sequence_length: int = 16) -> Tensor:
    return torch.randint(256, (num_sequences, sequence_length + 1))


def loader(tokens: Tensor, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(tokens, batch_size=batch_size)  # type: ignore[arg-type]


def trainer(**settings: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [AuxLossCallback()],
    }
    return L.Trainer(**{**quiet, **settings})


# --------------------------------------------------------------------------------------------------- model


def test_flops_of_a_batch_reach_the_throughput_monitor(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    monitor = ThroughputMonitor(batch_size_fn=len, window_size=2)
    callbacks = [AuxLossCallback(), monitor]
    model = make()
    trainer(max_steps=4, log_every_n_steps=1, logger=logger, callbacks=callbacks).fit(model, loader(text(16)))
    per_token = active_flops_per_token(model) + 6 * 2 * 16 * (16 + 1)
    assert model.train().flops_per_batch == 4 * 16 * per_token
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    last = dict(zip(rows[0].split(","), rows[-2].split(","), strict=True))
    rates = [float(last[f"train/device/{unit}_per_sec"]) for unit in ("flops", "batches")]
    assert rates[0] == pytest.approx(model.flops_per_batch * rates[1], rel=1e-3)


def test_logits_have_a_row_per_position() -> None:
    assert make().eval()(torch.zeros(3, 5, dtype=torch.int64)).shape == (3, 5, 256)


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    loss = make(hidden_size=64).eval().token_losses(text(32, 64)).mean()
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


@pytest.mark.parametrize("moe_every", [1, 2])
def test_a_later_byte_changes_no_earlier_logits(moe_every: int) -> None:
    model = make(moe_every=moe_every).eval()
    tokens = text(2, 11)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-4)


def test_the_order_of_earlier_bytes_matters() -> None:
    model = make().eval()
    one, other = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 1, 3]])
    assert not torch.allclose(model(one)[0, -1], model(other)[0, -1], atol=1e-6)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q_C, k_C = torch.randn(2, 8).unbind()
    cos_SP, sin_SP = rotary_tables(12, 8, torch.device("cpu"))
    q_SC, k_SC = (apply_rotary(x_C.expand(12, 8), cos_SP, sin_SP) for x_C in (q_C, k_C))
    scores_SS = q_SC @ k_SC.T
    for distance in range(12):
        diagonal = scores_SS.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(q_SC.norm(dim=1), q_C.norm().expand(12))
    torch.testing.assert_close(q_SC[0], q_C)


@pytest.mark.parametrize(
    ("moe_every", "expected"), [(1, [True] * 4), (2, [False, True] * 2), (4, [False] * 3 + [True])]
)
def test_moe_every(moe_every: int, expected: list[bool]) -> None:
    model = make(num_layers=4, moe_every=moe_every)
    assert model.transformer is not None
    assert [isinstance(block.feed_forward, MoE) for block in model.transformer.blocks] == expected


def test_layers_are_made_once_and_only_in_configure_model() -> None:
    model = MoELanguageModel(MOE, **SMALL)  # type: ignore[arg-type]
    assert not list(model.parameters())
    model.configure_model()
    before = list(model.parameters())
    model.configure_model()
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))


def test_a_forward_before_configure_model() -> None:
    expected = "MoELanguageModel has no layers yet: call configure_model() first, as a Trainer does."
    with pytest.raises(RuntimeError, match=f"^{re.escape(expected)}$"):
        MoELanguageModel(MOE)(text())


def test_losses_are_fp32_in_bf16() -> None:
    losses = make().eval().bfloat16().token_losses(text(2, 5))
    assert losses.dtype == torch.float32
    assert losses.shape == (2, 5)


def test_token_losses_are_those_of_the_next_byte() -> None:
    model, tokens = make().eval(), text(2, 5)
    log_probs = model(tokens[:, :-1]).log_softmax(-1)
    expected = torch.stack([-log_probs[b, s, tokens[b, s + 1]] for b in range(2) for s in range(5)]).view(2, 5)
    torch.testing.assert_close(model.token_losses(tokens), expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"vocab_size": 100}, "vocab_size=100: must be at least 256, the values of a byte. Use 256."),
        ({"hidden_size": 0}, "hidden_size=0: must be at least 1. Use 64, for example."),
        ({"num_layers": 0}, "num_layers=0: must be at least 1. Use 2, for example."),
        ({"num_heads": 0}, "num_heads=0: must be at least 1. Use 4, for example."),
        (
            {"hidden_size": 12, "num_heads": 4},
            (
                "num_heads=4: must divide hidden_size=12 into even widths, for rotary positions. Use a "
                "hidden_size that is a multiple of 8, or fewer heads."
            ),
        ),
        *(
            (
                {"moe_every": value},
                (
                    f"moe_every={value}: must be from 1 to num_layers=2, or no layer would be an MoE. Use 1 "
                    "for MoE in every layer."
                ),
            )
            for value in (0, 3)
        ),
        (
            {"learning_rate": 0.0},
            "learning_rate=0.0: must be a finite number above 0. Use 4e-3, for example.",
        ),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must be a finite number of at least 0. Use 0 for none."),
        ({"warmup_steps": -1}, "warmup_steps=-1: must be 0 or more. Use 0 to start at the peak."),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio=1.5: must be from 0 to 1. Use 1 for no decay."),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        MoELanguageModel(MOE, **settings)


# ------------------------------------------------------------------------------------------------ training


def test_it_learns_a_tiny_text_by_heart() -> None:
    line = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. "))
    tokens = line.repeat(12)[:528].view(16, 33)
    model = MoELanguageModel(MOE, hidden_size=32, num_heads=2, learning_rate=1e-2, weight_decay=0.0)
    fit = trainer(max_steps=80)
    fit.fit(model, loader(tokens, 16))
    assert fit.callback_metrics["train_loss"] < 0.3


def test_fit_logs_validation_loss_and_the_lr_falls_each_step() -> None:
    model = MoELanguageModel(MOE, **SMALL, warmup_steps=1)  # type: ignore[arg-type]
    fit = trainer(max_steps=4, log_every_n_steps=1)
    fit.fit(model, loader(text(16)), loader(text(6)))
    assert {"train_loss", "val_loss"} <= set(fit.callback_metrics)
    optimizer = fit.optimizers[0]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([4e-4, 4e-4])


def test_validation_loss_is_the_mean_over_sequences_of_a_short_batch_too() -> None:
    model, tokens = make(), text(6)
    (results,) = trainer().validate(model, loader(tokens), verbose=False)
    (tested,) = trainer().test(model, loader(tokens), verbose=False)
    expected = model.eval().token_losses(tokens).mean().item()
    assert results["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert tested["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_predict_gives_a_loss_per_sequence() -> None:
    model, tokens = make(), text(6)
    predicted = trainer().predict(model, loader(tokens))
    assert predicted is not None
    losses_B = torch.cat([torch.as_tensor(batch) for batch in predicted])
    assert losses_B.shape == (6,)
    torch.testing.assert_close(losses_B, model.eval().token_losses(tokens).mean(1))


def test_every_parameter_is_in_one_optimizer_group() -> None:
    model = make(moe_every=2, num_layers=4)
    fit = trainer(max_steps=1)
    fit.fit(model, loader(text()))
    groups = fit.optimizers[0].param_groups
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    decayed, kept = groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert model.transformer is not None
    assert any(parameter is model.transformer.embedding.weight for parameter in kept["params"])
    assert all(parameter.ndim == 1 or parameter.shape == (256, 16) for parameter in kept["params"])
    assert {parameter.ndim for parameter in decayed["params"]} == {2, 3}
    experts = [m.experts.w1 for m in model.modules() if isinstance(m, MoE)]
    assert all(any(w is parameter for parameter in decayed["params"]) for w in experts)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1 / 5), (3, 4 / 5), (4, 1.0), (12, 0.55), (20, 0.1), (25, 0.1)],
)
def test_lr_factor(step: int, expected: float) -> None:
    assert lr_factor(step, num_steps=20, warmup_steps=4, min_lr_ratio=0.1) == pytest.approx(expected)


def test_lr_factor_of_runs_without_an_end_or_shorter_than_the_warm_up() -> None:
    assert lr_factor(10**6, num_steps=math.inf, warmup_steps=4, min_lr_ratio=0.1) == 1.0
    assert lr_factor(1, num_steps=2, warmup_steps=4, min_lr_ratio=0.1) == pytest.approx(2 / 5)
    assert lr_factor(0, num_steps=0, warmup_steps=0, min_lr_ratio=0.1) == 1.0


def test_a_checkpoint_rebuilds_the_model(tmp_path: Path) -> None:
    model = MoELanguageModel(MOE, **SMALL)  # type: ignore[arg-type]
    fit = trainer(max_steps=1)
    fit.fit(model, loader(text()))
    fit.save_checkpoint(tmp_path / "one.ckpt")
    loaded = MoELanguageModel.load_from_checkpoint(tmp_path / "one.ckpt")
    assert loaded.moe == MOE
    assert loaded.hparams == model.hparams
    tokens = text()
    torch.testing.assert_close(loaded.eval()(tokens), model.eval()(tokens))


# ---------------------------------------------------------------------------------------------- generation


def test_generate_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    model = make()
    state = torch.get_rng_state()
    first = model.generate("def f(", max_new_bytes=20)
    assert model.generate("def f(", max_new_bytes=20) == first
    assert model.generate("def f(", max_new_bytes=20, seed=1) != first
    assert first.startswith("def f(")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_generate_restores_the_mode(training: bool) -> None:
    model = make().train(training)
    model.generate("a", max_new_bytes=1)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("prompt", ["", "a", "b" * 40, b"\x00\xff"])
def test_generate_runs_one_forward_per_byte_on_a_cropped_context(prompt: str | bytes) -> None:
    model = make()
    lengths: list[int] = []
    assert model.transformer is not None
    model.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(prompt, max_new_bytes=9, context_length=8)
    assert len(lengths) == 9
    assert lengths == [min(8, max(1, len(prompt)) + i) for i in range(9)]


def test_generate_at_temperature_0_takes_the_most_likely_byte() -> None:
    model = make().eval()
    text = model.generate(b"abc", max_new_bytes=1, temperature=0)
    best = model(torch.tensor([list(b"abc")]))[0, -1].argmax()
    assert text == (b"abc" + bytes([int(best)])).decode(errors="replace")


def test_generate_replaces_what_is_not_utf8() -> None:
    assert make().generate(b"\xff", max_new_bytes=0) == "\N{REPLACEMENT CHARACTER}"


def test_generate_draws_bytes_only_from_a_larger_vocabulary() -> None:
    model = make(vocab_size=300)
    assert model.transformer is not None
    with torch.no_grad():
        nn.init.constant_(model.transformer.head.weight[:256], -1.0)
    assert len(model.generate("a", max_new_bytes=20)) <= 21


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_new_bytes": -1}, "max_new_bytes=-1: must be at least 0. Use 200, for example."),
        ({"temperature": -0.5}, "temperature=-0.5: must be at least 0. Use 0.8, for example."),
        ({"temperature": math.nan}, "temperature=nan: must be at least 0. Use 0.8, for example."),
        ({"context_length": 0}, "context_length=0: must be at least 1. Use 128, for example."),
    ],
)
def test_generate_refuses_wrong_settings(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        make().generate("a", **settings)

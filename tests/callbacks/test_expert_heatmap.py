"""What the heatmaps count and write, against loops over single tokens; nothing that fails in drawing ends a run."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.utils.checkpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_moe.callbacks import _figures, expert_heatmap
from lightning_moe.callbacks.expert_heatmap import ExpertHeatmap, classes_by_id
from tests.callbacks.heatmap_files import figures, lines
from tests.callbacks.runs import (
    Manual,
    Side,
    in_order,
    layers_of,
    parallel,
    quiet,
    rank,
    selected,
    start_weights,
    tokens_of,
    uneven,
    windows,
)
from tests.toy import CONFIG, Toy, ToyData

pytest.importorskip("matplotlib")

BATCHES, ACCUMULATE, STEPS, EVERY = 4, 3, 7, 3  # steps of 3, 1, 3, 1, ... micro-batches; figures at 3, 6 and 7
LAYERS = ["blocks.0", "blocks.1"]
CLASSES = {"few": [0, 1, 2], "odd": [7, 3]}
OTHER = 2


# ------------------------------------------------------------------------------------- by loops


class Classed(Side):
    """Tokens have ids by their first feature, as in Toy, and some of them are padding."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x)
        x = x.detach().requires_grad_()
        for block in self.blocks:
            if self.recompute and self.training:
                y = y + torch.utils.checkpoint.checkpoint(
                    block, x, real(x), ids(x), use_reentrant=self.recompute == "reentrant"
                )
            else:
                y = y + block(x, real(x), ids(x))
        return self.out(torch.tanh(y))


def real(x: Tensor) -> Tensor:
    return x[..., 1] > -1


def ids(x: Tensor) -> Tensor:
    """From below zero to beyond all that are in a class."""
    return (x[..., 0] * 8).floor().int()


def by_loops(world: int, accumulate: int) -> dict[int, Tensor]:
    """Assignments of every class to every expert at each figure, [layers, C, E]."""
    weights, counts, done, found = start_weights(), torch.zeros(2, 3, 4, dtype=torch.int64), 0, {}
    for batch, ends in windows(BATCHES, accumulate, STEPS):
        for of_rank in range(world):
            for x_D in tokens_of(uneven(of_rank, BATCHES), batch).flatten(0, 1):
                if not x_D[1] > -1:
                    continue
                token_id = int((x_D[0] * 8).floor())
                kind = next((k for k, members in enumerate(CLASSES.values()) if token_id in members), OTHER)
                for layer, weight_ED in enumerate(weights):
                    for expert in selected(weight_ED @ x_D, CONFIG.top_k):
                        counts[layer, kind, expert] += 1
        done += ends
        if ends and (done % EVERY == 0 or done == STEPS):
            found[done] = counts.clone()
            counts.zero_()
    return found


def drawn(folder: str, world: int, ep_size: int, recompute: str | None, classes: Any, accumulate: int) -> None:
    heatmap = ExpertHeatmap(EVERY, classes)
    options: dict[str, Any] = {
        "callbacks": [heatmap], "max_steps": STEPS, "accumulate_grad_batches": accumulate, "default_root_dir": folder,
        "num_sanity_val_steps": 2, "val_check_interval": 2,
    }  # fmt: skip
    trainer = parallel(world, ep_size, **options) if world > 1 else quiet(**options)
    model = Classed(recompute=recompute, learning_rate=0.0)
    of_rank = rank() if world > 1 else 0
    trainer.fit(model, in_order(uneven(of_rank, BATCHES)), in_order(ToyData(8, seed=5)))
    assert not any(layer.tap.watchers for layer in layers_of(model))
    trainer.validate(model, in_order(ToyData(8, seed=5)), verbose=False)


@pytest.mark.parametrize(
    ("world", "ep_size", "recompute", "classes", "accumulate"),
    [
        (1, 1, None, None, 1),
        (1, 1, "reentrant", CLASSES, 3),
        (2, 2, "non-reentrant", CLASSES, 1),
        (2, 1, None, CLASSES, 3),
        (4, 2, "reentrant", None, 3),
    ],
)
def test_numbers_are_those_of_a_plain_loop(
    world: int, ep_size: int, recompute: str | None, classes: Any, accumulate: int, get_pool: Any, tmp_path: Path
) -> None:
    arguments = str(tmp_path), world, ep_size, recompute, classes, accumulate
    if world == 1:
        drawn(*arguments)
    else:
        get_pool(world).run(drawn, *arguments)
    expected = by_loops(world, accumulate)
    assert list(expected) == [3, 6, 7]
    assert all(count.any() for counts in expected.values() for count in counts[0]), "every class has tokens"
    spans = [{"first_step": first, "step": step, "layers": LAYERS} for first, step in ((1, 3), (4, 6), (7, 7))]
    for line, span, counts in zip(lines(tmp_path), spans, expected.values(), strict=True):
        assert line == {**span, "tokens_per_expert": counts.sum(1).tolist()}
    names = ["load_step=000003.png", "load_step=000006.png", "load_step=000007.png"]
    if classes is not None:
        for line, span, counts in zip(lines(tmp_path, "classes.jsonl"), spans, expected.values(), strict=True):
            assert line == {**span, "classes": ["few", "odd", "other"], "assignments": counts.tolist()}
        names = [name.replace("load", "classes") for name in names] + names
    assert figures(tmp_path) == names


def test_figures_show_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, with the steps in the title."""
    shown: list[tuple[Any, ...]] = []
    for name in ("load_figure", "class_figure"):
        make = getattr(expert_heatmap, name)

        def watched(*arguments: Any, make: Callable[..., Any] = make) -> Any:
            shown.append(arguments)
            return make(*arguments)

        monkeypatch.setattr(expert_heatmap, name, watched)

    def fit(classes: Any) -> None:
        shown.clear()
        quiet(callbacks=[ExpertHeatmap(2, classes)], max_steps=3, default_root_dir=str(tmp_path)).fit(
            Classed(), in_order(ToyData(12))
        )

    fit(CLASSES)
    loads = [line["tokens_per_expert"] for line in lines(tmp_path)]
    assert [[layer.tolist() for layer in arguments[0]] for arguments in shown[::2]] == loads
    assert [arguments[1:] for arguments in shown[::2]] == [
        (LAYERS, "Load of the experts, steps 1 to 2"), (LAYERS, "Load of the experts, step 3")
    ]  # fmt: skip
    counts, *rest = shown[1]
    assert [layer.tolist() for layer in counts] == lines(tmp_path, "classes.jsonl")[0]["assignments"]
    assert rest == [["few", "odd", "other"], LAYERS, "Which tokens the experts get, steps 1 to 2"]


def test_one_reduction_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    reduced: list[int] = []
    whole = expert_heatmap.sum_over_ranks
    monkeypatch.setattr(expert_heatmap, "sum_over_ranks", lambda sums: reduced.append(len(sums)) or whole(sums))
    quiet(callbacks=[ExpertHeatmap(3, CLASSES)], max_steps=7).fit(Classed(), in_order(ToyData(28)))
    assert reduced == [2 * 3 * 4] * 3


def test_manual_optimization(tmp_path: Path) -> None:
    """A figure after every second step, which takes two batches."""
    trainer = quiet(callbacks=[ExpertHeatmap(2)], max_steps=5, default_root_dir=str(tmp_path))
    trainer.fit(Manual(accumulate=2, learning_rate=0.0), in_order(ToyData(40)))
    totals = [(line["step"], sum(line["tokens_per_expert"][0])) for line in lines(tmp_path)]
    of_a_batch = 4 * 3 * CONFIG.top_k
    assert totals == [(2, 4 * of_a_batch), (4, 4 * of_a_batch), (5, 2 * of_a_batch)]


# ----------------------------------------------------------------------------------- token classes


def test_classes_of_bytes() -> None:
    names, class_of_id = classes_by_id("bytes")
    assert names == ["space", "control", "digit", "lower", "upper", "punctuation", "non-ASCII", "other"]

    def expected(byte: int) -> str:
        text = bytes([byte])
        if byte > 127:
            return "non-ASCII"
        kinds = {"digit": text.isdigit(), "lower": text.islower(), "upper": text.isupper(), "space": text == b" ",
                 "control": not text.decode().isprintable()}  # fmt: skip
        return next((kind for kind, holds in kinds.items() if holds), "punctuation")

    assert [names[i] for i in class_of_id.tolist()] == [*[expected(byte) for byte in range(256)], "other"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0: must be at least 1. Use 50."),
        ({"token_classes": {}}, "token_classes={}: must be 'bytes', or have at least one class. Use {'digits': [48,"),
        ({"token_classes": "words"}, "token_classes='words': must be 'bytes', or"),
        ({"token_classes": [1, 2]}, "token_classes=[1, 2]: must be 'bytes', or"),
        ({"token_classes": {"a": []}}, "token_classes: 'a' has no list of ids. Leave it out."),
        ({"token_classes": {"a": 5}}, "token_classes: 'a' has no list of ids. Leave it out."),
        (
            {"token_classes": {"a": [10**9]}},
            "token_classes: 'a' has 1000000000: must be whole numbers from 0 to below 1",
        ),
        ({"token_classes": {"other": [1]}}, "token_classes: 'other' is the name of all ids that are in no class."),
        ({"token_classes": {"a": [-1]}}, "token_classes: 'a' has -1: must be whole numbers from 0"),
        ({"token_classes": {"a": [1.5]}}, "token_classes: 'a' has 1.5: must be"),
        ({"token_classes": {"a": [1, 4], "b": [4]}}, "token_classes: 4 is in 'a' and in 'b'. Leave it in one."),
    ],
    ids=str,
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ExpertHeatmap(**options)


def test_layers_that_are_not_told_ids() -> None:
    message = (
        "token_classes: layer blocks.0 is not told the ids of its tokens. Call it as moe(x, token_ids=ids), or use "
        "ExpertHeatmap without token_classes."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        quiet(callbacks=[ExpertHeatmap(1, "bytes")], max_steps=1).fit(Side(), in_order(ToyData(4)))


# ---------------------------------------------------------------------------------------- failures


def warned_of(fit: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    return [text for warning in caught if (text := str(warning.message)).startswith("ExpertHeatmap")]


class Unwilling(Logger):
    """Takes metrics and no figures; there is nothing to say about it."""

    name, version = "unwilling", 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""


def test_other_loggers_are_passed_over(tmp_path: Path) -> None:
    trainer = quiet(callbacks=[ExpertHeatmap(1)], max_steps=2, logger=Unwilling(), default_root_dir=str(tmp_path))
    assert not warned_of(lambda: trainer.fit(Toy(), in_order(ToyData(8))))
    assert len(figures(tmp_path / "unwilling" / "version_0")) == 2


def test_disk_that_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "experts").write_text("a file is where the folder should be")
    trainer = quiet(callbacks=[ExpertHeatmap(1, CLASSES)], max_steps=5, default_root_dir=str(tmp_path))
    texts = warned_of(lambda: trainer.fit(Toy(), in_order(ToyData(20))))
    assert trainer.global_step == 5
    (text,) = texts
    assert text.startswith(f"ExpertHeatmap: writing to {tmp_path / 'experts'} failed: FileExistsError: ")
    assert text.endswith("Training goes on, and the next failure of this kind is not reported.")


def on_a_full_disk(folder: str) -> int:
    if rank() == 0:
        (Path(folder) / "experts").write_text("")
    torch.distributed.barrier()
    trainer = parallel(2, 2, callbacks=[ExpertHeatmap(1)], max_steps=5, default_root_dir=folder)
    trainer.fit(Toy(), in_order(uneven(rank(), 5)))
    return trainer.global_step


def test_disk_that_takes_nothing_hangs_no_rank(get_pool: Any, tmp_path: Path) -> None:
    assert get_pool(2).run(on_a_full_disk, str(tmp_path)) == [5, 5]


def test_drawing_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no such font")

    monkeypatch.setattr(expert_heatmap, "load_figure", fail)
    trainer = quiet(callbacks=[ExpertHeatmap(1)], max_steps=3, default_root_dir=str(tmp_path))
    texts = warned_of(lambda: trainer.fit(Toy(), in_order(ToyData(12))))
    (text,) = texts
    assert text == (
        "ExpertHeatmap: drawing a figure failed: RuntimeError: no such font. Training goes on, and the next failure of "
        "this kind is not reported."
    )
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3], "the numbers are there all the same"


class Breaks(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("out of memory")


def test_a_run_that_fails_has_its_figures(tmp_path: Path) -> None:
    model = Toy()
    with pytest.raises(RuntimeError, match="out of memory"):
        quiet(callbacks=[ExpertHeatmap(2), Breaks()], max_steps=5, default_root_dir=str(tmp_path)).fit(
            model, in_order(ToyData(20))
        )
    assert figures(tmp_path) == ["load_step=000002.png"]
    assert not any(layer.tap.watchers for layer in layers_of(model))


# --------------------------------------------------------------------------------------- as a PNG


def test_png_leaves_the_collector_as_it_was() -> None:
    import gc

    from matplotlib.figure import Figure

    for enabled in (True, False):
        gc.enable() if enabled else gc.disable()
        try:
            png = _figures.as_png(lambda: Figure(figsize=(2, 1), dpi=100))
            assert gc.isenabled() == enabled
        finally:
            gc.enable()
        assert struct.unpack(">II", png[16:24]) == (200, 100)

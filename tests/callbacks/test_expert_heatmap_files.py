"""Where the heatmaps' files lie: in a folder of each run, to which a resumed run appends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_moe import ExpertHeatmap
from tests.callbacks.heatmap_files import figures, lines
from tests.callbacks.runs import Memory, in_order, parallel, quiet, rank, uneven
from tests.toy import CONFIG, Toy, ToyData

pytest.importorskip("matplotlib")


def fit(folder: Path, *loggers: Logger, steps: int = 1, resume: int | None = None, **options: Any) -> None:
    """A run with a figure each step; it keeps a checkpoint of its last one, and may begin from one."""
    keep = ModelCheckpoint(str(folder), filename="{step}", every_n_train_steps=steps, monitor=None)
    trainer = quiet(callbacks=[ExpertHeatmap(1), keep], max_steps=steps, default_root_dir=str(folder),
                    logger=list(loggers) or False, enable_checkpointing=True, **options)  # fmt: skip
    path = None if resume is None else str(folder / f"step={resume}.ckpt")
    trainer.fit(Toy(), in_order(ToyData(4 * steps)), ckpt_path=path)


def steps_in(folder: Path, of: str = "experts") -> list[int]:
    return [line["step"] for line in lines(folder, of=of)]


class Named(Memory):
    """A logger whose runs share a folder, as those of W&B and MLflow do."""

    def __init__(self, save_dir: Path, run: str) -> None:
        super().__init__()
        self._save_dir, self._run = str(save_dir), run

    name = "project"

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def version(self) -> str:  # type: ignore[override]
        return self._run


def test_runs_of_a_logger_that_share_a_folder(tmp_path: Path) -> None:
    """They lie where ModelCheckpoint has each run's checkpoints."""
    for run in ("x1", "x2"):
        trainer = quiet(callbacks=[ExpertHeatmap(), ModelCheckpoint()], max_steps=1, logger=Named(tmp_path, run),
                        enable_checkpointing=True)  # fmt: skip
        trainer.fit(Toy(), in_order(ToyData(4)))
        assert steps_in(tmp_path / "project" / run) == [1]
        assert sorted(path.name for path in (tmp_path / "project" / run).iterdir()) == ["checkpoints", "experts"]


def test_a_logger_with_a_folder_for_each_run_comes_first(tmp_path: Path) -> None:
    fit(tmp_path, Named(tmp_path, "x"), CSVLogger(str(tmp_path), name="runs", version=3))
    assert figures(tmp_path / "runs" / "version_3") == ["load_step=000001.png"]
    assert not (tmp_path / "project").exists()


@pytest.mark.parametrize("with_logger", [False, True])
def test_another_run_in_the_same_place_mixes_with_none(with_logger: bool, tmp_path: Path) -> None:
    """And a resumed one goes on with its own."""
    loggers = [Named(tmp_path, "x")] if with_logger else []
    place = tmp_path / "project" / "x" if with_logger else tmp_path
    fit(tmp_path, *loggers, steps=2)
    first = (place / "experts" / "load.jsonl").read_bytes()
    fit(tmp_path, *loggers, steps=1)
    assert (place / "experts" / "load.jsonl").read_bytes() == first
    assert steps_in(place, "experts-v1") == [1]
    assert figures(place, "experts-v1") == ["load_step=000001.png"]
    fit(tmp_path, *loggers, steps=3, resume=2)
    assert steps_in(place) == [1, 2, 3]
    assert steps_in(place, "experts-v1") == [1]
    fit(tmp_path, *loggers, steps=3, resume=1)
    assert steps_in(place, "experts-v1") == [1, 2, 3]
    assert {path.name for path in place.glob("experts*")} == {"experts", "experts-v1"}


def test_a_run_resumed_in_another_place_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    """With loggers of a version for each fit it is always so."""
    fit(tmp_path, CSVLogger(str(tmp_path), "runs"), steps=2)
    fit(tmp_path, CSVLogger(str(tmp_path), "runs"), steps=3, resume=2)
    assert steps_in(tmp_path / "runs" / "version_0") == [1, 2]
    (line,) = lines(tmp_path / "runs" / "version_1")
    assert (line["first_step"], line["step"]) == (3, 3)


def test_a_trainer_that_fits_again(tmp_path: Path) -> None:
    trainer, model = quiet(callbacks=[ExpertHeatmap(1)], max_steps=1, default_root_dir=str(tmp_path)), Toy()
    trainer.fit(model, in_order(ToyData(12)))
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.fit(model, in_order(ToyData(12)))
    assert steps_in(tmp_path) == [1, 2, 3]


def resumed(folder: str) -> None:
    def fit(steps: int, *callbacks: L.Callback, **options: Any) -> None:
        trainer = parallel(2, 2, callbacks=[ExpertHeatmap(2), *callbacks], max_steps=steps, default_root_dir=folder,
                           enable_checkpointing=bool(callbacks))  # fmt: skip
        trainer.fit(Toy(), in_order(uneven(rank(), 3)), **options)

    fit(3, ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, monitor=None))
    if rank() == 0:
        with (Path(folder) / "experts" / "load.jsonl").open("a") as file:
            file.write('{"step":4,"layers":["blo')  # killed while it wrote
    torch.distributed.barrier()
    fit(6, ckpt_path=str(Path(folder) / "step=3.ckpt"))


def test_resumed_run_of_two_ranks_appends(get_pool: Any, tmp_path: Path) -> None:
    get_pool(2).run(resumed, str(tmp_path))
    *first, cut_off, fourth, sixth = (tmp_path / "experts" / "load.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in [*first, fourth, sixth]] == [2, 3, 4, 6]
    assert cut_off == '{"step":4,"layers":["blo'
    of_fourth = json.loads(fourth)
    assert of_fourth["first_step"] == 4
    assert sum(of_fourth["tokens_per_expert"][0]) == (4 * 3 + 4 * 4) * CONFIG.top_k, "of step 4 alone"
    assert [name[-5:] for name in figures(tmp_path)] == ["2.png", "3.png", "4.png", "6.png"]


def test_a_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    quiet(callbacks=[ExpertHeatmap(1)], fast_dev_run=2, default_root_dir=str(tmp_path)).fit(Toy(), in_order(ToyData(8)))
    assert not list(tmp_path.rglob("experts"))


class Elsewhere(Memory):
    save_dir = "s3://bucket/run"


def test_folder_that_is_not_local_is_refused() -> None:
    message = (
        "ExpertHeatmap: the log folder s3://bucket/run/memory/version_0 is not a local one, and its files are appended "
        "to. Give the Trainer a first logger with a local folder, or leave the callback out."
    )
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}$"):
        quiet(callbacks=[ExpertHeatmap()], max_steps=1, logger=Elsewhere()).fit(Toy(), in_order(ToyData(4)))


def test_two_heatmaps_are_refused() -> None:
    """They would write the same files. Lightning says so, since each has a state."""
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ExpertHeatmap`"):
        quiet(callbacks=[ExpertHeatmap(1), ExpertHeatmap(2, {"few": [1]})])

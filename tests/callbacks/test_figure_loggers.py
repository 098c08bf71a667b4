"""Figures as each logger's own files have them, read back and compared with the PNG in the log folder."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_moe.callbacks import _figures
from lightning_moe.callbacks.expert_heatmap import ExpertHeatmap
from tests.callbacks.runs import in_order, parallel, quiet, rank, uneven
from tests.callbacks.wandb_file import history
from tests.toy import Toy, ToyData

pytest.importorskip("matplotlib")

STEPS = [2, 4, 5]
TAGS = {"moe/expert_load": "load", "moe/token_classes": "classes"}


def fit(folder: Path, *loggers: Logger) -> list[str]:
    """A run with figures at STEPS; its warnings of ours."""
    heatmap = ExpertHeatmap(2, {"few": [0, 1, 2]})
    trainer = quiet(callbacks=[heatmap], max_steps=5, logger=list(loggers) or False, default_root_dir=str(folder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Toy(), in_order(ToyData(20)))
    return [text for warning in caught if (text := str(warning.message)).startswith("ExpertHeatmap")]


def written(folder: Path, tag: str, step: int) -> bytes:
    return (folder / "experts" / f"{TAGS[tag]}_step={step:06}.png").read_bytes()


def pixels(png: bytes) -> Any:
    from PIL import Image

    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


# ------------------------------------------------------------------------------------- TensorBoard


def in_event_files(folder: Path) -> dict[str, dict[int, tuple[bytes, int, int]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0})
    accumulator.Reload()
    return {
        tag: {event.step: (event.encoded_image_string, event.width, event.height) for event in accumulator.Images(tag)}
        for tag in accumulator.Tags()["images"]
    }


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert not fit(tmp_path, TensorBoardLogger(str(tmp_path), name="runs", version=0))
    folder = tmp_path / "runs" / "version_0"
    found = in_event_files(folder)
    assert found.keys() == TAGS.keys()
    for tag, images in found.items():
        assert list(images) == STEPS
        for step, (png, width, height) in images.items():
            assert png == written(folder, tag, step)
            assert pixels(png).shape == (height, width, 3)


def on_ranks(folder: str) -> None:
    logger = TensorBoardLogger(folder, name="runs", version=0)
    trainer = parallel(2, 2, callbacks=[ExpertHeatmap(2)], max_steps=3, logger=logger)
    trainer.fit(Toy(), in_order(uneven(rank(), 3)))
    torch.distributed.barrier()


def test_tensorboard_of_two_ranks(get_pool: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    get_pool(2).run(on_ranks, str(tmp_path))
    found = in_event_files(tmp_path / "runs" / "version_0")
    assert {tag: list(images) for tag, images in found.items()} == {"moe/expert_load": [2, 3]}


def test_writer_of_tensorboardx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning takes it where tensorboard is not installed; it gets the image itself."""
    from matplotlib.figure import Figure

    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.summary_pb2", None)
    got: list[Any] = []

    class Writer:
        def add_image(self, tag: str, image: Any, step: int, dataformats: str) -> None:
            got.append((tag, image.shape, step, dataformats))

    class Logging(TensorBoardLogger):
        experiment = Writer()

    png = _figures.as_png(lambda: Figure(figsize=(2, 1), dpi=100))
    _figures.log_figure(Logging("nowhere"), "moe/expert_load", png, 7)
    assert got == [("moe/expert_load", (100, 200, 3), 7, "HWC")]


# -------------------------------------------------------------------------------------------- W&B


def test_wandb_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MODE", "offline"), ("SILENT", "true"), ("ERROR_REPORTING", "false")):
            patch.setenv(f"WANDB_{name}", value)
        try:
            logger = WandbLogger(save_dir=str(tmp_path), offline=True)
            assert not fit(tmp_path, logger)
        finally:
            wandb.finish()
            wandb.teardown()
            for name in [name for name in os.environ if name.startswith("WANDB_")]:
                patch.delenv(name)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    folder = tmp_path / str(logger.name) / str(logger.version)
    for tag in TAGS:
        logged = [entry for entry in history(file) if f"{tag}._type" in entry]
        assert [entry["trainer/global_step"] for entry in logged] == STEPS
        for entry, step in zip(logged, STEPS, strict=True):
            (name,) = entry[f"{tag}.filenames"]
            expected = pixels(written(folder, tag, step))
            assert np.array_equal(pixels((run / "files" / name).read_bytes()), expected)
            assert (entry[f"{tag}.height"], entry[f"{tag}.width"]) == expected.shape[:2]


# ----------------------------------------------------------------------------------------- MLflow


def test_mlflow_with_local_files(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which MLflow 3 asks for
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_TRACKING_URI", "")  # the logger sets it
        logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}")
        assert not fit(tmp_path, logger)
        client, found = logger.experiment, {}
        folder = tmp_path / str(logger.experiment_id) / str(logger.run_id)
        pattern = re.compile(r"images/moe~(?P<name>\w+)\+step\+(?P<step>\d+)\+timestamp\+.*(?<!compressed)\.png")
        for artifact in client.list_artifacts(logger.run_id, "images"):
            if match := pattern.fullmatch(artifact.path):
                png = (folder / "artifacts" / artifact.path).read_bytes()
                found[f"moe/{match['name']}", int(match["step"])] = png
        assert client.get_run(logger.run_id).data.tags["mlflow.loggedImages"] == "True"
    assert found.keys() == {(tag, step) for tag in TAGS for step in STEPS}
    for (tag, step), png in found.items():
        assert np.array_equal(pixels(png), pixels(written(folder, tag, step)))


# ----------------------------------------------------------------------------------------- others


def test_csv_and_no_logger_have_files_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert not fit(tmp_path / "csv", CSVLogger(str(tmp_path / "csv"), name=None, version="run"))
    assert not fit(tmp_path / "none")
    for folder in (tmp_path / "csv" / "run", tmp_path / "none"):
        for tag in TAGS:
            for step in STEPS:
                assert pixels(written(folder, tag, step)).shape[2] == 3
    assert not [record for record in caplog.records if "xpert" in record.getMessage()]


class Broken(TensorBoardLogger):
    asked = 0

    @property
    def experiment(self) -> Any:
        return self

    def _get_file_writer(self) -> Any:
        self.asked += 1
        raise ConnectionError("no route to host")

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Metrics are not what is tested."""

    log_hyperparams = log_graph = save = finalize = log_metrics


def test_logger_that_fails_keeps_others_from_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    broken = Broken(str(tmp_path), name="broken", version=0)
    (warned,) = fit(tmp_path, broken, TensorBoardLogger(str(tmp_path), name="runs", version=0))
    assert warned.startswith("ExpertHeatmap: giving a figure to Broken failed: ConnectionError: no route to host.")
    assert broken.asked == 6, "it may come back"
    assert all(list(images) == STEPS for images in in_event_files(tmp_path / "runs" / "version_0").values())

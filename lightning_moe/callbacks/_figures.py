"""How a figure gets into files and loggers, and no failure there ends a run."""

from __future__ import annotations

import gc
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FigureWriter:
    """Draws figures, writes them as PNG, and hands them to loggers. For rank zero.

    Each is drawn once, and here: in a thread of its own it holds up training as long, since drawing and training both
    need Python's lock. What fails, as on a full disk, is said in one warning, and the run goes on.

    Args:
        folder: Where files go; made when it is needed.
        loggers: Those that take figures get them: TensorBoard's, W&B's and MLflow's, under the name of the figure.
    """

    def __init__(self, folder: Path, loggers: Sequence[Logger]) -> None:
        self._folder = folder
        self._loggers = loggers
        self._warned: set[str] = set()

    def append(self, name: str, entry: Mapping[str, Any]) -> None:
        """Adds a line of JSON to a file, in one piece."""
        with self._surviving(f"writing to {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / name).open("ab+") as file:
                if file.tell() and not _ends_a_line(file):  # cut off by a kill: no line of ours belongs there
                    file.write(b"\n")
                file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def draw(self, make: Callable[[], Figure], name: str, tag: str, step: int) -> None:
        """Draws a figure and gives it to all.

        Args:
            make: Makes the figure.
            name: Of the file.
            tag: Name for the loggers.
            step: Optimizer step.
        """
        with self._surviving("drawing a figure"):
            png = as_png(make)
            with self._surviving(f"writing to {self._folder}"):
                self._folder.mkdir(parents=True, exist_ok=True)
                (self._folder / name).write_bytes(png)
            for logger in self._loggers:
                with self._surviving(f"giving a figure to {type(logger).__name__}"):
                    log_figure(logger, tag, png, step)

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  # a figure is not worth a run, whatever a logger or the disk has
            if what not in self._warned:
                self._warned.add(what)
                rank_zero_warn(
                    f"ExpertHeatmap: {what} failed: {type(error).__name__}: {error}. Training goes on, and the next "
                    "failure of this kind is not reported."
                )


def log_folder(trainer: L.Trainer) -> str:
    """The folder that a run has to itself, or the Trainer's, if no logger has one.

    That of a logger with such folders comes first, as the report looks for figures there; else it is as ModelCheckpoint
    has it. ``Trainer.log_dir`` alone is the same for all runs of W&B and MLflow.

    Returns:
        Rank zero's, on every rank. Collective.
    """
    folder = next((str(logger.log_dir) for logger in trainer.loggers if logger.log_dir is not None), None)
    if folder is None:
        folder = str(trainer.default_root_dir)
        if trainer.loggers:
            first = trainer.loggers[0]
            version = first.version if isinstance(first.version, str) else f"version_{first.version}"
            folder = os.path.join(first.save_dir or folder, str(first.name), version)
    rank_zeros: str = trainer.strategy.broadcast(folder)
    return rank_zeros


def unused_folder(root: str, name: str) -> str:
    """``name`` in a folder, or the first of ``name-v1``, ``name-v2`` in which nothing is."""
    names = itertools.chain([name], (f"{name}-v{i}" for i in itertools.count(1)))
    paths = (os.path.join(root, name) for name in names)
    return next(path for path in paths if not any(Path(path).glob("*")))


def as_png(make: Callable[[], Figure]) -> bytes:
    """Draws a figure that ``make`` makes."""
    # A figure is some ten thousand objects that refer to each other. They have to go while they are young: a
    # collection that finds them old goes through all objects of the process, which takes as long as several figures.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        image = BytesIO()
        make().savefig(image, format="png", pil_kwargs={"compress_level": 1})  # 6 takes longer for a tenth of the size
    finally:
        gc.collect(1)
        if was_enabled:
            gc.enable()
    return image.getvalue()


def log_figure(logger: Logger, tag: str, png: bytes, step: int) -> None:
    """Gives a PNG to a logger, if it takes figures.

    Args:
        logger: Any.
        tag: Its name there.
        png: The file's content.
        step: Optimizer step.
    """
    if isinstance(logger, TensorBoardLogger):
        _to_tensorboard(logger.experiment, tag, png, step)
    elif isinstance(logger, WandbLogger):
        logger.log_image(tag, [_decoded(png)], step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, _decoded(png), key=tag, step=step)


def _to_tensorboard(writer: Any, tag: str, png: bytes, step: int) -> None:
    try:
        from tensorboard.compat.proto.summary_pb2 import Summary
    except ModuleNotFoundError:  # so that the logger's writer is that of tensorboardX
        import numpy as np

        writer.add_image(tag, np.asarray(_decoded(png)), step, dataformats="HWC")
        return
    # As add_image does it, which would decode and encode it again.
    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _decoded(png: bytes) -> Any:
    from PIL import Image

    return Image.open(BytesIO(png)).convert("RGB")


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"

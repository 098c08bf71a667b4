"""Byte-level language-model data from any folder of text files.

Shapes: N windows, S sequence.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_moe.data.files import find_files, read_files
from lightning_moe.data.resumable import ResumableDataLoader


class TextWindows(Dataset[Tensor]):
    """Consecutive windows of a text; the bytes that do not fill the last one are left out.

    Args:
        text: uint8, one token a byte.
        window_size: Bytes in a window.
    """

    def __init__(self, text: Tensor, window_size: int) -> None:
        num_windows = len(text) // window_size
        self.windows = text[: num_windows * window_size].view(num_windows, window_size)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index].long()


class TextDataModule(L.LightningDataModule):
    """Windows of bytes from text files, split into training and validation **by file**.

    A batch is an int64 tensor [B, S + 1] of byte values: the first S are the input, the last S the target.
    The files of a side are joined with a newline between them and cut into windows that do not overlap.

    Which side a file is on depends only on ``seed`` and on its path below the folder, so that it is the same
    on every rank and in every copy of the folder. A file that can be reached by several names counts once.
    Test and predict loaders give the validation windows: an independent test takes a ``path`` that training
    has not seen.

    Args:
        path: ``stdlib`` for the standard library of the running Python, without installed packages and
            tests; or a folder, or a glob such as ``books/**/*.txt``, for which ``pattern`` is not used. A
            folder that is itself called ``stdlib`` is ``./stdlib``.
        pattern: Glob of the files below the folder.
        exclude: Globs of paths below the folder to leave out, such as ``vendor/*``; ``*`` matches ``/`` too.
        sequence_length: S, in bytes.
        batch_size: B, windows per rank and micro-batch.
        val_fraction: Share of the files that is held out, rounded, but at least one file on each side.
        max_val_bytes: Cuts the validation text to this many bytes; ``None`` takes all.
        num_workers: Processes per loader.
        seed: Of the split and the shuffling.

    Attributes:
        train_files: Names, below the folder, of the training files, once :meth:`setup` has run.
        val_files: Those of the validation files.

    Raises:
        ValueError: An argument is out of its range; from :meth:`setup` also where there is no such path, no
            readable file, no text, a single file, or too little text for one window on either side or for one
            batch per rank. The message names field, value, rule and remedy.
    """

    def __init__(
        self,
        path: str = "stdlib",
        pattern: str = "**/*.py",
        exclude: list[str] | None = None,
        sequence_length: int = 128,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        max_val_bytes: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1. Use {_DEFAULTS[name]}, for example.")
        if not 0 < val_fraction < 1:
            raise ValueError(
                f"val_fraction={val_fraction}: must be above 0 and below 1, a share of the files. "
                "Use 0.05, for example."
            )
        if max_val_bytes is not None and max_val_bytes <= sequence_length:
            raise ValueError(
                f"max_val_bytes={max_val_bytes}: must be at least sequence_length + 1 = "
                f"{sequence_length + 1}, one window. Raise it, or leave it out to validate on all of the "
                "held-out text."
            )
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: must be 0 or more. Use 0 to load in the main process.")
        self.path = path
        self.pattern = pattern
        self.exclude = list(exclude or [])
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.max_val_bytes = max_val_bytes
        self.num_workers = num_workers
        self.seed = seed
        self.train_files: list[str] = []
        self.val_files: list[str] = []
        self._train_windows: TextWindows | None = None
        self._val_windows: TextWindows | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the files, once.

        Raises:
            ValueError: see the class.
        """
        if self._train_windows is None:
            files = find_files(self.path, self.pattern, self.exclude)
            self._split(read_files(files, self.path))
        if stage in ("fit", None):
            self._check_one_batch_per_rank()

    def _split(self, texts: Mapping[str, bytes]) -> None:
        train_files, val_files = split_files(texts, self.val_fraction, self.seed)
        if not train_files:
            raise ValueError(
                f"path={self.path!r}: {val_files[0]} is the only file with text, and the split "
                "is by file, so that validation text was never seen. Cut it into several files, or name a "
                "folder with more."
            )
        train_text = join_texts(texts[name] for name in train_files)
        val_text = join_texts(texts[name] for name in val_files)[: self.max_val_bytes]
        window_size = self.sequence_length + 1
        if min(len(train_text), len(val_text)) < window_size:
            raise ValueError(
                f"sequence_length={self.sequence_length}: one window takes {window_size} bytes, and there "
                f"are {len(train_text)} bytes in {len(train_files)} training files and {len(val_text)} in "
                f"{len(val_files)} validation files. Lower sequence_length, add text, or change val_fraction="
                f"{self.val_fraction} or seed={self.seed}, which choose the files."
            )
        self.train_files, self.val_files = train_files, val_files
        self._train_windows = TextWindows(train_text, window_size)
        self._val_windows = TextWindows(val_text, window_size)

    def _check_one_batch_per_rank(self) -> None:
        assert self._train_windows is not None
        num_windows = len(self._train_windows)
        world_size = self.trainer.world_size if self.trainer is not None else 1
        if num_windows < world_size * self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}: one batch for each of {world_size} ranks takes "
                f"{world_size * self.batch_size} windows, and the training text has {num_windows} of "
                f"{self.sequence_length + 1} bytes. Lower batch_size or sequence_length, or add text."
            )

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled windows of the training files; a last batch that is not full is left out."""
        generator = torch.Generator().manual_seed(self.seed)
        return self._loader(self._train_windows, shuffle=True, drop_last=True, generator=generator)

    @override
    def val_dataloader(self) -> DataLoader[Tensor]:
        """Windows of the validation files, in order."""
        return self._loader(self._val_windows)

    @override
    def test_dataloader(self) -> DataLoader[Tensor]:
        """The same as :meth:`val_dataloader`."""
        return self._loader(self._val_windows)

    @override
    def predict_dataloader(self) -> DataLoader[Tensor]:
        """The same as :meth:`val_dataloader`."""
        return self._loader(self._val_windows)

    def _loader(self, windows: TextWindows | None, **kwargs: Any) -> DataLoader[Tensor]:
        if windows is None:
            raise RuntimeError("TextDataModule has no text yet: call setup() first, or hand it to a Trainer.")
        return ResumableDataLoader(
            windows,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **kwargs,
        )


_DEFAULTS = {"sequence_length": 128, "batch_size": 16}


def split_files(names: Iterable[str], val_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Splits file names into training and validation, each sorted.

    They are ordered by a hash of (seed, name), and the first are held out: an added file moves few others.

    Args:
        names: Paths below the folder.
        val_fraction: Share of the files to hold out, above 0 and below 1.
        seed: Chooses another split.

    Returns:
        Training and validation names; at least one in each where there are two; one alone is in validation.
    """

    def hash_of(name: str) -> bytes:
        # fsencode: a file's name may be no valid UTF-8.
        return hashlib.sha256(b"%d:%b" % (seed, os.fsencode(name))).digest()

    shuffled = sorted(names, key=hash_of)
    num_val = max(1, min(len(shuffled) - 1, math.floor(val_fraction * len(shuffled) + 0.5)))
    return sorted(shuffled[num_val:]), sorted(shuffled[:num_val])


def join_texts(texts: Iterable[bytes]) -> Tensor:
    """The texts with a newline between them, as uint8 [bytes]."""
    return torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8)

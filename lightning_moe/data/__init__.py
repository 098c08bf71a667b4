"""Data modules for the command, the examples and the tests."""

from lightning_moe.data.resumable import ResumableDataLoader
from lightning_moe.data.text import TextDataModule

__all__ = ["ResumableDataLoader", "TextDataModule"]

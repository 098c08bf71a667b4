"""Data modules for the command, the examples and the tests."""

from lightning_moe.data.text import TextDataModule

__all__ = ["TextDataModule"]

"""Checkpoints."""

from lightning_moe.checkpoint.layout import CheckpointLayout, check_layout, write_layout

__all__ = ["CheckpointLayout", "check_layout", "write_layout"]

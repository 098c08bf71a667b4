"""Checkpoints: one format, a folder, that does not depend on the layout of the run that saved it."""

from lightning_moe.checkpoint.errors import CheckpointError
from lightning_moe.checkpoint.exporting import export
from lightning_moe.checkpoint.loading import Checkpoint, read_weights
from lightning_moe.checkpoint.manifest import FORMAT_VERSION, Manifest, is_checkpoint
from lightning_moe.checkpoint.single import MoECheckpointIO

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "CheckpointError",
    "Manifest",
    "MoECheckpointIO",
    "export",
    "is_checkpoint",
    "read_weights",
]

"""``lightning-moe report``: one self-contained page of what a run has logged."""

from lightning_moe.commands.report.command import main

__all__ = ["main"]

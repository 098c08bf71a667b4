"""A sample of what a language model has learned, at the end of training."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_moe.callbacks._layers import require_lightning


@runtime_checkable
class GeneratesText(Protocol):
    """A module that continues a text, with the same number of forward passes on every rank."""

    def generate(self, prompt: str, num_bytes: int, /) -> str:
        """Returns prompt and continuation."""
        ...


class SampleText(L.Callback):
    """Lets the model write when training ends, and shows it on the console.

    Args:
        prompt: Text to continue.
        num_bytes: Bytes to add.

    Raises:
        ValueError: ``num_bytes`` is below 1.
        MisconfigurationException: at setup, where the module has no ``generate(prompt, num_bytes)``.
    """

    def __init__(self, prompt: str = "def ", num_bytes: int = 200) -> None:
        if num_bytes < 1:
            raise ValueError(f"num_bytes={num_bytes}: must be at least 1. Use 200, or leave the callback out.")
        self.prompt = prompt
        self.num_bytes = num_bytes

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_lightning(trainer, self)
        if not isinstance(pl_module, GeneratesText):
            raise MisconfigurationException(
                f"SampleText: {type(pl_module).__name__} has no method generate(prompt, num_bytes). Add one, or leave "
                "the callback out."
            )

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, GeneratesText)
        text = pl_module.generate(self.prompt, self.num_bytes)  # on every rank: each forward is collective
        # What a young model writes may hold control characters, which must not reach the terminal.
        shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
        rank_zero_info(f"A sample, continuing {self.prompt!r}:\n{shown}")

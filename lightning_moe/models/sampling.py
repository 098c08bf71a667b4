"""Sampling bytes from a language model.

Shapes: S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NUM_BYTES = 256
"""The tokens 0 to 255 are the values of a byte."""


@torch.no_grad()
def sample_bytes(
    model: Callable[[Tensor], Tensor],
    prompt: bytes,
    num_bytes: int,
    temperature: float,
    seed: int,
    context_length: int,
    device: torch.device,
) -> bytes:
    """Draws bytes one after the other, in exactly ``num_bytes`` forward passes.

    Args:
        model: Logits of the next token at each position, int64 [1, S] -> [1, S, V].
        prompt: At least one byte.
        num_bytes: How many to draw.
        temperature: Divides the logits; 0 takes the most likely byte.
        seed: Of the drawing, which happens on the CPU: the same on every rank.
        context_length: The model sees at most this many bytes, the last ones.
        device: Where the model is.

    Returns:
        The drawn bytes, without the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    text = bytearray(prompt)
    for _ in range(num_bytes):
        tokens_1S = torch.tensor([list(text[-context_length:])], device=device)
        # Tokens above 255, of a larger vocabulary, are no bytes.
        logits_V = model(tokens_1S)[0, -1, :NUM_BYTES].float().cpu()
        if temperature == 0:
            token = logits_V.argmax()
        else:
            token = torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)
        text.append(int(token))
    return bytes(text[len(prompt) :])

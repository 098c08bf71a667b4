"""What routing may know of a batch of tokens beside their activations, and its randomness.

Random numbers are a function of (key, sample, position), not of the order in which they are drawn: a token gets the
same ones whichever rank it is on. A sample is one along the first dimension of the input, which is dealt out to ranks.
The key is drawn from torch's default CPU generator, whose state both kinds of activation checkpointing restore, so that
a recomputed layer routes as it did.

Shapes: T tokens of this rank, S tokens of a sequence, Z random numbers per token.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lightning_moe.parallel import SINGLE_RANK, ExpertGroups


class Tokens:
    """The tokens of one forward pass of one layer.

    Args:
        shape: Of the input without its width: [T], or [..., S], whose last dimension is a sequence.
        valid: False where a token is padding, which is neither routed nor counted; ``None`` is nowhere.
        token_ids: Ids in a vocabulary, for routers that go by them.
        groups: Where this rank stands among those that have other data.
        training: Whether random numbers differ from one pass to the next. Otherwise they are always the same.
        device: Of the activations.

    Attributes:
        sequence_length: S; T where the input is one sequence.

    Raises:
        ValueError: ``valid`` or ``token_ids`` has another shape or a wrong dtype.
    """

    def __init__(
        self,
        shape: torch.Size,
        valid: Tensor | None = None,
        token_ids: Tensor | None = None,
        groups: ExpertGroups = SINGLE_RANK,
        training: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, given in (("valid", valid), ("token_ids", token_ids)):
            if given is not None and given.shape != shape:
                raise ValueError(
                    f"{name} has shape {list(given.shape)}: must be {list(shape)}, that of x without its last "
                    "dimension. Give one value per token."
                )
        if token_ids is not None and (token_ids.is_floating_point() or token_ids.dtype == torch.bool):
            raise ValueError(f"token_ids has dtype {token_ids.dtype}: must be whole numbers. Use token_ids.long().")
        if valid is not None and valid.dtype != torch.bool:
            raise ValueError(f"valid has dtype {valid.dtype}: must be torch.bool, True for a token. Use mask.bool().")
        self.shape = shape
        self.valid_T = None if valid is None else valid.reshape(-1)
        self.token_ids_T = None if token_ids is None else token_ids.reshape(-1)
        self.groups = groups
        self.training = training
        self.device = torch.device(device)
        self.sequence_length = shape[-1] if shape else 1

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.shape.numel()

    @property
    def num_valid(self) -> Tensor:
        """Tokens that are no padding, a scalar int64: nobody has to wait for the device."""
        if self.valid_T is None:
            return torch.full((), self.num_tokens, device=self.device)
        return self.valid_T.sum()

    @cached_property
    def key(self) -> int:
        """What this pass's random numbers depend on: the same on ranks whose default generators agree."""
        return int(torch.randint(2**62, (), device="cpu")) if self.training else 0

    def uniform(self, width: int, stream: int) -> Tensor:
        """Uniform random numbers in (0, 1), fp32.

        Args:
            width: Z.
            stream: Which of several uses within one pass this is for; the layer itself has 0 to 2.

        Returns:
            [T, Z], a function of key, stream and each token's place in the global batch.
        """
        tokens_per_sample = max(self.shape[1:].numel(), 1)
        index_T = torch.arange(self.num_tokens, device=self.device)
        # As DistributedSampler deals a batch out: sample b of rank r is b * ranks + r of the global batch.
        sample_T = index_T // tokens_per_sample * self.groups.data_size + self.groups.data_rank
        position_T = index_T % tokens_per_sample
        stream_T = torch.full_like(index_T, stream)  # an index of its own: added to the key it would shift the others
        return hashed_uniform(self.key, [stream_T, sample_T, position_T], width)

    def gumbel(self, width: int, stream: int) -> Tensor:
        """Standard Gumbel random numbers, [T, Z]: ``argmax(logits + gumbel)`` samples from ``softmax(logits)``."""
        return -(-self.uniform(width, stream).log()).log()

    def normal(self, width: int, stream: int) -> Tensor:
        """Standard normal random numbers, [T, Z]."""
        return torch.special.ndtri(self.uniform(width, stream))


def hashed_uniform(key: int, indices: list[Tensor], width: int) -> Tensor:
    """Uniform numbers in (0, 1) that depend on nothing but their arguments, on any device.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014) over key, indices and column, one after the other.

    Args:
        key: Any whole number; taken modulo 2^64.
        indices: Whole numbers of every row, each [T].
        width: Z.

    Returns:
        [T, Z], fp32, multiples of 2^-23 plus 2^-24, so that every device holds them exactly.

    >>> hashed_uniform(7, [torch.tensor([3, 4])], width=2)
    tensor([[0.6828, 0.2315],
            [0.7276, 0.8949]])
    """
    hashed = torch.full((), _signed(key), dtype=torch.int64, device=indices[0].device)
    for index_T in indices:
        hashed = _mix(hashed + (index_T + 1) * _GOLDEN)
    column_Z = (torch.arange(width, device=hashed.device) + 1) * _GOLDEN
    bits_TZ = _shift_right(_mix(hashed.unsqueeze(-1) + column_Z), 64 - 23)
    return (bits_TZ.float() + 0.5) * 2.0**-23


def _signed(number: int) -> int:
    """Modulo 2^64 as int64 holds it; torch has no shift and product on unsigned ones."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _FACTORS[0]
    bits = (bits ^ _shift_right(bits, 27)) * _FACTORS[1]
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Without the sign that torch's own shift of int64 draws in."""
    return (bits >> by) & ((1 << (64 - by)) - 1)

"""A pre-norm decoder-only Transformer, whose feed-forward blocks may be Mixtures of Experts.

Shapes: B batch, S sequence, D model width, H heads, C channels of one head, P = C / 2 pairs of
channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from lightning_moe.config import MoEConfig
from lightning_moe.nn import MoE, SharedMLP

ROTARY_BASE = 10_000.0
"""Wavelengths run from 2 pi to 2 pi times this (Su et al. 2021, section 3.3)."""


def rotary_tables(sequence_length: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, both [S, C / 2] in fp32.

    Computed anew, because a buffer would be cast to bf16 with the module, where positions above 256 collide.

    Args:
        sequence_length: S, in tokens.
        head_size: C, even.
        device: Where to make them.
    """
    channels_P = torch.arange(0, head_size, 2, device=device, dtype=torch.float32)
    frequencies_P = ROTARY_BASE ** (-channels_P / head_size)
    positions_S = torch.arange(sequence_length, device=device, dtype=torch.float32)
    angles_SP = torch.outer(positions_S, frequencies_P)
    return angles_SP.cos(), angles_SP.sin()


def apply_rotary(x_BHSC: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
    """Rotates each pair of channels (c, c + C/2) by its position's angle; keeps shape and dtype."""
    a_BHSP, b_BHSP = x_BHSC.float().chunk(2, dim=-1)
    rotated = torch.cat((a_BHSP * cos_SP - b_BHSP * sin_SP, b_BHSP * cos_SP + a_BHSP * sin_SP), dim=-1)
    return rotated.to(x_BHSC.dtype)


class Embedding(nn.Embedding):
    """An embedding that starts small, so that the first blocks are heard beside it on the residual stream."""

    @override
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class Head(nn.Linear):
    """A projection to logits that starts small, so that the first loss is that of a uniform guess."""

    @override
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class CausalSelfAttention(nn.Module):
    """Multi-head attention of every position to itself and those before it.

    Args:
        hidden_size: D.
        num_heads: H; divides D into heads of even width.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        """Attends, [B, S, D] -> [B, S, D]."""
        B, S, D = x_BSD.shape
        qkv = self.qkv(x_BSD).view(B, S, 3, self.num_heads, D // self.num_heads)
        q_BHSC, k_BHSC, v_BHSC = qkv.permute(2, 0, 3, 1, 4).unbind()
        y_BHSC = functional.scaled_dot_product_attention(
            apply_rotary(q_BHSC, cos_SP, sin_SP), apply_rotary(k_BHSC, cos_SP, sin_SP), v_BHSC, is_causal=True
        )
        y_BSD: Tensor = self.out(y_BHSC.transpose(1, 2).reshape(B, S, D))
        return y_BSD


class Block(nn.Module):
    """One layer: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``.

    Args:
        hidden_size: D.
        num_heads: H.
        moe: Settings of the MoE feed-forward block, or of the dense one that takes its place.
        is_moe: Whether the feed-forward block is a :class:`~lightning_moe.MoE`. If not, it is a dense SwiGLU
            of the width of ``top_k`` experts and the shared ones, so that both cost the same.
    """

    def __init__(self, hidden_size: int, num_heads: int, moe: MoEConfig, is_moe: bool) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size)
        self.attention = CausalSelfAttention(hidden_size, num_heads)
        self.feed_forward_norm = nn.RMSNorm(hidden_size)
        self.feed_forward: nn.Module
        if is_moe:
            self.feed_forward = MoE(hidden_size, moe, causal=True)
        else:
            expert_size = moe.intermediate_size or 4 * hidden_size
            width = (moe.top_k + moe.num_shared_experts + moe.residual) * expert_size
            self.feed_forward = SharedMLP(hidden_size, width, "swiglu")

    def forward(self, x_BSD: Tensor, cos_SP: Tensor, sin_SP: Tensor, tokens_BS: Tensor) -> Tensor:
        """Applies the layer, [B, S, D] -> [B, S, D]."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SP, sin_SP)
        h_BSD = self.feed_forward_norm(x_BSD)
        if isinstance(self.feed_forward, MoE):
            return x_BSD + self.feed_forward(h_BSD, token_ids=tokens_BS)
        return x_BSD + self.feed_forward(h_BSD)


class Transformer(nn.Module):
    """Tokens to logits. Embedding and head are separate weights: ZeRO 3 partitions by module.

    Args:
        vocab_size: V.
        hidden_size: D.
        num_layers: Blocks.
        num_heads: H.
        moe: Settings of the MoE layers.
        moe_every: Every ``moe_every``-th block is an MoE layer, the last of each such run; 1 is all of them.
        experts_by_layer: Number of experts of each MoE layer in turn; ``None`` is ``moe.num_experts`` for all.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        moe: MoEConfig,
        moe_every: int,
        experts_by_layer: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.head_size = hidden_size // num_heads
        self.embedding = Embedding(vocab_size, hidden_size)
        self.blocks = nn.ModuleList()
        for layer in range(1, num_layers + 1):
            is_moe = layer % moe_every == 0
            if is_moe and experts_by_layer is not None:
                moe = replace(moe, num_experts=experts_by_layer[layer // moe_every - 1])
            self.blocks.append(Block(hidden_size, num_heads, moe, is_moe))
        self.norm = nn.RMSNorm(hidden_size)
        self.head = Head(hidden_size, vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits of the token after each position, [B, S] -> [B, S, V]."""
        x_BSD = self.embedding(tokens_BS)
        cos_SP, sin_SP = rotary_tables(tokens_BS.shape[1], self.head_size, tokens_BS.device)
        for block in self.blocks:
            x_BSD = block(x_BSD, cos_SP, sin_SP, tokens_BS)
        logits_BSV: Tensor = self.head(self.norm(x_BSD))
        return logits_BSV

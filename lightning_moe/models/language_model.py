"""A byte-level language model for the command, the examples and the tests.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from lightning_moe.config import MoEConfig
from lightning_moe.dispatch.registry import check_dispatcher
from lightning_moe.models.sampling import NUM_BYTES, sample_bytes
from lightning_moe.models.transformer import Transformer
from lightning_moe.nn.accounting import active_flops_per_token
from lightning_moe.nn.router.base import check_router

DEFAULT_MOE = MoEConfig(num_experts=8)


class MoELanguageModel(L.LightningModule):
    """A decoder-only Transformer over bytes with Mixture-of-Experts feed-forward blocks.

    Pre-norm (RMSNorm), rotary positions, AdamW with linear warm-up and cosine decay over the whole run. A
    batch is int64 [B, S + 1]: the first S tokens are the input, the last S the target, and losses are in nats
    per byte. The auxiliary losses of the routers are :class:`~lightning_moe.AuxLossCallback`'s business.

    The layers are made in :meth:`configure_model`, which every Trainer calls, so that under
    :class:`~lightning_moe.ExpertParallelStrategy` a rank makes its own experts only. Without a Trainer, call
    it once.

    Args:
        moe: Settings of the MoE layers.
        vocab_size: V, at least 256.
        hidden_size: Model width.
        num_layers: Transformer blocks.
        num_heads: Attention heads; they divide ``hidden_size`` into even widths.
        moe_every: Every such block is an MoE layer, the others are dense at equal compute; 1 is all of them.
        learning_rate: At its peak, after the warm-up.
        weight_decay: Of matrices, those of the experts and routers included; norms and embeddings have none.
        warmup_steps: Optimizer steps of linear warm-up.
        min_lr_ratio: Learning rate at the end of the run, as a share of its peak.
        experts_by_layer: Number of experts of each MoE layer in turn, as in a pyramid (PR-MoE), in place of
            ``moe.num_experts``; ``None`` is the same for all.

    Raises:
        ValueError: An argument is out of its range; the message names field, value, rule and remedy.
    """

    def __init__(
        self,
        moe: MoEConfig = DEFAULT_MOE,
        vocab_size: int = NUM_BYTES,
        hidden_size: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        moe_every: int = 1,
        learning_rate: float = 4e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 20,
        min_lr_ratio: float = 0.1,
        experts_by_layer: list[int] | None = None,
    ) -> None:
        super().__init__()
        # Plain values only: torch.load refuses other classes in a checkpoint unless told to trust it.
        self.save_hyperparameters(ignore="moe")
        moe = MoEConfig(**moe) if isinstance(moe, Mapping) else moe  # as load_from_checkpoint gives it back
        self.save_hyperparameters({"moe": asdict(moe)})
        _check(vocab_size, hidden_size, num_layers, num_heads, moe_every)
        check_router(moe.router)
        check_dispatcher(moe.dispatcher)
        _check_experts(moe, num_layers // moe_every, experts_by_layer)
        _check_schedule(learning_rate, weight_decay, warmup_steps, min_lr_ratio)
        self.moe = moe
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.moe_every = moe_every
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.min_lr_ratio = min_lr_ratio
        self.experts_by_layer = experts_by_layer
        self.transformer: Transformer | None = None
        self._last_shape = (0, 0)

    @override
    def configure_model(self) -> None:
        """Makes the layers, once."""
        if self.transformer is None:
            self.transformer = Transformer(
                self.vocab_size,
                self.hidden_size,
                self.num_layers,
                self.num_heads,
                self.moe,
                self.moe_every,
                self.experts_by_layer,
            )

    @override
    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits of the byte after each position, [B, S] -> [B, S, V]. Collective over the EP group."""
        if self.transformer is None:
            raise RuntimeError("MoELanguageModel has no layers yet: call configure_model() first, as a Trainer does.")
        logits_BSV: Tensor = self.transformer(tokens_BS)
        return logits_BSV

    def token_losses(self, tokens: Tensor) -> Tensor:
        """Negative log-likelihood of every target, [B, S + 1] -> [B, S], in nats, fp32."""
        targets_BS = tokens[:, 1:]
        self._last_shape = targets_BS.shape[0], targets_BS.shape[1]
        logits_BSV = self(tokens[:, :-1]).float()
        # Flat: softmax over a dimension that is not the last takes twice the time on the CPU.
        losses = functional.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="none")
        return losses.view_as(targets_BS)

    @property
    def flops_per_batch(self) -> int:
        """Of this rank's last batch, for Lightning's ThroughputMonitor; in training with backward."""
        B, S = self._last_shape
        attention = (6 if self.training else 2) * self.num_layers * self.hidden_size * (S + 1)
        return B * S * (active_flops_per_token(self, self.training) + attention)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.token_losses(batch).mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.token_losses(batch).mean()
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch))

    @override
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.token_losses(batch).mean()
        self.log("test_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch))

    @override
    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Mean negative log-likelihood of every sequence, [B, S + 1] -> [B], in nats per byte."""
        return self.token_losses(batch).mean(dim=1)

    @override
    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """AdamW with a group that decays and one that does not; the learning rate changes every step."""
        not_decayed = {
            id(parameter)
            for module in self.modules()
            if isinstance(module, nn.RMSNorm | nn.Embedding)
            for parameter in module.parameters(recurse=False)
        }
        parameters = list(self.parameters())
        groups = [
            {
                "params": [p for p in parameters if id(p) not in not_decayed],
                "weight_decay": self.weight_decay,
            },
            {"params": [p for p in parameters if id(p) in not_decayed], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._scheduler(optimizer), "interval": "step"},
        }

    def _scheduler(self, optimizer: Optimizer) -> LambdaLR:
        estimated = self.trainer.estimated_stepping_batches
        num_steps = estimated if estimated >= 0 else math.inf  # -1 where the length of an epoch is not known
        return LambdaLR(optimizer, lambda step: lr_factor(step, num_steps, self.warmup_steps, self.min_lr_ratio))

    def generate(
        self,
        prompt: str | bytes,
        max_new_bytes: int = 200,
        temperature: float = 0.8,
        seed: int = 0,
        context_length: int = 128,
    ) -> str:
        """Continues a prompt, byte by byte.

        Every rank of an EP group has to call it with the same arguments: each forward is collective, so that
        all do the same number of them and nothing ends the text early. All ranks return the same text.

        Args:
            prompt: Text to continue; empty starts after a newline.
            max_new_bytes: Bytes to add.
            temperature: Divides the logits; 0 takes the most likely byte.
            seed: Of the sampling.
            context_length: Bytes that the model sees at once: the ``sequence_length`` of its training.

        Returns:
            Prompt and continuation; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: ``max_new_bytes`` or ``temperature`` is negative, or ``context_length`` below 1.
        """
        for name, value, least, example in (
            ("max_new_bytes", max_new_bytes, 0, 200),
            ("temperature", temperature, 0, 0.8),
            ("context_length", context_length, 1, 128),
        ):
            if not value >= least:
                raise ValueError(f"{name}={value}: must be at least {least}. Use {example}, for example.")
        text = prompt.encode() if isinstance(prompt, str) else prompt
        was_training = self.training
        self.eval()
        try:
            new = sample_bytes(self, text or b"\n", max_new_bytes, temperature, seed, context_length, self.device)
        finally:
            self.train(was_training)
        return (text + new).decode(errors="replace")


def lr_factor(step: int, num_steps: int | float, warmup_steps: int, min_lr_ratio: float) -> float:
    """Share of the peak learning rate at an optimizer step: linear warm-up, then half a cosine.

    Args:
        step: Optimizer steps done.
        num_steps: Length of the run, where the factor reaches ``min_lr_ratio``; infinite stays at the peak.
        warmup_steps: The factor is 1 from here.
        min_lr_ratio: The factor at the end.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if math.isinf(num_steps):
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _check(vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, moe_every: int) -> None:
    if vocab_size < NUM_BYTES:
        raise ValueError(
            f"vocab_size={vocab_size}: must be at least {NUM_BYTES}, the values of a byte. Use {NUM_BYTES}."
        )
    for name, value, example in (
        ("hidden_size", hidden_size, 64),
        ("num_layers", num_layers, 2),
        ("num_heads", num_heads, 4),
    ):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1. Use {example}, for example.")
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"num_heads={num_heads}: must divide hidden_size={hidden_size} into even widths, for rotary "
            f"positions. Use a hidden_size that is a multiple of {2 * num_heads}, or fewer heads."
        )
    if not 1 <= moe_every <= num_layers:
        raise ValueError(
            f"moe_every={moe_every}: must be from 1 to num_layers={num_layers}, or no layer would be an MoE. "
            "Use 1 for MoE in every layer."
        )


def _check_experts(moe: MoEConfig, num_moe_layers: int, experts_by_layer: list[int] | None) -> None:
    if experts_by_layer is None:
        return
    if len(experts_by_layer) != num_moe_layers:
        raise ValueError(
            f"experts_by_layer={experts_by_layer}: must have one number for each of the {num_moe_layers} MoE layers. "
            "Give as many, or leave it out for moe.num_experts in every layer."
        )
    for layer, num_experts in enumerate(experts_by_layer):
        try:
            replace(moe, num_experts=num_experts)
        except ValueError as error:
            raise ValueError(f"experts_by_layer={experts_by_layer}, MoE layer {layer}: {error}") from error


def _check_schedule(learning_rate: float, weight_decay: float, warmup_steps: int, min_lr_ratio: float) -> None:
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate={learning_rate}: must be a finite number above 0. Use 4e-3, for example.")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"weight_decay={weight_decay}: must be a finite number of at least 0. Use 0 for none.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps}: must be 0 or more. Use 0 to start at the peak.")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio={min_lr_ratio}: must be from 0 to 1. Use 1 for no decay.")

"""An ordinary LightningModule, trained with its experts spread over two CPU ranks.

python examples/plain_trainer.py
"""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_moe import AuxLossCallback, ExpertLoadMonitor, ExpertParallelStrategy, MoE, MoEConfig


class Classifier(L.LightningModule):
    """Tells which of eight noisy rotations was applied to a point cloud's features."""

    def __init__(self, width: int = 32, num_classes: int = 8) -> None:
        super().__init__()
        self.inp = nn.Linear(16, width)
        self.moe = MoE(width, MoEConfig(num_experts=8, top_k=2, intermediate_size=64))  # was: a feed-forward block
        self.out = nn.Linear(width, num_classes)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.inp(x)
        loss = nn.functional.cross_entropy(self.out(x + self.moe(x)), y)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(max_steps: int = 200) -> None:
    L.seed_everything(0)
    labels = torch.randint(8, (8192,))
    rotations = torch.randn(8, 16, 16)
    features = torch.einsum("nij,j->ni", rotations[labels], torch.ones(16)) + 6 * torch.randn(8192, 16)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ExpertParallelStrategy(expert_parallel_size=2, stage=1),
        callbacks=[AuxLossCallback(load_balancing=0.01), ExpertLoadMonitor()],
        max_steps=max_steps,
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), DataLoader(TensorDataset(features, labels), batch_size=64, shuffle=True))
    if trainer.is_global_zero:
        print(f"loss after training: {trainer.callback_metrics['train_loss']:.3f}")


if __name__ == "__main__":
    main()

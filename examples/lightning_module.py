"""SCOATNet in a LightningModule: train it in your own loop, with your own data.

    pip install lightning
    python examples/lightning_module.py

Slices are windowed to 0..1, masks 0 or 1, both [N, 1, H, W]. The loss is the paper's equation 7.
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import scoat_fast
from scoat_fast.train.losses import hybrid_loss


class Opacity(lightning.LightningModule):
    """Width 32 and 512x512 are the paper's; start from weights with ``net=SCOATNet.from_pretrained(...)``."""

    def __init__(self, net: scoat_fast.SCOATNet | None = None, lr: float = 1e-3):
        super().__init__()
        self.net = scoat_fast.SCOATNet(width=32) if net is None else net
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        slices, masks = batch
        loss = hybrid_loss(self.net(slices), masks)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main() -> list[float]:
    """A few steps on squares that are brighter than what is around them; the losses."""
    torch.manual_seed(0)
    slices = torch.rand(16, 1, 64, 64) / 2
    masks = torch.zeros_like(slices)
    masks[:, :, 16:40, 20:48] = 1
    losses: list[float] = []

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
            losses.append(float(outputs["loss"]))

    trainer = lightning.Trainer(
        max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, callbacks=[Losses()],
    )  # fmt: skip
    trainer.fit(Opacity(scoat_fast.SCOATNet(width=4)), DataLoader(TensorDataset(slices + masks / 2, masks), 4))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()

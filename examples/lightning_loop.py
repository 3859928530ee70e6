"""diffkern inside Lightning's Trainer: model object, averages and data of ours, everything else theirs.

python examples/lightning_loop.py --iterations 200
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import diffkern
from diffkern.data import open_images
from diffkern.nn import UNet, preset
from diffkern.train import Averages


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.diffusion = diffkern.Diffusion(UNet(preset("digits")), diffkern.cosine(), "eps", drop=0.1)
        self.averages = Averages(self.diffusion)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x0, labels = batch
        loss = self.diffusion.loss(x0, cond=labels)  # fresh seeds from torch's generator, which Lightning seeds
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.averages.update(self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    images = open_images("digits")
    data = TensorDataset(*images.batch(torch.arange(len(images))))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=options.iterations, gradient_clip_val=1.0, **quiet)
    trainer.fit(Digits(), DataLoader(data, batch_size=options.batch, shuffle=True))
    print(f"step {trainer.global_step}: loss {trainer.callback_metrics['loss'].item():.4f}")


if __name__ == "__main__":
    main()

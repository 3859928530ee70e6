"""A training run as small as can be: twenty images of three classes, a network of a few thousand weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffkern.train import TrainConfig

TINY = TrainConfig(
    network="digits",
    network_options={"channels": 8, "heads": 1, "blocks": 1, "multipliers": [1], "attention_levels": [], "groups": 4},
    schedule="cosine",
    iterations=5,
    batch=8,
    learning_rate=1e-2,
    warmup=2,
    log_every=5,
    save_every=100,
    sample_n=4,
    sample_steps=2,
    tensorboard=False,
)


def tiny_data() -> tuple[Tensor, Tensor]:
    """Bars at three places, uint8 [20, 1, 8, 8], with their places as labels."""
    labels = torch.arange(20) % 3
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        images[i, :, :, 2 * label : 2 * label + 2] = 200 + i
    return images, labels


class TinyNetwork(nn.Module):
    """A convolution whose output can be spoilt by ``factor``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.factor = 1.0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.conv(x) * self.factor
        return out

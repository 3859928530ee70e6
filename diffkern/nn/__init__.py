"""Networks: the small UNet of the demo and the blocks that it is made of."""

from __future__ import annotations

from diffkern.nn.unet import (
    ResBlock,
    SelfAttention,
    UNet,
    UNetConfig,
    group_norm,
    sinusoidal_embedding,
)

__all__ = [
    "ResBlock",
    "SelfAttention",
    "UNet",
    "UNetConfig",
    "group_norm",
    "sinusoidal_embedding",
]

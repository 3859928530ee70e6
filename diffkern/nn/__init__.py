"""Networks: attention blocks for UNets, the small UNet of the demo and the blocks that it is made of."""

from __future__ import annotations

from diffkern.nn.attention import SpatialCrossAttention, SpatialSelfAttention
from diffkern.nn.unet import (
    ResBlock,
    UNet,
    UNetConfig,
    group_norm,
    sinusoidal_embedding,
)

__all__ = [
    "ResBlock",
    "SpatialCrossAttention",
    "SpatialSelfAttention",
    "UNet",
    "UNetConfig",
    "group_norm",
    "sinusoidal_embedding",
]

"""Networks: attention blocks for UNets, the small UNet of the demo and the blocks that it is made of."""

from __future__ import annotations

from torch import nn

from diffkern.nn.attention import SpatialCrossAttention, SpatialSelfAttention
from diffkern.nn.unet import (
    ResBlock,
    UNet,
    UNetConfig,
    group_norm,
    sinusoidal_embedding,
)

NETWORKS: dict[str, tuple[type[nn.Module], type]] = {"UNet": (UNet, UNetConfig)}
"""Networks that are built from plain data, by name: the class and that of its configuration."""

__all__ = [
    "NETWORKS",
    "ResBlock",
    "SpatialCrossAttention",
    "SpatialSelfAttention",
    "UNet",
    "UNetConfig",
    "group_norm",
    "sinusoidal_embedding",
]

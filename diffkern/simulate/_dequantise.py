"""Integers as continuous data, and the unit of their likelihoods."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkern import ops, streams
from diffkern.integers import integer
from diffkern.ops import Seeds


def dequantise(
    images: Tensor, *, seeds: Seeds | None = None, levels: int = 256, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Integers 0..levels-1 with uniform noise, scaled to [-1, 1]: 2 (images + u)/levels - 1, u in (0, 1), [B, ...].

    E[-ln p(images + u)] bounds -ln P(images) from above (arXiv 1511.01844). u by address: Phi of the normal of the
    element on stream DEQUANTISATION; of torch's generator without `seeds`. `nats_to_bits_per_dim` has the offset
    that belongs to it.
    """
    if images.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64) or images.ndim == 0:
        raise ValueError(f"images must be integers [B, ...], got {images.dtype} of shape {list(images.shape)}")
    levels = integer("levels", levels, 2)
    if images.device.type == "cpu" and images.numel() and not 0 <= int(images.min()) <= int(images.max()) < levels:
        raise ValueError(f"images must lie in 0..{levels - 1}, got {int(images.min())}..{int(images.max())}")
    if seeds is None:
        u = torch.rand(images.shape, dtype=torch.float64, device=images.device)
    else:
        z = ops.randn(images.shape, ops.as_seeds(seeds, len(images), images.device), streams.DEQUANTISATION).to(
            torch.float64
        )
        u = 0.5 * torch.erfc(-z / math.sqrt(2.0))
    return (2.0 * (images + u) / levels - 1.0).to(dtype)


def nats_to_bits_per_dim(nats: Tensor, dims: int, *, levels: int = 256, low: float = -1.0, high: float = 1.0) -> Tensor:
    """-nats/(dims ln 2) + log2(levels/(high - low)): bits a dimension of integers 0..levels-1 scaled to [low, high].

    `dims` is the number of elements a sample. The offset is ln of the bins' width: 7 bits for 256 levels on [-1, 1], 8
    on [0, 1]. Without it the number would be that of the scaled, continuous data.
    """
    levels = integer("levels", levels, 2)
    dims = integer("dims", dims)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low and high must be finite, low < high, got {low} and {high}")
    return -nats / (dims * math.log(2.0)) + math.log2(levels / (high - low))

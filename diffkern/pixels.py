"""Bytes and images: v in 0..255 is x = v/127.5 - 1 in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["from_bytes", "to_bytes"]


def from_bytes(pixels: Tensor) -> Tensor:
    """x = v/127.5 - 1, float32 of the shape of the bytes."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def to_bytes(images: Tensor) -> Tensor:
    """v = round(127.5 (1 + x)), uint8 of the shape of the images: the inverse of `from_bytes`. What lies outside of
    [-1, 1] is clamped."""
    return ((1.0 + images.detach().float().clamp(-1.0, 1.0)) * 127.5).round().to(torch.uint8)

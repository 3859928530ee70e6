"""Losses of samples, brought to what a caller asks for."""

from __future__ import annotations

from torch import Tensor

from diffkern.checks import unknown
from diffkern.names import Reduction

__all__ = ["reduced"]


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """The values [B] as they are ("none"), their "mean" or their "sum"; ValueError for another word."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(unknown("reduction", reduction, ("none", "mean", "sum")))
    return values if reduction == "none" else values.mean() if reduction == "mean" else values.sum()

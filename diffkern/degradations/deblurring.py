"""Deblurring: what a Gaussian leaves of an image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diffkern.degradations.base import Degradation, check_images
from diffkern.ops import Seeds

__all__ = ["Deblurring"]


@dataclasses.dataclass(frozen=True)
class Deblurring(Degradation):
    """y [B, C, H, W]: the image convolved with a Gaussian of ``sigma`` pixels, cut at 4 sigma, its border repeated.

    It has no `project`: the smallest gains of a Gaussian are too small to be divided by.
    """

    sigma: float = 2.0

    projects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.sigma <= 100.0:
            raise ValueError(f"Deblurring.sigma must lie in (0, 100], got {self.sigma}")

    def channels(self, channels: int) -> int:
        return channels

    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        channels, height, width = shape
        return channels, height, width

    def sample_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        return self.size(shape)

    def degrade(self, x0: Tensor, seeds: Seeds = 0) -> Tensor:
        x = check_images("x0", x0).to(torch.promote_types(x0.dtype, torch.float32))
        radius = math.floor(4.0 * self.sigma + 0.5)
        taps = [math.exp(-0.5 * (k / self.sigma) ** 2) for k in range(-radius, radius + 1)]
        for dim, pad in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
            padded, size = F.pad(x, pad, mode="replicate"), x.shape[dim]
            # tap by tap: a convolution's sums would depend on the batch
            total = torch.zeros_like(x)
            for k, tap in enumerate(taps):
                total = total + (tap / sum(taps)) * padded.narrow(dim, k, size)
            x = total
        return x.to(x0.dtype)

    def degrade_alike(self, sample: Tensor, image: Tensor) -> Tensor:
        return self.degrade(sample)

    def shown(self, image: Tensor) -> Tensor:
        return image

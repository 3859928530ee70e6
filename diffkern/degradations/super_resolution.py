"""Super-resolution: what a smaller image leaves out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diffkern.degradations._nearest import nearest_with_mean
from diffkern.degradations.base import Degradation, check_images
from diffkern.modes import kept
from diffkern.ops import Seeds

__all__ = ["SuperResolution"]

ROUNDS = 60
"""Of the ascent that finds the projection for bicubic within a range."""


@dataclasses.dataclass(frozen=True)
class SuperResolution(Degradation):
    """y [B, C, H/factor, W/factor]: the mean of each square ("area"), or "bicubic" with antialiasing as in Pillow.

    Saharia et al. 2021, arXiv 2104.07636; Ho et al. 2021, arXiv 2106.15282; lecture 000. `project`: with "area" the
    nearest image whose squares have these means (without a clip: the residual, enlarged, is added); with "bicubic" the
    residual by the pseudo-inverse of the reduction, and with a clip the nearest image but for what 60 rounds leave.
    """

    factor: int = 4
    filter: Literal["area", "bicubic"] = "area"

    resizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.factor <= 64:
            raise ValueError(f"SuperResolution.factor must be an integer in 2..64, got {self.factor}")

    def channels(self, channels: int) -> int:
        return channels

    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        channels, height, width = shape
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images must have a height and a width divisible by factor = {self.factor}, got {list(shape)}"
            )
        if self.filter == "bicubic" and min(height, width) < 2 * self.factor:  # torch's reduction to one is another
            raise ValueError(f"images must have sides of at least 2 factor = {2 * self.factor}, got {list(shape)}")
        return channels, height // self.factor, width // self.factor

    def sample_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        channels, height, width = shape
        return channels, height * self.factor, width * self.factor

    def degrade(self, x0: Tensor, seeds: Seeds = 0) -> Tensor:
        self.size(check_images("x0", x0).shape[1:])
        if self.filter == "area":
            return F.avg_pool2d(x0, self.factor)
        height, width = x0.shape[2:]
        wide = x0.to(torch.promote_types(x0.dtype, torch.float32))  # torch has no bfloat16 here on a CPU
        size = height // self.factor, width // self.factor
        return F.interpolate(wide, size, mode="bicubic", antialias=True).to(x0.dtype)

    def degrade_alike(self, sample: Tensor, image: Tensor) -> Tensor:
        return self.degrade(sample)

    def shown(self, image: Tensor) -> Tensor:
        return image.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)

    def project(self, sample: Tensor, image: Tensor, clip: float | None = 1.0) -> Tensor:
        sample = check_images("sample", sample)
        if self.size(sample.shape[1:]) != tuple(image.shape[1:]):
            raise ValueError(
                f"image must have the shape {list(self.size(sample.shape[1:]))} of the sample's input, got "
                f"{list(image.shape[1:])}"
            )
        wide = torch.promote_types(sample.dtype, torch.float32)
        x, y, f = sample.to(wide), image.to(wide), self.factor
        if self.filter == "bicubic":
            return self._by_inverse(x, y, clip).to(sample.dtype)
        batch, channels, height, width = y.shape
        squares = x.reshape(batch, channels, height, f, width, f).permute(0, 1, 2, 4, 3, 5).flatten(4)
        weights = torch.full((f * f,), 1.0 / (f * f), dtype=wide, device=x.device)
        found = nearest_with_mean(squares, weights, y, clip)
        found = found.unflatten(4, (f, f)).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)
        return found.to(sample.dtype)

    def _by_inverse(self, x: Tensor, y: Tensor, clip: float | None) -> Tensor:
        """x + A^+ (y - A x) where A reduces rows and columns; with a clip clamp(x + A^+ m), A of which is y.

        m is found by accelerated ascent of the dual problem (Nesterov), whose gradient is y - A clamp(x + A^+ m); its
        largest curvature is 1 in the metric of A A^T.
        """
        back_h, back_w = (_inverse(n, self.factor).to(x) for n in x.shape[2:])

        def moved(m: Tensor) -> Tensor:
            return x + back_h @ m @ back_w.T

        if clip is None:
            return moved(y - self.degrade(x))
        m = ahead = torch.zeros_like(y)
        weight = 1.0
        for _ in range(ROUNDS):
            before, m = m, ahead + (y - self.degrade(moved(ahead).clamp(-clip, clip)))
            last, weight = weight, 0.5 + math.sqrt(0.25 + weight * weight)
            ahead = m + (last - 1.0) / weight * (m - before)
        return moved(m).clamp(-clip, clip)


@kept(16)
def _inverse(size: int, factor: int) -> Tensor:
    """The pseudo-inverse [n, n/factor] of the bicubic reduction of n pixels in a row, float64."""
    rows = torch.eye(size, dtype=torch.float64).reshape(size, 1, size, 1).repeat(1, 1, 1, 2)  # row j is 1 in image j
    reduced = F.interpolate(rows, (size // factor, 2), mode="bicubic", antialias=True)
    return torch.linalg.pinv(reduced[:, 0, :, 0].T)

"""Colourisation: the luma of a colour image is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from diffkern.degradations._nearest import nearest_with_mean
from diffkern.degradations.base import Degradation, check_images
from diffkern.ops import Seeds

__all__ = ["Colourisation"]

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601), as Pillow's grey has them."""


@dataclasses.dataclass(frozen=True)
class Colourisation(Degradation):
    """y [B, 1, H, W] = 0.299 R + 0.587 G + 0.114 B of images of three channels.

    `project`: the nearest colours in range that have this luma.
    """

    def channels(self, channels: int) -> int:
        if channels != 3:
            raise ValueError(f"images must have 3 channels to be given their colours, got {channels}")
        return 1

    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        channels, height, width = shape
        return self.channels(channels), height, width

    def sample_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        _, height, width = shape
        return 3, height, width

    def degrade(self, x0: Tensor, seeds: Seeds = 0) -> Tensor:
        red, green, blue = check_images("x0", x0, 3).unbind(1)
        return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)

    def degrade_alike(self, sample: Tensor, image: Tensor) -> Tensor:
        return self.degrade(sample)

    def shown(self, image: Tensor) -> Tensor:
        return image.repeat(1, 3, 1, 1)

    def project(self, sample: Tensor, image: Tensor, clip: float | None = 1.0) -> Tensor:
        sample = check_images("sample", sample, 3)
        if (1, *sample.shape[2:]) != tuple(image.shape[1:]):
            rule = [1, *sample.shape[2:]]
            raise ValueError(f"image must have the shape {rule} of the sample's input, got {list(image.shape[1:])}")
        wide = torch.promote_types(sample.dtype, torch.float32)
        weights = torch.tensor(LUMA, dtype=wide, device=sample.device)
        found = nearest_with_mean(sample.to(wide).movedim(1, -1), weights, image[:, 0].to(wide), clip)
        return found.movedim(-1, 1).to(sample.dtype)

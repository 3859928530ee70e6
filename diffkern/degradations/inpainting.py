"""Inpainting: a part of the image is hidden, and the network sees which."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from diffkern import ops, streams
from diffkern.degradations.base import CHOICE, Degradation, check_images
from diffkern.ops import Seeds, as_seeds

__all__ = ["Inpainting"]

POINTS = 4
"""Of a stroke of the brush."""


@dataclasses.dataclass(frozen=True)
class Inpainting(Degradation):
    """y [B, 1 + C, H, W]: the mask, 1 where the image is hidden, then the image with 0 there.

    ``share`` of the image is hidden: in a "box" at a random place, whose height takes a share^a of the image's and its
    width share^(1 - a), a in [0.3, 0.7]; by a "brush", the pixels nearest to a random line of four points; at a "side"
    (0.5 is a half), one of four; or as single "pixels". The order is that of the nine channels of published latent
    inpainting networks: x_t, mask, masked image. `project` puts the known pixels back.
    """

    has_mask = True

    mask: Literal["box", "brush", "side", "pixels"] = "box"
    share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"Inpainting.share must lie in (0, 1), got {self.share}")

    def channels(self, channels: int) -> int:
        return channels + 1

    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        channels, height, width = shape
        return channels + 1, height, width

    def sample_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        channels, height, width = shape
        return channels - 1, height, width

    def masks(self, shape: Sequence[int], seeds: Seeds, device: torch.device | str = "cpu") -> Tensor:
        """Which pixels of images [B, C, H, W] are hidden, bool [B, H, W], a function of each one's seed."""
        batch, _, height, width = shape
        seeds = as_seeds(seeds, batch, device)
        if self.mask in ("box", "side"):
            return self._box(seeds, height, width) if self.mask == "box" else self._side(seeds, height, width)
        if self.mask == "brush":
            score = self._distance(seeds, height, width)
        else:
            score = ops.randn([batch, height * width], seeds, streams.DEGRADATION + CHOICE, dtype=torch.float64)
        order = score.argsort(dim=1, stable=True)[:, : max(1, round(self.share * height * width))]
        hidden = torch.zeros(batch, height * width, dtype=torch.bool, device=seeds.device)
        return hidden.scatter_(1, order, True).reshape(batch, height, width)

    def degrade(self, x0: Tensor, seeds: Seeds) -> Tensor:
        return self.masked(x0, self.masks(check_images("x0", x0).shape, seeds, x0.device))

    def masked(self, x0: Tensor, mask: Tensor) -> Tensor:
        """The input of images by a mask of one's own, [B, H, W] or [B, 1, H, W]: hidden where it is not 0."""
        hidden = (mask.unsqueeze(1) if mask.dim() == 3 else mask) != 0
        if hidden.shape != (x0.shape[0], 1, *x0.shape[2:]):
            rule = [x0.shape[0], *x0.shape[2:]]
            raise ValueError(f"mask must have the shape {rule} of the images, got {list(mask.shape)}")
        return torch.cat([hidden.to(x0.dtype), x0.masked_fill(hidden, 0.0)], 1)

    def degrade_alike(self, sample: Tensor, image: Tensor) -> Tensor:
        return self.masked(sample, image[:, :1])

    def shown(self, image: Tensor) -> Tensor:
        return image[:, 1:]

    def nothing(self, image: Tensor) -> Tensor:
        """All is hidden."""
        return torch.cat([torch.ones_like(image[:, :1]), torch.zeros_like(image[:, 1:])], 1)

    def noised(self, image: Tensor, levels: Tensor, seeds: Tensor) -> Tensor:
        """Of the image alone: the mask stays what it is."""
        return torch.cat([image[:, :1], super().noised(image[:, 1:], levels, seeds)], 1)

    def project(self, sample: Tensor, image: Tensor, clip: float | None = 1.0) -> Tensor:
        sample = check_images("sample", sample)
        if (sample.shape[1] + 1, *sample.shape[2:]) != tuple(image.shape[1:]):
            rule = [sample.shape[1] + 1, *sample.shape[2:]]
            raise ValueError(f"image must have the shape {rule} of the sample's input, got {list(image.shape[1:])}")
        free = sample if clip is None else sample.clamp(-clip, clip)
        return torch.where(image[:, :1] != 0, free, image[:, 1:].to(sample.dtype))

    def _box(self, seeds: Tensor, height: int, width: int) -> Tensor:
        aspect, top, left = (self.uniform(seeds, len(seeds), k, seeds.device) for k in range(3))
        power = 0.3 + 0.4 * aspect
        tall = (height * self.share**power).round().clamp(1, height)
        wide = (width * self.share ** (1.0 - power)).round().clamp(1, width)
        rows = _between(height, (top * (height - tall + 1.0)).floor(), tall)
        return rows[:, :, None] & _between(width, (left * (width - wide + 1.0)).floor(), wide)[:, None, :]

    def _side(self, seeds: Tensor, height: int, width: int) -> Tensor:
        side = (4.0 * self.uniform(seeds, len(seeds), 0, seeds.device)).floor()[:, None, None]
        rows, columns = (torch.arange(n, device=seeds.device) for n in (height, width))
        tall, wide = (max(1, round(self.share * n)) for n in (height, width))
        found = torch.zeros(len(seeds), height, width, dtype=torch.bool, device=seeds.device)
        for number, at in enumerate((rows < tall, rows >= height - tall)):
            found |= (side == number) & at[None, :, None]
        for number, at in enumerate((columns < wide, columns >= width - wide), start=2):
            found |= (side == number) & at[None, None, :]
        return found

    def _distance(self, seeds: Tensor, height: int, width: int) -> Tensor:
        """Of every pixel from the stroke, squared, [B, H W] float64."""
        device = seeds.device
        u = torch.stack([self.uniform(seeds, len(seeds), k, device) for k in range(2 * POINTS)], 1)
        points = u.reshape(len(seeds), POINTS, 2) * torch.tensor([height, width], dtype=torch.float64, device=device)
        rows, columns = (torch.arange(n, dtype=torch.float64, device=device) + 0.5 for n in (height, width))
        pixels = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(1, -1, 2)
        nearest = torch.full((len(seeds), height * width), torch.inf, dtype=torch.float64, device=device)
        for k in range(POINTS - 1):
            begin, along = points[:, k, None], (points[:, k + 1] - points[:, k])[:, None]
            place = ((pixels - begin) * along).sum(-1) / along.square().sum(-1)
            gap = pixels - begin - place.clamp(0.0, 1.0)[..., None] * along
            nearest = torch.minimum(nearest, gap.square().sum(-1))
        return nearest


def _between(size: int, first: Tensor, count: Tensor) -> Tensor:
    """bool [B, size]: first <= i < first + count."""
    at = torch.arange(size, device=first.device)[None]
    return (at >= first[:, None]) & (at < (first + count)[:, None])

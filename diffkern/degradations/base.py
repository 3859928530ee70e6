"""What every degradation has: the input of an image, its shape, its noise, and the way back to consistency."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffkern import ops, streams
from diffkern.checks import need_tensor
from diffkern.draws import uniform_by_address
from diffkern.ops import Seeds, as_seeds
from diffkern.records import check_fields

__all__ = ["Degradation", "check_images"]

LEVEL, NOISE, DROPPED, CHOICE = 0, 1, 2, 16
"""Counters of ``streams.DEGRADATION``: the level of the augmentation, its noise, whether the input is left out, and the
first that a degradation may use for choices of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Degradation(ABC):
    """A function of an image that loses something, as data.

    ``augmentation``: the largest level of the noise that training adds to the input (Ho et al. 2021, arXiv 2106.15282,
    "conditioning augmentation", not truncated). The level s is uniform in [0, augmentation], and the network is given
    sqrt(1 - s^2) y + s eps with s beside it, a second time. Of a model in a cascade it makes the errors of the model
    before it harmless. ``drop``: the probability that a training sample loses its input, for guidance over it.
    """

    augmentation: float = 0.0
    drop: float = 0.0

    projects: ClassVar[bool] = True
    """Whether there is a `project`."""
    resizes: ClassVar[bool] = False
    """Whether the input has another height and width than the image."""
    has_mask: ClassVar[bool] = False
    """Whether the input's first channel is a mask, 1 where the image is hidden."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_fields(self, f"{name}.")
        for field, value in (("augmentation", self.augmentation), ("drop", self.drop)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name}.{field} must lie in [0, 1), got {value}")

    # ------------------------------------------------------------------------------------------------ what is given

    @abstractmethod
    def degrade(self, x0: Tensor, seeds: Seeds) -> Tensor:
        """The input y [B, C', h, w] of images x0 [B, C, H, W], in their dtype; random choices by each image's seed
        (int64 [B], or an integer as everywhere), so that it is the same in any batch."""

    @abstractmethod
    def degrade_alike(self, sample: Tensor, image: Tensor) -> Tensor:
        """What is left of a sample by the same choices that made the input ``image``: consistent means equal to it."""

    @abstractmethod
    def channels(self, channels: int) -> int:
        """C' of images with so many channels: what is concatenated."""

    @abstractmethod
    def size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(C', h, w) of images (C, H, W); ValueError for images that it cannot be of."""

    @abstractmethod
    def sample_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(C, H, W) of the images whose inputs have the shape (C', h, w): the inverse of `size`."""

    @abstractmethod
    def shown(self, image: Tensor) -> Tensor:
        """The input as images of the sample's shape, to look at and to be better than: enlarged, grey as colour."""

    def encoded(self, shape: Sequence[int], latents: Sequence[int] | None) -> bool:
        """Whether a network of latents (c, h, w), of images (C, H, W), sees the latents of the input: all but an image
        that is no larger than they are, which it sees itself. False without latents."""
        if latents is None:
            return False
        _, height, width = self.size(shape)
        return not (self.resizes and height <= latents[1] and width <= latents[2])

    def concatenated(self, shape: Sequence[int], latents: Sequence[int] | None = None) -> int:
        """How many channels the network of images (C, H, W), or of their latents (c, h, w), is given beside its input:
        those of the input, or where it is `encoded` the latents' with one more for a mask."""
        if latents is None or not self.encoded(shape, latents):
            return self.channels(shape[0])
        return latents[0] + int(self.has_mask)

    def project(self, sample: Tensor, image: Tensor, clip: float | None = 1.0) -> Tensor:
        """The image nearest to the sample that is consistent with its input, within [-clip, clip] (None: anywhere).

        ValueError where there is no closed form (`projects`).
        """
        raise ValueError(f"{type(self).__name__} must have a projection in closed form, and has none")

    def nothing(self, image: Tensor) -> Tensor:
        """An input that says nothing, in the shape of one: what a network sees where it is left out."""
        return torch.zeros_like(image)

    # ------------------------------------------------------------------------------------------------- its noise

    def levels(self, seeds: Tensor) -> Tensor:
        """The level of each training sample's noise, float64 [B], uniform in [0, augmentation]."""
        return self.augmentation * uniform_by_address(seeds, streams.DEGRADATION + LEVEL)

    def noised(self, image: Tensor, levels: Tensor, seeds: Tensor) -> Tensor:
        """sqrt(1 - s^2) y + s eps, in the dtype of y: variance preserving, eps by address; where s is 0, y."""
        s = levels.reshape(-1, *(1,) * (image.dim() - 1)).to(torch.promote_types(image.dtype, torch.float32))
        eps = ops.randn(tuple(image.shape), seeds, streams.DEGRADATION + NOISE, dtype=s.dtype)
        return ((1.0 - s * s).sqrt() * image + s * eps).to(image.dtype)

    def left_out(self, seeds: Tensor) -> Tensor:
        """Which training samples lose their input, bool [B]."""
        return uniform_by_address(seeds, streams.DEGRADATION + DROPPED) < self.drop

    # ------------------------------------------------------------------------------------------------- for its kinds

    def uniform(self, seeds: Seeds, batch: int, counter: int, device: torch.device) -> Tensor:
        """u in (0, 1), float64 [B]: the k-th choice of an image."""
        return uniform_by_address(as_seeds(seeds, batch, device), streams.DEGRADATION + CHOICE + counter)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `degradations.from_dict` is the inverse."""
        return {"kind": type(self).__name__, **dataclasses.asdict(self)}


def check_images(name: str, value: object, channels: int | None = None) -> Tensor:
    """``value``, which must be floating-point [B, C, H, W], of so many channels where they are given."""
    need_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dim() != 4 or not value.is_floating_point() or channels not in (None, value.shape[1]):
        rule = "[B, C, H, W]" if channels is None else f"[B, {channels}, H, W]"
        raise ValueError(f"{name} must be floating point {rule}, got {value.dtype} {list(value.shape)}")
    return value

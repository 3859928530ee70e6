"""What a network sees in images: the features that every measure of `diffkern.metrics` is made of.

An extractor is any callable with a ``name`` (of the network and its weights: two sets of features compare where it is
the same), ``dims``, a ``device`` and `Features` as its result. `extractor` opens published networks,
`classifier.train_classifier` makes one of the data themselves.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffkern import checks
from diffkern.pixels import to_bytes

__all__ = ["Extractor", "Features", "quantised"]


class Features(NamedTuple):
    """What a network says of a batch of B images."""

    pooled: Tensor
    """[B, D], of its last layer before the classes: for FID, KID, precision and recall."""
    spatial: Tensor | None = None
    """[B, K], of a map in its middle, where things are and not what they are: for sFID."""
    logits: Tensor | None = None
    """[B, L], of its classes: for inception score and agreement."""


@runtime_checkable
class Extractor(Protocol):
    """A network that gives `Features`."""

    name: str
    """Of the network and its weights."""
    dims: int
    """D of the pooled features."""
    device: torch.device
    """Where the images should be; others are moved there."""

    def __call__(self, images: Tensor, /) -> Features:
        """Of images [B, C, H, W], floats in [-1, 1] (beyond: clipped), as their PNG would hold them: `quantised`."""
        ...


def quantised(images: Tensor, name: str = "images") -> Tensor:
    """uint8 [B, C, H, W] of floats in [-1, 1]: `pixels.to_bytes`.

    Scores are those of files: an image and its PNG have the same. ValueError for what is no batch of images, has
    another dtype, or is not finite.
    """
    checks.need_tensor(name, images)
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"{name} must be floats [B, C, H, W] in [-1, 1], got {str(images.dtype).removeprefix('torch.')} of "
            f"{checks.got(images)}" + (f": {name} / 127.5 - 1 makes them" if images.dtype == torch.uint8 else "")
        )
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in {name}[{bad}]")
    return to_bytes(images)

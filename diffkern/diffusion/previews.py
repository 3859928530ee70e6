"""Latents as small pictures without the decoder: a linear map to colours, fitted on images.

preview = fit_preview(autoencoder, images)     # diffusion.fit_preview(images) keeps it with the model
pictures = preview(latents)                    # [B, C_image, h, w] in [-1, 1], of the latents' size
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern import storage
from diffkern.checks import need_tensor
from diffkern.records import parse, record

__all__ = ["Preview", "fit_preview"]

MOST, AT_ONCE = 64, 16
"""Images that a map is fitted on where there are more, and how many are encoded together."""


@dataclasses.dataclass(frozen=True)
class Preview:
    """x = W z + b at every place: W [C_image, C_latent] and b [C_image], as plain numbers that JSON holds."""

    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes = {len(row) for row in self.weights}
        if len(self.weights) != len(self.bias) or len(sizes) != 1:
            raise ValueError(
                "preview must have a row of weights and a bias for each channel of the images, and rows of one length, "
                f"got rows of {sorted(sizes)} and {len(self.bias)} for {len(self.weights)}"
            )
        if not all(math.isfinite(value) for row in (*self.weights, self.bias) for value in row):
            raise ValueError("preview must have finite weights, got others")

    def __call__(self, latents: Tensor) -> Tensor:
        """float32 [B, C_image, h, w] in [-1, 1], of latents [B, C_latent, h, w] on any device."""
        need_tensor("latents", latents)
        if latents.ndim != 4 or latents.shape[1] != len(self.weights[0]):
            raise ValueError(f"latents must be [B, {len(self.weights[0])}, h, w], got {list(latents.shape)}")
        weights, bias = (torch.tensor(part, device=latents.device) for part in (self.weights, self.bias))
        found = torch.einsum("oc,bchw->bohw", weights, latents.detach().float()) + bias[:, None, None]
        return found.clamp(-1.0, 1.0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, written whole or not at all."""
        storage.write(path, json.dumps(dataclasses.asdict(self)) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Preview:
        """What `save` wrote; ValueError in one sentence for anything else."""
        return record(Preview, parse(Path(path).read_bytes(), "JSON", str(path)), f"{path}: ")


@torch.no_grad()
def fit_preview(autoencoder: nn.Module, images: Any) -> Preview:
    """The linear map from an autoencoder's latents to colours that is nearest to the ``images``, by least squares.

    Minimises the sum of |W z + b - x|^2 over images and places: z the latents of an image (the mode of a posterior), x
    the mean of the image over the pixels of each place. ``images``: a tensor [N, C, H, W] in [-1, 1], or what has
    them by index (`diffkern.data.Images`), of which 64 at even distances count. In float64; where the latents of the
    data do not determine W, the smallest one. ValueError for images that the autoencoder does not take, for none,
    and for latents that are not finite.
    """
    count = len(images)
    if not count:
        raise ValueError("images must be at least one, got none")
    chosen = torch.arange(min(count, MOST)) * count // min(count, MOST)
    parameter: Tensor = next(autoencoder.parameters())
    rows: list[Tensor] = []
    colours: list[Tensor] = []
    encoder: Any = autoencoder
    for part in chosen.split(AT_ONCE):
        x = images[part] if isinstance(images, Tensor) else images.batch(part)[0]
        x = x.to(parameter.device, parameter.dtype)
        z = encoder.latents(x)
        small = F.adaptive_avg_pool2d(x, z.shape[2:])
        rows.append(z.double().movedim(1, -1).flatten(0, 2).cpu())
        colours.append(small.double().movedim(1, -1).flatten(0, 2).cpu())
    known = torch.cat(rows)
    if not bool(known.isfinite().all() & torch.cat(colours).isfinite().all()):
        raise ValueError("images must be finite, and their latents too, got others")
    given = torch.cat([known, torch.ones(len(known), 1, dtype=known.dtype)], dim=1)
    found = torch.linalg.lstsq(given, torch.cat(colours), driver="gelsd").solution
    return Preview(tuple(map(tuple, found[:-1].T.tolist())), tuple(found[-1].tolist()))

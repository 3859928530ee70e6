"""Training in an autoencoder's latents: which autoencoder, and images whose batches are latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.data import Images
from diffkern.data.latents import encoded
from diffkern.diffusion import Diffusion
from diffkern.diffusion.latents import hash_of
from diffkern.diffusion.previews import Preview
from diffkern.nn import Autoencoder
from diffkern.nn.posterior import Posterior
from diffkern.nn.scales import column
from diffkern.train.config import TrainConfig

__all__ = ["Encoder", "autoencoder_of", "in_latents"]

FOLDER = "autoencoder"
"""In a run's folder: the autoencoder of its model."""
BATCH = 32
"""Images that are encoded together."""


def autoencoder_of(config: TrainConfig, folder: Path | None) -> nn.Module | None:
    """The autoencoder that the configuration names, a folder of `Autoencoder.save_pretrained` or of a run that trained
    one; None where it names none. A run that goes on has a copy, which serves where the folder is not there any more.

    ValueError for a folder without an autoencoder.
    """
    if config.latents is None:
        return None
    place = Path(config.latents)
    if not place.is_dir() and folder is not None and (folder / FOLDER).is_dir():
        place = folder / FOLDER
    try:
        return Autoencoder.from_pretrained(place)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            "TrainConfig.latents must be the folder of an autoencoder, or of a run that has trained one to its end, "
            f"got {config.latents} ({error})"
        ) from error


def check_latents(config: TrainConfig, diffusion: Diffusion) -> Diffusion:
    """The diffusion that ``init`` names, with its own autoencoder; ValueError where the configuration has another."""
    autoencoder = autoencoder_of(config, None) if config.latents is not None and Path(config.latents).is_dir() else None
    if autoencoder is not None:
        found, own = hash_of(autoencoder), diffusion.autoencoder_hash()
        if found != own:
            raise ValueError(
                f"TrainConfig.latents must be left out, or name the autoencoder of init, of the hash {own}, got "
                f"{config.latents} of {found}"
            )
    return diffusion


class Encoder:
    """Mean and standard deviation of the latents of images, as the diffusion's network sees them."""

    def __init__(self, diffusion: Diffusion) -> None:
        self.diffusion = diffusion

    @torch.no_grad()
    def __call__(self, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        """(mean, std) [B, c, h, w] of x0 [B, C, H, W]; std None where the autoencoder has no posterior to sample."""
        autoencoder: Any = self.diffusion.autoencoder
        if not isinstance(autoencoder, Autoencoder):
            return self.diffusion.encode(x0, latents=False), None
        found = autoencoder.encode(x0.to(next(autoencoder.parameters())))
        mean = found.mode() if isinstance(found, Posterior) else found.diffused()
        scale, shift = (column(value, mean) for value in (autoencoder.scale, autoencoder.shift))
        return (mean - shift) * scale, found.std * scale if isinstance(found, Posterior) else None


def in_latents(
    diffusion: Diffusion, images: Images, config: TrainConfig, folder: Path | None, progress: bool | str
) -> Images:
    """The images as training takes them: where the configuration says "cached" their latents, which are kept under the
    hashes of both, else (and without an autoencoder, where they are latents, and where they are degraded) as they are.

    The map of previews is that of the run in the ``folder``, or fitted on some of the images.
    """
    if diffusion.autoencoder is None or diffusion.image_shape in (diffusion.shape, None):
        return images
    if images.shape != diffusion.image_shape:
        return images
    if diffusion.preview_map is None:
        kept = None if folder is None else folder / FOLDER / "preview.json"
        if kept is not None and kept.is_file():
            diffusion.preview_map = Preview.load(kept)
        else:
            diffusion.fit_preview(images)
    if config.encode == "on_the_fly" or diffusion.degradation is not None:
        return images
    name = diffusion.autoencoder_hash()
    assert name is not None
    return encoded(images, Encoder(diffusion), name, cache=config.cache, batch=BATCH, progress=progress)

"""Small autoencoders, and diffusions in their latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern import Diffusion, ops, schedules
from diffkern.nn import Autoencoder, AutoencoderConfig
from helpers.diffusion_cases import small_unet

IMAGE, LATENT = (1, 16, 16), (2, 8, 8)
TINY = {"channels": 8, "groups": 4, "heads": 1, "embedding": 16, "multipliers": (1, 1), "in_channels": 2}


def small_autoencoder(seed: int = 0, **fields: Any) -> Autoencoder:
    """Of images 1 x 16 x 16 to latents 2 x 8 x 8, with a scale and a shift, and a posterior that is not narrow."""
    config: dict[str, Any] = {
        **{"image_size": 16, "in_channels": 1, "channels": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4},
        **{"latent_channels": 2, "scale": 1.5, "shift": 0.25, **fields},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Autoencoder(AutoencoderConfig(**config))


def latent_diffusion(autoencoder: Any = None, **options: Any) -> Diffusion:
    """Of three classes, on a short table."""
    network = small_unet(**{**TINY, "out_channels": 2})
    encoder = small_autoencoder() if autoencoder is None else autoencoder
    return Diffusion(network, schedules.cosine(20), "v", autoencoder=encoder, **options)


def some_images(n: int = 4, seed: int = 0, shape: tuple[int, ...] = IMAGE) -> Tensor:
    """[n, C, H, W], in [-1, 1]."""
    return torch.tanh(ops.randn([n, *shape], seed, 0))

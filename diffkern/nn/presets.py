"""Configurations of published networks, by name, and that of the demo's."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, overload

from diffkern.checks import unknown
from diffkern.nn.autoencoder_config import AutoencoderConfig
from diffkern.nn.dit_config import DiTConfig
from diffkern.nn.unet_config import UNetConfig
from diffkern.nn.unet_presets import UNETS

Config = UNetConfig | DiTConfig | AutoencoderConfig

_DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and heads: table 1 of Peebles & Xie 2023."""

_DDPM = UNetConfig(  # Ho et al. 2020
    image_size=32,
    in_channels=3,
    out_channels=3,
    channels=128,
    multipliers=(1, 2, 2, 2),
    blocks=2,
    modulation="add",
    resample="conv",
    downsample_padding="asymmetric",
    groups=32,
    eps=1e-6,
    dropout=0.1,
    attention_levels=(1,),
    heads=1,
    time_sin_first=True,
    time_freq_shift=1.0,
    classes=0,
)
_SD = UNetConfig(  # Rombach et al. 2022, Stable Diffusion 1.x: latents of 64 x 64
    image_size=64,
    in_channels=4,
    out_channels=4,
    channels=320,
    multipliers=(1, 2, 4, 4),
    blocks=2,
    modulation="add",
    resample="conv",
    groups=32,
    attention_levels=(0, 1, 2),
    heads=8,
    transformer_depth=1,
    context_channels=768,
    attention_eps=1e-6,
    classes=0,
)
_SD2 = replace(_SD, heads=4, head_channels=64, context_channels=1024)
_SD_VAE = AutoencoderConfig(  # Rombach et al. 2022, kl-f8 of Stable Diffusion 1.x and 2.x
    image_size=512, channels=128, multipliers=(1, 2, 4, 4), blocks=2, latent_channels=4, scale=0.18215
)
_SD3_VAE = replace(  # Esser et al. 2024
    _SD_VAE, image_size=1024, latent_channels=16, quant_conv=False, post_quant_conv=False, scale=1.5305, shift=0.0609
)
_VQ_F4 = replace(  # Rombach et al. 2022, vq-f4
    _SD_VAE,
    image_size=256,
    multipliers=(1, 2, 4),
    regularisation="vq",
    latent_channels=3,
    codes=8192,
    code_channels=3,
    decay=None,
    scale=1.0,
    upcast=False,
)

PRESETS: dict[str, Config] = {
    "digits": UNetConfig(embedding=128, time_channels=128),  # the demo's: 8 x 8 digits of ten classes
    "ddpm-cifar10": _DDPM,  # 35.7 M parameters
    "ddpm-celebahq-256": replace(  # 113.7 M
        _DDPM, image_size=256, multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(4,), dropout=0.0
    ),
    "sd-1": _SD,  # 859.5 M
    "sd-2": _SD2,  # 865.9 M
    "sdxl": replace(  # Podell et al. 2023, 2567.5 M
        _SD2,
        image_size=128,
        multipliers=(1, 2, 4),
        attention_levels=(1, 2),
        transformer_depth=(0, 2, 10),
        context_channels=2048,
        vector_channels=1280,
        ids=6,
        id_channels=256,
    ),
    "sd-vae": _SD_VAE,  # 83.7 M
    "sdxl-vae": replace(_SD_VAE, image_size=1024, scale=0.13025),
    "sd3-vae": _SD3_VAE,  # 83.8 M
    "flux-vae": replace(_SD3_VAE, scale=0.3611, shift=0.1159),
    "vq-f4": _VQ_F4,  # 55.3 M
    **UNETS,
    **{  # Peebles & Xie 2023, latents of 256 x 256 images: S 33 M, B 130 M, L 458 M, XL 675 M parameters
        f"DiT-{size}/{patch}": DiTConfig(width=width, depth=depth, heads=heads, patch=patch, learned_variance=True)
        for size, (width, depth, heads) in _DIT_SIZES.items()
        for patch in (2, 4, 8)
    },
}
"""A `UNetConfig`, `DiTConfig` or `AutoencoderConfig` for each name; ``dataclasses.replace`` changes a field."""


@overload
def preset(name: Literal["digits"]) -> UNetConfig: ...


@overload
def preset(name: str) -> Config: ...


def preset(name: str) -> Config:
    """The configuration of this name; ValueError, with the names, for another."""
    if name not in PRESETS:
        raise ValueError(unknown("name", name, list(PRESETS)))
    return PRESETS[name]

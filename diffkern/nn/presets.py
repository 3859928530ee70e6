"""Configurations of published networks, by name, and that of the demo's."""

from __future__ import annotations

from typing import Literal, overload

from diffkern.checks import unknown
from diffkern.nn.dit_config import DiTConfig
from diffkern.nn.unet_config import UNetConfig
from diffkern.nn.unet_presets import UNETS

Config = UNetConfig | DiTConfig

_DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and heads: table 1 of Peebles & Xie 2023."""

PRESETS: dict[str, Config] = {
    "digits": UNetConfig(embedding=128, time_channels=128),  # the demo's: 8 x 8 digits of ten classes
    "ddpm-cifar10": UNetConfig(  # Ho et al. 2020, 35.7 M parameters
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
    ),
    **UNETS,
    **{  # Peebles & Xie 2023, latents of 256 x 256 images: S 33 M, B 130 M, L 458 M, XL 675 M parameters
        f"DiT-{size}/{patch}": DiTConfig(width=width, depth=depth, heads=heads, patch=patch, learned_variance=True)
        for size, (width, depth, heads) in _DIT_SIZES.items()
        for patch in (2, 4, 8)
    },
}
"""A `UNetConfig` or `DiTConfig` for each name; ``dataclasses.replace`` changes what another data set needs."""


@overload
def preset(name: Literal["digits"]) -> UNetConfig: ...


@overload
def preset(name: str) -> Config: ...


def preset(name: str) -> Config:
    """The configuration of this name; ValueError, with the names, for another."""
    if name not in PRESETS:
        raise ValueError(unknown("name", name, list(PRESETS)))
    return PRESETS[name]

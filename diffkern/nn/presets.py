"""Configurations of published networks, by name, and that of the demo's."""

from __future__ import annotations

from diffkern.checks import unknown
from diffkern.nn.unet_config import UNetConfig
from diffkern.nn.unet_presets import UNETS

Config = UNetConfig

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
}
"""A `UNetConfig` or `DiTConfig` for each name; ``dataclasses.replace`` changes what another data set needs."""


def preset(name: str) -> Config:
    """The configuration of this name; ValueError, with the names, for another."""
    if name not in PRESETS:
        raise ValueError(unknown("name", name, list(PRESETS)))
    return PRESETS[name]

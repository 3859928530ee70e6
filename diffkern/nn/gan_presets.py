"""Configurations of generators and discriminators that belong together, by name."""

from __future__ import annotations

from diffkern.checks import unknown
from diffkern.nn.adversarial_config import DiscriminatorConfig, GeneratorConfig

GANS: dict[str, tuple[GeneratorConfig, DiscriminatorConfig]] = {
    "dcgan-digits": (  # 8 x 8 digits of ten classes, those of the demo
        GeneratorConfig(8, latent_channels=32, condition="modulation", classes=10),
        DiscriminatorConfig(image_size=8, condition="projection", classes=10),
    ),
    "dcgan-digits28": (  # 28 x 28 digits of ten classes
        GeneratorConfig(28, condition="modulation", classes=10),
        DiscriminatorConfig(image_size=28, condition="projection", classes=10),
    ),
    "dcgan-64": (  # Radford et al. 2015, 64 x 64 photographs: 4 x 4 x 1024 to begin with
        GeneratorConfig(
            64,
            out_channels=3,
            latent_channels=100,
            channels=128,
            multipliers=(1, 2, 4, 8),
            norm="batch",
            activation="relu",
        ),
        DiscriminatorConfig(
            image_size=64, in_channels=3, channels=128, multipliers=(1, 2, 4, 8), norm="batch", spectral_norm=False
        ),
    ),
}
"""A `GeneratorConfig` and a `DiscriminatorConfig` for each name; ``dataclasses.replace`` changes what data need."""


def gan_preset(name: str) -> tuple[GeneratorConfig, DiscriminatorConfig]:
    """The configurations of this name; ValueError, with the names, for another."""
    if name not in GANS:
        raise ValueError(unknown("name", name, list(GANS)))
    return GANS[name]

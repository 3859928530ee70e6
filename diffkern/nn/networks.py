"""The networks that a checkpoint can name."""

from __future__ import annotations

from torch import nn

from diffkern.nn.adversarial_config import DiscriminatorConfig, GeneratorConfig
from diffkern.nn.autoencoder import Autoencoder
from diffkern.nn.autoencoder_config import AutoencoderConfig
from diffkern.nn.discriminator import Discriminator
from diffkern.nn.dit import DiT
from diffkern.nn.dit_config import DiTConfig
from diffkern.nn.generator import Generator
from diffkern.nn.text_conditioned import TextConditioned, TextConditionedConfig
from diffkern.nn.unet import UNet
from diffkern.nn.unet_config import UNetConfig
from diffkern.nn.wrappers import (
    FlowNetwork,
    FlowNetworkConfig,
    Preconditioned,
    PreconditionedConfig,
    ScoreNetwork,
    ScoreNetworkConfig,
)

NETWORKS: dict[str, tuple[type[nn.Module], type]] = {
    "UNet": (UNet, UNetConfig),
    "DiT": (DiT, DiTConfig),
    "Autoencoder": (Autoencoder, AutoencoderConfig),
    "Preconditioned": (Preconditioned, PreconditionedConfig),
    "ScoreNetwork": (ScoreNetwork, ScoreNetworkConfig),
    "FlowNetwork": (FlowNetwork, FlowNetworkConfig),
    "Generator": (Generator, GeneratorConfig),
    "Discriminator": (Discriminator, DiscriminatorConfig),
    "TextConditioned": (TextConditioned, TextConditionedConfig),
}
"""Networks that are built from plain data, by name: the class and that of its configuration."""

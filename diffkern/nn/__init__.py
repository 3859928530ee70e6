"""Networks: UNets by options, their blocks, a classifier, the DiT, autoencoders, those of GANs, published ones by name.

The names below are imported from their modules when they are first asked for (PEP 562).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffkern.nn.adversarial_config import DiscriminatorConfig, GeneratorConfig
    from diffkern.nn.attention import SpatialCrossAttention, SpatialSelfAttention
    from diffkern.nn.autoencoder import Autoencoder
    from diffkern.nn.autoencoder_config import AutoencoderConfig
    from diffkern.nn.blocks import ConvNeXtBlock, ResBlock
    from diffkern.nn.classifier import UNetClassifier, UNetClassifierConfig
    from diffkern.nn.conditions import Known
    from diffkern.nn.convolution import Frozen, freeze
    from diffkern.nn.discriminator import Discriminator
    from diffkern.nn.dit import DiT, DiTBlock
    from diffkern.nn.dit_config import DiTConfig
    from diffkern.nn.embeddings import FourierEmbedding, sinusoidal_embedding
    from diffkern.nn.gan_presets import GANS, gan_preset
    from diffkern.nn.generator import Generator
    from diffkern.nn.networks import NETWORKS
    from diffkern.nn.norm import GroupNormAct
    from diffkern.nn.posterior import Encoded, Posterior
    from diffkern.nn.presets import PRESETS, preset
    from diffkern.nn.quantised import CodebookStatistics, Quantised
    from diffkern.nn.text import TextEncoder, TextEncoderConfig, Vocabulary
    from diffkern.nn.text_conditioned import TextConditioned, TextConditionedConfig
    from diffkern.nn.text_pretrained import PretrainedText, PretrainedTextConfig
    from diffkern.nn.transformer import SpatialTransformer, TransformerBlock
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

_MODULES = {
    "adversarial_config": ("DiscriminatorConfig", "GeneratorConfig"),
    "attention": ("SpatialCrossAttention", "SpatialSelfAttention"),
    "autoencoder": ("Autoencoder",),
    "autoencoder_config": ("AutoencoderConfig",),
    "blocks": ("ConvNeXtBlock", "ResBlock"),
    "classifier": ("UNetClassifier", "UNetClassifierConfig"),
    "conditions": ("Known",),
    "convolution": ("Frozen", "freeze"),
    "discriminator": ("Discriminator",),
    "dit": ("DiT", "DiTBlock"),
    "dit_config": ("DiTConfig",),
    "embeddings": ("FourierEmbedding", "sinusoidal_embedding"),
    "gan_presets": ("GANS", "gan_preset"),
    "generator": ("Generator",),
    "networks": ("NETWORKS",),
    "norm": ("GroupNormAct",),
    "posterior": ("Encoded", "Posterior"),
    "presets": ("PRESETS", "preset"),
    "quantised": ("CodebookStatistics", "Quantised"),
    "text": ("TextEncoder", "TextEncoderConfig", "Vocabulary"),
    "text_conditioned": ("TextConditioned", "TextConditionedConfig"),
    "text_pretrained": ("PretrainedText", "PretrainedTextConfig"),
    "transformer": ("SpatialTransformer", "TransformerBlock"),
    "unet": ("UNet",),
    "unet_config": ("UNetConfig",),
    "wrappers": (
        "FlowNetwork",
        "FlowNetworkConfig",
        "Preconditioned",
        "PreconditionedConfig",
        "ScoreNetwork",
        "ScoreNetworkConfig",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "GANS",
    "NETWORKS",
    "PRESETS",
    "Autoencoder",
    "AutoencoderConfig",
    "CodebookStatistics",
    "ConvNeXtBlock",
    "DiT",
    "DiTBlock",
    "DiTConfig",
    "Discriminator",
    "DiscriminatorConfig",
    "Encoded",
    "FlowNetwork",
    "FlowNetworkConfig",
    "FourierEmbedding",
    "Frozen",
    "Generator",
    "GeneratorConfig",
    "GroupNormAct",
    "Known",
    "Posterior",
    "Preconditioned",
    "PreconditionedConfig",
    "PretrainedText",
    "PretrainedTextConfig",
    "Quantised",
    "ResBlock",
    "ScoreNetwork",
    "ScoreNetworkConfig",
    "SpatialCrossAttention",
    "SpatialSelfAttention",
    "SpatialTransformer",
    "TextConditioned",
    "TextConditionedConfig",
    "TextEncoder",
    "TextEncoderConfig",
    "TransformerBlock",
    "UNet",
    "UNetClassifier",
    "UNetClassifierConfig",
    "UNetConfig",
    "Vocabulary",
    "freeze",
    "gan_preset",
    "preset",
    "sinusoidal_embedding",
]

if not TYPE_CHECKING:  # a checker that saw this would take any name for one of the package

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            found = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
            setattr(sys.modules[__name__], name, found)
            return found
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

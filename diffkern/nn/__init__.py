"""Networks: UNets by options, their blocks, a classifier, the DiT, and configurations of published ones by name.

The names below are imported from their modules when they are first asked for (PEP 562).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffkern.nn.attention import SpatialCrossAttention, SpatialSelfAttention
    from diffkern.nn.blocks import ConvNeXtBlock, ResBlock
    from diffkern.nn.classifier import UNetClassifier, UNetClassifierConfig
    from diffkern.nn.conditions import Known
    from diffkern.nn.convolution import Frozen, freeze
    from diffkern.nn.dit import DiT, DiTBlock
    from diffkern.nn.dit_config import DiTConfig
    from diffkern.nn.embeddings import FourierEmbedding, sinusoidal_embedding
    from diffkern.nn.networks import NETWORKS
    from diffkern.nn.norm import GroupNormAct
    from diffkern.nn.presets import PRESETS, preset
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
    "attention": ("SpatialCrossAttention", "SpatialSelfAttention"),
    "blocks": ("ConvNeXtBlock", "ResBlock"),
    "classifier": ("UNetClassifier", "UNetClassifierConfig"),
    "conditions": ("Known",),
    "convolution": ("Frozen", "freeze"),
    "dit": ("DiT", "DiTBlock"),
    "dit_config": ("DiTConfig",),
    "embeddings": ("FourierEmbedding", "sinusoidal_embedding"),
    "networks": ("NETWORKS",),
    "norm": ("GroupNormAct",),
    "presets": ("PRESETS", "preset"),
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
    "NETWORKS",
    "PRESETS",
    "ConvNeXtBlock",
    "DiT",
    "DiTBlock",
    "DiTConfig",
    "FlowNetwork",
    "FlowNetworkConfig",
    "FourierEmbedding",
    "Frozen",
    "GroupNormAct",
    "Known",
    "Preconditioned",
    "PreconditionedConfig",
    "ResBlock",
    "ScoreNetwork",
    "ScoreNetworkConfig",
    "SpatialCrossAttention",
    "SpatialSelfAttention",
    "SpatialTransformer",
    "TransformerBlock",
    "UNet",
    "UNetClassifier",
    "UNetClassifierConfig",
    "UNetConfig",
    "freeze",
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

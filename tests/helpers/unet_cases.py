"""Small UNets of every option, with weights that are nowhere zero, and what to call them with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffkern.nn import UNet, UNetConfig

SMALL: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "channels": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_levels": (1,),
    "heads": 2,
    "embedding": 16,
    "groups": 4,
    "classes": 0,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "adaptive group norm": {"modulation": "scale_shift"},
    "addition": {"modulation": "add"},
    "learned variance": {"learned_variance": True},
    "one level": {"multipliers": (1,), "attention_levels": (), "heads": 1},
    "three levels, blocks by level": {"multipliers": (1, 2, 2), "blocks": (1, 2, 1), "attention_levels": (1, 2)},
    "heads by width": {"head_channels": 8, "attention_levels": (0, 1)},
    "no attention": {"attention_levels": (), "middle_attention": False},
    "attention once a level on the way up": {"up_attention": "last"},
    "residual resampling": {"resample": "residual"},
    "convolutions resample": {"resample": "conv"},
    "asymmetric padding": {"resample": "conv", "downsample_padding": "asymmetric"},
    "pooling": {"resample": "pool"},
    "FIR": {"resample": "residual", "filter": (1.0, 3.0, 3.0, 1.0)},
    "convolution at the skip of resampling": {"resample": "residual", "resampled_skip_conv": True},
    "auxiliary input": {"resample": "residual", "input_skips": "residual", "filter": (1.0, 3.0, 3.0, 1.0)},
    "transformer": {"transformer_depth": 1, "context_channels": 6},
    "transformers without context, by level": {"transformer_depth": (0, 2), "attention_levels": (0, 1), "heads": 1},
    "classes": {"classes": 5},
    "classes before": {"classes": 5, "class_place": "before", "class_scale": 2.0},
    "vector and numbers": {"vector_channels": 7, "ids": 2, "id_channels": 6},
    "augment": {"augment_channels": 4},
    "image": {"concat_channels": 2},
    "small image": {"concat_channels": 3, "concat_upsample": "bilinear"},
    "Fourier": {"time_embedding": "fourier", "fourier_scale": 0.5},
    "DDPM's time": {"time_sin_first": True, "time_freq_shift": 1.0, "time_scale": 1000.0},
    "scaled residuals": {"residual_scale": math.sqrt(0.5)},
    "ConvNeXt": {"block": "convnext"},
    "torch's attention": {"attention": "torch"},
}


def config(**changes: Any) -> UNetConfig:
    return UNetConfig(**{**SMALL, **changes})


def awake(config: UNetConfig) -> UNet:
    """The network with random weights everywhere: its output depends on everything."""
    network = UNet(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def inputs(config: UNetConfig, batch: int = 2, size: int = 8) -> tuple[Tensor, Tensor, dict[str, Any] | None]:
    """x, t and every condition that the network knows."""
    cond: dict[str, Any] = {}
    if config.classes:
        cond["class"] = torch.arange(batch) % config.classes
    if config.context_channels:
        cond["context"] = torch.randn(batch, 5, config.context_channels)
    for name, width in (("vector", config.vector_channels), ("ids", config.ids), ("augment", config.augment_channels)):
        if width:
            cond[name] = torch.randn(batch, width)
    if config.concat_channels:
        side = size if config.concat_upsample is None else size // 2
        cond["image"] = torch.randn(batch, config.concat_channels, side, side)
    return torch.randn(batch, config.in_channels, size, size), torch.linspace(0.1, 0.9, batch), cond or None


def of(cond: dict[str, Any] | None, i: int) -> dict[str, Any] | None:
    """The condition of sample i alone."""
    return None if cond is None else {name: value[i : i + 1] for name, value in cond.items()}

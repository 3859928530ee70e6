"""Small autoencoders of every kind, diffusers' of the same, and what to call them with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffkern.nn import Autoencoder, AutoencoderConfig
from helpers.lazy import Lazy

diffusers = Lazy("diffusers")

SMALL: dict[str, Any] = {"image_size": 16, "channels": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {"regularisation": "none"},
    "kl": {},
    "vq": {"regularisation": "vq", "codes": 12, "code_channels": 3},
    "vq by gradients": {"regularisation": "vq", "codes": 12, "decay": None},
    "fsq": {"regularisation": "fsq", "fsq_levels": (8, 5, 4)},
    "f = 4, no convolutions around, no attention": {
        "multipliers": (1, 2, 3),
        "quant_conv": False,
        "post_quant_conv": False,
        "middle_attention": False,
    },
    "attention at a level": {"attention_levels": (1,), "blocks": 2},
    "torch's attention": {"attention": "torch"},
}
_TINY: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
TINY: dict[str, dict[str, Any]] = {
    "kl": {**_TINY, "latent_channels": 4, "scaling_factor": 0.18215},
    "kl, 16 channels and a shift": {
        **_TINY,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": False,
    },
    "kl, three levels with attention": {
        **_TINY,
        "block_out_channels": [8, 16, 24],
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        "layers_per_block": 2,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.0, 2.0, 0.5, 1.5],
        "scaling_factor": 0.5,
    },
    "kl without attention": {**_TINY, "mid_block_add_attention": False},
    "vq": {
        **_TINY,
        "_class_name": "VQModel",
        "latent_channels": 3,
        "num_vq_embeddings": 12,
        "vq_embed_dim": 5,
        "scaling_factor": 1.0,
    },
}
"""config.json of diffusers' autoencoders."""


def config(**changes: Any) -> AutoencoderConfig:
    return AutoencoderConfig(**{**SMALL, **changes})


def model(**changes: Any) -> Autoencoder:
    """With weights that are nowhere zero or one."""
    torch.manual_seed(0)
    made = Autoencoder(config(**changes))
    return stirred(made)


def stirred(network: Any) -> Any:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return network


def images(batch: int = 2, height: int = 16, width: int = 12, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(batch, channels, height, width, generator=generator) * 2.0 - 1.0


def build(fields: dict[str, Any]) -> nn.Module:
    """diffusers' network of a config.json, in eval mode."""
    kind = getattr(diffusers, fields["_class_name"])
    made: nn.Module = kind(**{name: value for name, value in fields.items() if name != "_class_name"})
    return stirred(made).eval()

"""diffusers' UNets: tiny configurations of every kind that we read, the published ones, and what to call them with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from helpers.lazy import Lazy

diffusers = Lazy("diffusers")

PLAIN, CONDITIONAL = "UNet2DModel", "UNet2DConditionModel"
_DDPM = {
    "_class_name": PLAIN,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
_SD = {
    "_class_name": CONDITIONAL,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
_TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 10 + 6 * 8,
}

TINY: dict[str, dict[str, Any]] = {
    "ddpm": {
        **_DDPM,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    "ddpm, three levels": {
        **_DDPM,
        "block_out_channels": [8, 16, 16],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "improved ddpm": {
        **_DDPM,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "num_class_embeds": 5,
        "out_channels": 6,
    },
    "no attention in the middle": {
        **_DDPM,
        "add_attention": False,
        "in_channels": 4,
        "out_channels": 4,
        "time_embedding_dim": 24,
    },
    "sd 1": _SD,
    "sd 2": {
        **_SD,
        "layers_per_block": [2, 1],
        "use_linear_projection": True,
        "attention_head_dim": [1, 2],
        "upcast_attention": True,
    },
    "sd 2 unclip": {**_SD, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
    "inpainting": {**_SD, "in_channels": 9, "flip_sin_to_cos": False},
    "sdxl": {
        **_SD,
        **_TEXT_TIME,
        "block_out_channels": [8, 16, 16],
        "use_linear_projection": True,
        "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 1, 2],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "resampling blocks, classes": {
        **_SD,
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ["ResnetDownsampleBlock2D"] * 2,
        "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
        "num_class_embeds": 5,
    },
}
"""What each stands for, and its config.json."""

_SD1 = {
    "_class_name": CONDITIONAL,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
_SD2 = {**_SD1, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
_SDXL = {
    **_SD2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
_CIFAR = {
    "_class_name": PLAIN,
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
_CELEBA = {
    **_CIFAR,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "sample_size": 256,
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "ddpm-cifar10": (_CIFAR, 35_746_307),
    "ddpm-celebahq-256": (_CELEBA, 113_673_219),
    "sd-1": (_SD1, 859_520_964),
    "sd-2": (_SD2, 865_910_724),
    "sdxl": (_SDXL, 2_567_463_684),
}
"""The preset, the config.json of the published network and its number of parameters."""


def build(config: dict[str, Any]) -> nn.Module:
    """diffusers' network of a config.json, with random weights everywhere."""
    made: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def inputs(config: dict[str, Any], batch: int = 2, size: int = 8) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x with all channels that the network reads, t, and the conditions by the names that our networks give them."""
    x = torch.randn(batch, config.get("in_channels", 4 if config["_class_name"] == CONDITIONAL else 3), size, size)
    cond = {}
    if config["_class_name"] == CONDITIONAL:
        cond["context"] = torch.randn(batch, 5, config["cross_attention_dim"])
    if config.get("num_class_embeds"):
        cond["class"] = torch.arange(batch) % config["num_class_embeds"]
    if config.get("addition_embed_type"):
        cond["vector"] = torch.randn(batch, 10)
        cond["ids"] = torch.tensor([[64.0, 48.0, 7.0, 0.0, 32.0, 16.0]]).repeat(batch, 1)
    if config.get("class_embed_type"):
        cond["vector"] = torch.randn(batch, config["projection_class_embeddings_input_dim"])
    return x, torch.linspace(3.0, 950.0, batch), cond


def theirs(model: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """diffusers' network called on the same."""
    named: dict[str, Any] = {}
    if "class" in cond:
        named["class_labels"] = cond["class"]
    if "ids" in cond:
        named["added_cond_kwargs"] = {"text_embeds": cond["vector"], "time_ids": cond["ids"]}
    elif "vector" in cond:
        named["class_labels"] = cond["vector"]
    if "context" in cond:
        named["encoder_hidden_states"] = cond["context"]
    if "residuals" in cond:
        named["down_block_additional_residuals"] = cond["residuals"]
        named["mid_block_additional_residual"] = cond["middle_residual"]
    out: Tensor = model(x, t, return_dict=False, **named)[0]
    return out

"""A `UNetConfig` as a config.json of diffusers, where it has such a network."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffkern import records
from diffkern.nn.unet_config import UNetConfig
from diffkern.nn.weights._same import need_same
from diffkern.nn.weights.diffusers_config import read, to_ours


def to_theirs(config: UNetConfig, **fields: Any) -> dict[str, Any]:
    """A config.json of theirs for a network of ours: `UNet2DConditionModel` where it has a context, else `UNet2DModel`.

    ``fields``: others of theirs, such as sample_size. ValueError in one sentence for an option that they do not have:
    what is written is read again, and has to be the same network.
    """
    conditional = config.context_channels > 0
    residual = config.resample == "residual" and not (conditional and config.attention_levels)  # which resample by conv
    attention = "CrossAttn" if conditional else "Attn"
    kinds = [attention if level in config.attention_levels else "" for level in range(len(config.multipliers))]
    down = [f"{kind}DownBlock2D" if kind or not residual else "ResnetDownsampleBlock2D" for kind in kinds]
    up = [f"{kind}UpBlock2D" if kind or not residual else "ResnetUpsampleBlock2D" for kind in kinds[::-1]]
    found: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel" if conditional else "UNet2DModel",
        "sample_size": config.image_size,
        "in_channels": config.in_channels + config.concat_channels,
        "out_channels": config.predicted_channels,
        "block_out_channels": config.widths,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": config.blocks if conditional else min(config.block_counts),
        "time_embedding_dim": config.embedding_width,
        "freq_shift": config.time_freq_shift,
        "flip_sin_to_cos": not config.time_sin_first,
        "downsample_padding": 1 if config.downsample_padding == "symmetric" else 0,
        "dropout": config.dropout,
        "norm_num_groups": config.groups,
        "norm_eps": config.eps,
        "resnet_time_scale_shift": "default" if config.modulation == "add" else "scale_shift",
        "num_class_embeds": config.classes or None,
        **(_conditional(config) if conditional else _plain(config)),
    }
    whose = f"diffusers' {found['_class_name']}"
    if config.time_scale != 1.0:
        raise ValueError(
            f"UNetConfig.time_scale must be 1.0 for a network of {whose}, got {records.shown(config.time_scale)}"
        )
    back = to_ours(found, config.ids or None)
    # which of the channels that enter are concatenated is not said there
    need_same(config, dataclasses.replace(back, concat_channels=config.concat_channels), whose)
    read(found | fields)
    return found | fields


def _plain(config: UNetConfig) -> dict[str, Any]:
    kind = "resnet" if config.resample == "residual" else "conv"
    width = config.head_channels
    if width is None and config.heads > 1:  # as many channels a head as the lowest level with attention has
        used = len(config.multipliers) - 1 if config.middle_attention else max(config.attention_levels, default=0)
        width = config.widths[used] // config.heads
    return {
        "downsample_type": kind,
        "upsample_type": kind,
        "add_attention": config.middle_attention,
        "attn_norm_num_groups": config.groups,
        "attention_head_dim": width,
    }


def _conditional(config: UNetConfig) -> dict[str, Any]:
    width = config.head_channels
    heads = [config.heads if width is None else max(1, channels // width) for channels in config.widths]
    found: dict[str, Any] = {
        "cross_attention_dim": config.context_channels,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "transformer_layers_per_block": [max(1, depth) for depth in config.depths],
        "use_linear_projection": width is not None,  # as SD 2 and SDXL have it, and SD 1 has not
    }
    total = config.vector_channels + config.ids * config.id_channels
    if config.ids:
        found |= {"addition_embed_type": "text_time", "addition_time_embed_dim": config.id_channels}
    elif total:
        found["class_embed_type"] = "projection"
    return found | ({"projection_class_embeddings_input_dim": total} if total else {})

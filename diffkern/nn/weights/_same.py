"""Whether a configuration is that of a network which another library has."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffkern.nn.heads import count_heads
from diffkern.nn.unet_config import UNetConfig
from diffkern.records import shown

__all__ = ["need_same"]

_FREE = ("attention", "dropout", "fourier_scale", "image_size", "in_channels", "learned_variance", "out_channels",
         "time_scale", "zero_init")  # fmt: skip
"""What changes no name, or is free there, too."""


def need_same(config: UNetConfig, expected: UNetConfig, whose: str) -> None:
    """Raise ValueError, with the option, unless a configuration means the same network as the ``expected`` one.

    What has no effect on the network's function (but for `_FREE`) may differ, and one option may be said in two ways.
    """
    here, there = _meant(config), _meant(expected)
    for name, value in here.items():
        if value != there[name]:
            raise ValueError(
                f"UNetConfig.{name} must be {shown(there[name])} for a network of {whose}, got {shown(value)}"
            )


def _meant(config: UNetConfig) -> dict[str, Any]:
    found = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    found["channels"], found["multipliers"] = None, config.widths
    found["enter_channels"] = config.enter_channels or config.widths[0]
    used = sorted({*config.attention_levels, *([len(config.multipliers) - 1] if config.middle_attention else [])})
    found["blocks"], found["transformer_depth"] = config.block_counts, tuple(config.depths[level] for level in used)
    found["heads"] = tuple(count_heads(config.widths[level], config.heads, config.head_channels) for level in used)
    found["attention_levels"] = tuple(sorted(set(config.attention_levels)))
    found["attention_eps"] = config.attention_eps or config.eps
    found["embedding"], found["time_channels"] = config.embedding_width, config.sinusoids
    found["filter"] = None if config.filter == (1.0, 1.0) else config.filter
    idle = {
        "head_channels": True,
        "id_channels": not config.ids,
        "class_place": not config.classes,
        "class_scale": not config.classes,
        "class_bias": not config.classes,
        "concat_upsample": not config.concat_channels,
        "up_attention": not config.attention_levels,
        "resample": len(config.multipliers) == 1,
        "downsample_padding": config.resample != "conv" or len(config.multipliers) == 1,
        "resampled_skip_conv": config.resample != "residual" or len(config.multipliers) == 1,
        "time_freq_shift": config.time_embedding == "fourier",
    }
    return {name: value for name, value in found.items() if name not in _FREE and not idle.get(name, False)}

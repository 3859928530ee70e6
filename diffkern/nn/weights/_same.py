"""Whether a configuration is that of a network which another library has."""

from __future__ import annotations

import dataclasses
from typing import Any

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
    found["blocks"], found["transformer_depth"] = config.block_counts, config.depths
    found["attention_levels"] = tuple(sorted(set(config.attention_levels)))
    found["attention_eps"] = config.attention_eps or config.eps
    found["embedding"], found["time_channels"] = config.embedding_width, config.sinusoids
    found["filter"] = None if config.filter == (1.0, 1.0) else config.filter
    without = [*_FREE, *([] if config.head_channels is None else ["heads"]), *([] if config.ids else ["id_channels"])]
    if not config.classes:
        without += ["class_place", "class_scale", "class_bias"]
    if config.resample != "conv":
        without.append("downsample_padding")
    if config.time_embedding == "fourier":
        without.append("time_freq_shift")
    return {name: value for name, value in found.items() if name not in without}

"""guided-diffusion's and improved-diffusion's flags (`model_and_diffusion_defaults`) as configurations of ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from diffkern.checks import misspelt
from diffkern.nn.unet_config import UNetConfig

__all__ = ["Numbers", "improved_unet_config", "only_known", "unet_config", "upsampler_config"]

Numbers: TypeAlias = "str | Sequence[float]"
"""Numbers, or the text of a flag: "16,8"."""

MULTIPLIERS: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
"""`channel_mult` where it is left empty, by the image size."""
_ELSEWHERE = (  # flags of the diffusion and of the training
    "diffusion_steps",
    "learn_sigma",
    "noise_schedule",
    "predict_xstart",
    "rescale_learned_sigmas",
    "rescale_timesteps",
    "sigma_small",
    "timestep_respacing",
    "use_checkpoint",
    "use_fp16",
    "use_kl",
    "use_new_attention_order",
)


def only_known(function: str, others: dict[str, Any], *more: str) -> None:
    """Raise TypeError for a flag that neither library has, nor one of these ``more``."""
    for name in others:
        if name not in (*_ELSEWHERE, *more):
            raise TypeError(misspelt(function, name, (*_ELSEWHERE, *more)))


def _numbers(name: str, value: Numbers) -> tuple[float, ...]:
    """Of the text of a flag or of a sequence; ValueError for none."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers with commas between, got {value!r}") from None


def _levels(name: str, value: Numbers, image_size: int, levels: int) -> tuple[int, ...]:
    """The levels whose resolution is among those of a flag; as there, others have no effect."""
    sides = [int(side) for side in _numbers(name, value)]
    if min(sides, default=1) < 1:
        raise ValueError(f"{name} must be positive, got {value!r}")
    factors = {image_size // side for side in sides}
    return tuple(level for level in range(levels) if 2**level in factors)


def _multipliers(value: Numbers, image_size: int) -> tuple[float, ...]:
    if isinstance(value, str) and not value:
        if image_size not in MULTIPLIERS:
            sizes = ", ".join(map(str, MULTIPLIERS))
            raise ValueError(f"image_size must be one of {sizes} where channel_mult is not given, got {image_size}")
        return MULTIPLIERS[image_size]
    return _numbers("channel_mult", value)


def unet_config(
    *,
    image_size: int = 64,
    num_channels: int = 128,
    num_res_blocks: int = 2,
    num_heads: int = 4,
    num_heads_upsample: int = -1,
    num_head_channels: int = -1,
    attention_resolutions: Numbers = "16,8",
    channel_mult: Numbers = "",
    dropout: float = 0.0,
    class_cond: bool = False,
    use_scale_shift_norm: bool = True,
    resblock_updown: bool = False,
    learn_sigma: bool = False,
    rescale_timesteps: bool = False,
    diffusion_steps: int = 1000,
    num_classes: int = 1000,
    image_channels: int = 3,
    **others: Any,
) -> UNetConfig:
    """The configuration of guided-diffusion's `create_model` with these flags.

    `num_classes` counts where `class_cond` is set; with `rescale_timesteps` the network takes whole steps and scales
    them itself (`time_scale` = 1000 / diffusion_steps), which there the diffusion does before it. ValueError for sizes
    that fit no network and for a `num_heads_upsample` of its own; TypeError for an unknown flag.
    """
    only_known("unet_config", others)
    if num_heads_upsample not in (-1, num_heads) and num_head_channels == -1:
        raise ValueError(f"num_heads_upsample must be -1 or num_heads, {num_heads}, got {num_heads_upsample}")
    multipliers = _multipliers(channel_mult, image_size)
    widths = [int(multiplier * num_channels) for multiplier in multipliers]
    channels = math.gcd(*widths)
    return UNetConfig(
        image_size=image_size,
        in_channels=image_channels,
        out_channels=image_channels,
        learned_variance=learn_sigma,
        channels=channels,
        multipliers=tuple(width // channels for width in widths) if channels else (),
        blocks=num_res_blocks,
        modulation="scale_shift" if use_scale_shift_norm else "add",
        resample="residual" if resblock_updown else "conv",
        groups=32,
        dropout=dropout,
        attention_levels=_levels("attention_resolutions", attention_resolutions, image_size, len(widths)),
        heads=num_heads,
        head_channels=None if num_head_channels == -1 else num_head_channels,
        embedding=None if channels == num_channels else 4 * num_channels,
        time_channels=None if channels == num_channels else num_channels,
        time_scale=1000 / diffusion_steps if rescale_timesteps else 1.0,
        classes=num_classes if class_cond else 0,
    )


def improved_unet_config(
    *, num_head_channels: int = -1, resblock_updown: bool = False, rescale_timesteps: bool = True, **flags: Any
) -> UNetConfig:
    """The configuration of improved-diffusion's `create_model`: `unet_config` with its default of `rescale_timesteps`.

    ValueError for what that library does not have.
    """
    if num_head_channels != -1 or resblock_updown:
        raise ValueError("num_head_channels and resblock_updown must be left out: improved-diffusion has neither")
    return unet_config(rescale_timesteps=rescale_timesteps, **flags)


def upsampler_config(*, large_size: int = 256, small_size: int = 64, **flags: Any) -> UNetConfig:
    """The configuration of guided-diffusion's `sr_create_model`, whose condition is ``{"image": low_res}``.

    Flags as of `unet_config`. `small_size` does not decide anything: an image of any size is brought to that of x.
    """
    del small_size
    if "image_size" in flags:
        raise TypeError("upsampler_config has the arguments large_size and small_size, got image_size")
    if large_size == 512 and not flags.get("channel_mult"):
        flags["channel_mult"] = (1, 1, 2, 2, 4, 4)
    config = unet_config(image_size=large_size, **flags)
    return dataclasses.replace(config, concat_channels=config.in_channels, concat_upsample="bilinear")

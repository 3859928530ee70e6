"""Networks and weights of guided-diffusion and improved-diffusion (Dhariwal and Nichol 2021, Nichol and Dhariwal 2021).

Both libraries say which network is meant by the flags of their scripts (`model_and_diffusion_defaults`). Here they are
keyword arguments of the same names and defaults: `unet_config(...)` is our configuration of that network,
`load(weights, ...)` that network with the weights of a checkpoint, `export(network)` the checkpoint's state dict again.

Flags that say nothing about the network (`use_checkpoint`, `use_fp16`, `noise_schedule`, ...) are taken and ignored,
so that a script's whole dictionary of them can be given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from diffkern.checks import misspelt
from diffkern.names import HeadOrder
from diffkern.nn.attention import SpatialSelfAttention
from diffkern.nn.classifier import UNetClassifier, UNetClassifierConfig
from diffkern.nn.unet import UNet
from diffkern.nn.unet_config import UNetConfig
from diffkern.nn.weights._keys import Key, Source, fill, to_theirs
from diffkern.nn.weights._same import need_same

__all__ = [
    "classifier_config",
    "export",
    "improved_unet_config",
    "load",
    "load_classifier",
    "load_improved",
    "load_upsampler",
    "unet_config",
    "upsampler_config",
]

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


def _only_known(function: str, others: dict[str, Any], *more: str) -> None:
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
    _only_known("unet_config", others)
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


def classifier_config(
    *,
    image_size: int = 64,
    classifier_width: int = 128,
    classifier_depth: int = 2,
    classifier_attention_resolutions: Numbers = "32,16,8",
    classifier_use_scale_shift_norm: bool = True,
    classifier_resblock_updown: bool = True,
    classifier_pool: Any = "attention",
    num_classes: int = 1000,
    num_head_channels: int = 64,
    channel_mult: Numbers = "",
    **others: Any,
) -> UNetClassifierConfig:
    """The configuration of guided-diffusion's `create_classifier`; ValueError and TypeError as of `unet_config`."""
    _only_known("classifier_config", others, "classifier_use_fp16")
    encoder = unet_config(
        image_size=image_size,
        num_channels=classifier_width,
        num_res_blocks=classifier_depth,
        num_head_channels=num_head_channels,
        attention_resolutions=classifier_attention_resolutions,
        channel_mult=channel_mult,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
    )
    return UNetClassifierConfig(encoder, num_classes, classifier_pool)


# ----------------------------------------------------------------------------------------------------- the key map

_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "modulate": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
_FIXED = {
    "enter": "input_blocks.0.0",
    "time.0": "time_embed.0",
    "time.2": "time_embed.2",
    "classes": "label_emb",
    "norm": "out.0",
    "leave": "out.2",
    "middle.0.block": "middle_block.0",
    "middle.0.attention": "middle_block.1",
    "middle.1.block": "middle_block.2",
}
_POOLS = {
    "adaptive": {"pool": "out.3"},
    "attention": {"pool": "out.2", "pool.qkv": "out.2.qkv_proj", "pool.leave": "out.2.c_proj"},
    "spatial": {"pool.0": "out.0", "pool.2": "out.2"},
    "spatial_v2": {"pool.0": "out.0", "pool.1": "out.1", "pool.3": "out.3"},
}


def _places(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Our name and theirs of everything that stands on the way down and up."""
    levels = len(config.multipliers)
    n = 1
    for level, count in enumerate(config.block_counts):
        for i in range(count):
            yield f"down.{level}.blocks.{i}.block", f"input_blocks.{n}.0"
            yield f"down.{level}.blocks.{i}.attention", f"input_blocks.{n}.1"
            n += 1
        if level + 1 < levels:
            yield f"down.{level}.resample", f"input_blocks.{n}.0"
            yield f"down.{level}.resample.conv", f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for k, level in enumerate(reversed(range(levels))):
        count = config.block_counts[level] + 1
        for i in range(count):
            yield f"up.{k}.blocks.{i}.block", f"output_blocks.{n}.0"
            yield f"up.{k}.blocks.{i}.attention", f"output_blocks.{n}.1"
            n += 1
        if level:
            yield f"up.{k}.resample", f"output_blocks.{n - 1}.{2 if level in config.attention_levels else 1}"


def _keys(network: UNet | UNetClassifier, order: HeadOrder) -> list[Key]:
    places = {**_FIXED, **dict(_places(network.config))}
    if isinstance(network, UNetClassifier):
        places |= _POOLS[network.classifier_config.pool]
    modules = dict(network.named_modules())
    return [_key(name, places, order, modules) for name in network.state_dict()]


def _key(name: str, places: dict[str, str], order: HeadOrder, modules: dict[str, nn.Module]) -> Key:
    module, _, leaf = name.rpartition(".")
    outer, _, part = module.rpartition(".")
    if name == "pool.positions":
        return Key(name, (f"{places[module]}.positional_embedding",))
    # Parts of attention have the same names there.
    there = places[module] if module in places else f"{places[outer]}.{_BLOCK.get(part, part)}"
    theirs = (f"{there}.{leaf}",)
    if module == "classes":
        return Key(name, theirs, table="rows")
    attention = modules.get(outer)
    if part == "qkv" and isinstance(attention, SpatialSelfAttention):
        return Key(name, theirs, rows=order, heads=attention.num_heads)
    if outer == "pool" and part in ("qkv", "leave") and leaf == "weight":
        return Key(name, theirs, axes=1)
    return Key(name, theirs)


def _order(new: bool) -> HeadOrder:
    return "new" if new else "legacy"


def load(weights: Source, *, use_new_attention_order: bool = False, **flags: Any) -> UNet:
    """guided-diffusion's UNet of these flags with these weights: a state dict, a .pt or a safetensors file.

    The network has copies of its own, in the dtype of the weights, on the CPU. Flags as of `unet_config`. ValueError
    that lists every missing, unknown or misshapen tensor; for a file that is none.
    """
    return _filled(UNet(unet_config(**flags)), weights, use_new_attention_order)


def load_improved(weights: Source, **flags: Any) -> UNet:
    """improved-diffusion's UNet of these flags with these weights: as `load`, flags as of `improved_unet_config`."""
    return _filled(UNet(improved_unet_config(**flags)), weights, False)


def load_upsampler(weights: Source, *, use_new_attention_order: bool = False, **flags: Any) -> UNet:
    """guided-diffusion's upsampler of these flags with these weights: as `load`, flags as of `upsampler_config`."""
    return _filled(UNet(upsampler_config(**flags)), weights, use_new_attention_order)


def load_classifier(weights: Source, **flags: Any) -> UNetClassifier:
    """guided-diffusion's classifier of these flags with these weights: as `load`, flags as of `classifier_config`."""
    return _filled(UNetClassifier(classifier_config(**flags)), weights, False)


def _filled(network: Any, weights: Source, new: bool) -> Any:
    fill(network, _keys(network, _order(new)), weights)
    return network


def _rebuilt(config: UNetConfig) -> UNetConfig:
    """Which of guided-diffusion's networks this one must be."""
    side = 2 ** len(config.multipliers)
    expected = unet_config(
        image_size=side,
        num_channels=config.sinusoids,
        num_res_blocks=config.block_counts[0],
        num_heads=config.heads,
        num_head_channels=-1 if config.head_channels is None else config.head_channels,
        attention_resolutions=[side >> level for level in config.attention_levels],
        channel_mult=[width / config.sinusoids for width in config.widths],
        class_cond=config.classes > 0,
        num_classes=config.classes,
        use_scale_shift_norm=config.modulation == "scale_shift",
        resblock_updown=config.resample == "residual",
        learn_sigma=config.learned_variance,
        image_channels=config.in_channels,
    )
    if config.resample == "pool":
        expected = dataclasses.replace(expected, resample="pool")
    if config.concat_channels:
        expected = dataclasses.replace(expected, concat_channels=config.in_channels, concat_upsample="bilinear")
    return expected


def export(network: nn.Module, *, use_new_attention_order: bool = False) -> dict[str, Tensor]:
    """The state dict of guided-diffusion's or improved-diffusion's network that a `UNet` or `UNetClassifier` is.

    The inverse of `load`, bit for bit; tensors are views of the network's where no row moves. ValueError for another
    network, for options that those libraries do not have, and for a trained row of "no class".
    """
    if not isinstance(network, UNet | UNetClassifier):
        raise ValueError(f"network must be a UNet or a UNetClassifier, got {type(network).__name__}")
    need_same(network.config, _rebuilt(network.config), "guided-diffusion")
    return to_theirs(_keys(network, _order(use_new_attention_order)), network.state_dict())

"""Networks and weights of guided-diffusion and improved-diffusion (Dhariwal and Nichol 2021, Nichol and Dhariwal 2021).

Both libraries say which network is meant by the flags of their scripts (`model_and_diffusion_defaults`). Here they are
keyword arguments of the same names and defaults: `unet_config(...)` is our configuration of that network,
`load(weights, ...)` that network with the weights of a checkpoint, `export(network)` the checkpoint's state dict again.

Flags that say nothing about the network (`use_checkpoint`, `use_fp16`, `noise_schedule`, ...) are taken and ignored,
so that a script's whole dictionary of them can be given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from diffkern.names import HeadOrder
from diffkern.nn.attention import SpatialSelfAttention
from diffkern.nn.classifier import UNetClassifier, UNetClassifierConfig
from diffkern.nn.unet import UNet
from diffkern.nn.unet_config import UNetConfig
from diffkern.nn.weights._keys import Key, Source, fill, stored, to_theirs, unfilled
from diffkern.nn.weights._same import need_same
from diffkern.nn.weights.openai_config import (
    Numbers,
    improved_unet_config,
    only_known,
    unet_config,
    upsampler_config,
)

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
    only_known("classifier_config", others, "classifier_use_fp16")
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

    The network has copies of its own, in the dtype of the weights, on the CPU, in evaluation mode. Flags as of
    `unet_config`. ValueError that lists every missing, unknown or misshapen tensor; for a file that is none.
    """
    return _filled(UNet, unet_config(**flags), weights, use_new_attention_order)


def load_improved(weights: Source, **flags: Any) -> UNet:
    """improved-diffusion's UNet of these flags with these weights: as `load`, flags as of `improved_unet_config`."""
    return _filled(UNet, improved_unet_config(**flags), weights, False)


def load_upsampler(weights: Source, *, use_new_attention_order: bool = False, **flags: Any) -> UNet:
    """guided-diffusion's upsampler of these flags with these weights: as `load`, flags as of `upsampler_config`."""
    return _filled(UNet, upsampler_config(**flags), weights, use_new_attention_order)


def load_classifier(weights: Source, **flags: Any) -> UNetClassifier:
    """guided-diffusion's classifier of these flags with these weights: as `load`, flags as of `classifier_config`."""
    return _filled(UNetClassifier, classifier_config(**flags), weights, False)


def _filled(made: Any, config: Any, weights: Source, new: bool) -> Any:
    network = unfilled(lambda: made(config))
    fill(network, _keys(network, _order(new)), weights)
    return network.eval()


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

    The inverse of `load`, bit for bit, contiguous. ValueError for another
    network, for options that those libraries do not have, and for a trained row of "no class".
    """
    if not isinstance(network, UNet | UNetClassifier):
        raise ValueError(f"network must be a UNet or a UNetClassifier, got {type(network).__name__}")
    need_same(network.config, _rebuilt(network.config), "guided-diffusion")
    return stored(to_theirs(_keys(network, _order(use_new_attention_order)), network.state_dict()))

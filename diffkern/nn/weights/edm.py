"""Networks and weights of EDM (Karras et al. 2022): SongUNet (DDPM++ and NCSN++, Song et al. 2021) and DhariwalUNet.

EDM's files are pickles of objects, which run code when they are read: where one is trusted, take the state dict of its
network (``pickle["ema"].state_dict()``) and the constructor's keyword arguments (``pickle["ema"].init_kwargs``), of
which those of the preconditioner are ignored. `song_unet_config(...)` and `dhariwal_unet_config(...)` are our
configurations of these networks, `load_song_unet` and `load_dhariwal_unet` the networks with weights, `export` the
state dict again. `diffkern.nn.wrappers` has the preconditioners.

Class labels are one-hot vectors there and indices here; no label, all zeros there, is the index ``classes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.nn.attention import SpatialSelfAttention
from diffkern.nn.blocks import ResBlock
from diffkern.nn.unet import UNet
from diffkern.nn.unet_config import UNetConfig
from diffkern.nn.weights._keys import Key, Source, fill, read_state, stored, to_theirs, unfilled
from diffkern.nn.weights._same import need_same
from diffkern.nn.weights.edm_config import dhariwal_unet_config, song_unet_config

__all__ = ["dhariwal_unet_config", "export", "load_dhariwal_unet", "load_song_unet", "song_unet_config"]

PREFIX = "model."
"""Of the names where the state dict is a preconditioner's."""
LEVELS = "u"
"""The noise levels that iDDPM's preconditioner keeps beside its network; `nn.Preconditioned` works them out."""


# ----------------------------------------------------------------------------------------------------- the key map

_BLOCK = {
    "norm1": "norm0",
    "conv1": "conv0",
    "modulate": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "skip": "skip",
}
_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj_out": "proj"}


def _places(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Our name and theirs of every module that holds tensors or blocks."""
    assert isinstance(config.image_size, int)
    side, levels = config.image_size, len(config.multipliers)
    song = config.resampled_skip_conv
    sides = [f"{side >> level}x{side >> level}" for level in range(levels)]
    yield "enter", f"enc.{sides[0]}_conv"
    for level, count in enumerate(config.block_counts):
        for i in range(count):
            yield f"down.{level}.blocks.{i}", f"enc.{sides[level]}_block{i}"
        if level + 1 < levels:
            yield f"down.{level}.resample", f"enc.{sides[level + 1]}_down"
            yield f"down.{level}.input_skip.conv", f"enc.{sides[level + 1]}_aux_residual"
    yield from ((f"middle.{i}", f"dec.{sides[-1]}_in{i}") for i in range(2))
    for k, level in enumerate(reversed(range(levels))):
        for i in range(config.block_counts[level] + 1):
            yield f"up.{k}.blocks.{i}", f"dec.{sides[level]}_block{i}"
        if level:
            yield f"up.{k}.resample", f"dec.{sides[level - 1]}_up"
    yield "norm", f"dec.{sides[0]}_aux_norm" if song else "out_norm"
    yield "leave", f"dec.{sides[0]}_aux_conv" if song else "out_conv"
    yield from (("time.0", "map_layer0"), ("time.2", "map_layer1"), ("augment", "map_augment"))


def _keys(network: UNet) -> list[Key]:
    config = network.config
    places, modules = dict(_places(config)), dict(network.named_modules())
    keys = [_key(name, places, modules) for name in network.state_dict()]
    taps = torch.tensor(config.filter or (1.0, 1.0), dtype=torch.float32)
    kernel = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]
    for ours, theirs in places.items():
        block = modules.get(ours)
        if isinstance(block, ResBlock):  # one that resamples
            keys += [Key(None, (f"{theirs}.{part}.resample_filter",), value=kernel) for part in ("conv0", "skip")]
        elif block is not None and ours.endswith("input_skip.conv"):
            keys.append(Key(None, (f"{theirs}.resample_filter",), value=kernel))
    return keys


def _key(name: str, places: dict[str, str], modules: dict[str, nn.Module]) -> Key:
    module, _, leaf = name.rpartition(".")
    if name == "fourier.frequencies":
        return Key(name, ("map_noise.freqs",))
    if name == "classes.weight":
        return Key(name, ("map_label.weight",), table="columns")
    if name == "class_bias":
        return Key(name, ("map_label.bias",))
    if module in places:
        return Key(name, (f"{places[module]}.{leaf}",))
    outer, _, part = module.rpartition(".")
    attention = modules[outer]
    if isinstance(attention, SpatialSelfAttention):
        theirs = (f"{places[outer.removesuffix('.attention')]}.{_ATTENTION[part]}.{leaf}",)
        axes = 2 if part != "norm" and leaf == "weight" else None
        return Key(name, theirs, axes, "edm" if part == "qkv" else "new", attention.num_heads)
    return Key(name, (f"{places[outer.removesuffix('.block')]}.{_BLOCK.get(part, part)}.{leaf}",))


def load_song_unet(weights: Source, **arguments: Any) -> UNet:
    """EDM's SongUNet of these arguments with these weights: the state dict of it or of its preconditioner, or a file.

    The network has copies of its own, in the dtype of the weights, on the CPU, in evaluation mode. Arguments as of
    `song_unet_config`. ValueError that lists every missing, unknown or misshapen tensor; for a file of anything but
    tensors.
    """
    return _filled(song_unet_config(**arguments), weights)


def load_dhariwal_unet(weights: Source, **arguments: Any) -> UNet:
    """EDM's DhariwalUNet of these arguments with these weights: as `load_song_unet`, arguments as of
    `dhariwal_unet_config`."""
    return _filled(dhariwal_unet_config(**arguments), weights)


def _filled(config: UNetConfig, weights: Source) -> UNet:
    state, network = read_state(weights), unfilled(lambda: UNet(config))
    inside = {name: tensor for name, tensor in state.items() if name != LEVELS}
    if inside and all(name.startswith(PREFIX) for name in inside):
        state = {name.removeprefix(PREFIX): tensor for name, tensor in inside.items()}
    fill(network, _keys(network), state)
    return network.eval()


def _rebuilt(config: UNetConfig) -> UNetConfig:
    """Which of EDM's networks this one must be."""
    if not isinstance(config.image_size, int):
        raise ValueError(f"UNetConfig.image_size must be a number, which EDM's names hold, got {config.image_size}")
    song = config.resampled_skip_conv
    shared: dict[str, Any] = {
        "img_resolution": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "label_dim": config.classes,
        "augment_dim": config.augment_channels,
        "model_channels": config.channels,
        "channel_mult": config.multipliers,
        "channel_mult_emb": config.embedding_width // config.channels,
        "num_blocks": config.block_counts[0],
        "attn_resolutions": [config.image_size >> level for level in config.attention_levels],
    }
    if not song:
        return dhariwal_unet_config(**shared)
    return song_unet_config(
        **shared,
        embedding_type="fourier" if config.time_embedding == "fourier" else "positional",
        channel_mult_noise=config.sinusoids // config.channels,
        encoder_type="residual" if config.input_skips == "residual" else "standard",
        resample_filter=config.filter or (1, 1),
    )


def export(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of EDM's network that a `UNet` of `song_unet_config` or `dhariwal_unet_config` is.

    The inverse of the loaders, bit for bit, contiguous. ValueError for
    another network, and for a trained row of "no class".
    """
    if not isinstance(network, UNet):
        raise ValueError(f"network must be a UNet, got {type(network).__name__}")
    need_same(network.config, _rebuilt(network.config), "EDM")
    return stored(to_theirs(_keys(network), network.state_dict()))

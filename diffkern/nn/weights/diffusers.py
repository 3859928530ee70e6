"""Weights of diffusers' `UNet2DModel` and `UNet2DConditionModel` (SD 1.x, 2.x, SDXL) for `UNet`, and back.

Names and shapes are those of diffusers 0.42; what it has renamed since 2022 is read too. Their q, k and v, three
layers, are one of ours; nothing is computed, so that a round trip gives the same bits.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffkern.nn.weights import diffusers_folder
from diffkern.nn.weights._keys import Key, Source, fill, read_state, stored, to_theirs, unfilled
from diffkern.nn.weights.diffusers_config import to_ours as config_from
from diffkern.nn.weights.diffusers_config_back import to_theirs as config_to

if TYPE_CHECKING:
    from diffkern.nn.unet import UNet
    from diffkern.nn.unet_config import UNetConfig

__all__ = ["config_from", "config_to", "export", "from_folder", "keys", "load", "to_folder"]

_CLASSES = "classes.weight"
_QKV = ("to_q", "to_k", "to_v")
_BLOCK = {"modulate": ("time_emb_proj",), "skip": ("conv_shortcut",)}
_ATTENTION = {"norm": ("group_norm",), "qkv": _QKV, "proj_out": ("to_out.0",)}
_TRANSFORMER = {
    "enter": ("proj_in",),
    "leave": ("proj_out",),
    "qkv": tuple(f"attn1.{name}" for name in _QKV),
    "out1": ("attn1.to_out.0",),
    "q": ("attn2.to_q",),
    "kv": ("attn2.to_k", "attn2.to_v"),
    "out2": ("attn2.to_out.0",),
    "ff_enter": ("ff.net.0.proj",),
    "ff_leave": ("ff.net.2",),
}
_OUTER = {
    "time.0": "time_embedding.linear_1",
    "time.2": "time_embedding.linear_2",
    "enter": "conv_in",
    "norm": "conv_norm_out",
    "leave": "conv_out",
}
_PLACES = (  # where a block stands here and there
    (re.compile(r"(down|up)\.(\d+)\.blocks\.(\d+)\.block\."), r"\1_blocks.\2.resnets.\3."),
    (re.compile(r"(down|up)\.(\d+)\.blocks\.(\d+)\.attention\."), r"\1_blocks.\2.attentions.\3."),
    (re.compile(r"(down|up)\.(\d+)\.resample\."), r"\1_blocks.\2.\1samplers.0."),
    (re.compile(r"middle\.(\d)\.block\."), r"mid_block.resnets.\1."),
    (re.compile(r"middle\.0\.attention\."), r"mid_block.attentions.0."),
)
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")


def keys(network: UNet, linear_projection: bool = False, null_class: bool = False) -> list[Key]:
    """The map of a network of ours.

    ``linear_projection``: their config's `use_linear_projection`; ``null_class``: whether their classes end in ours
    for "no class".
    """
    found = [_key(name, network.config, linear_projection) for name in network.state_dict() if name != _CLASSES]
    if network.classes is not None:
        found.append(Key(_CLASSES, ("class_embedding.weight",), table=None if null_class else "rows"))
    return found


def _key(name: str, config: UNetConfig, linear_projection: bool) -> Key:
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return Key(name, (f"{_OUTER[module]}.{kind}",))
    if module.startswith("vector."):
        there = "add_embedding" if config.ids else "class_embedding"
        return Key(name, (f"{there}.linear_{1 if module == 'vector.0' else 2}.{kind}",))
    found = [(match, place) for pattern, place in _PLACES if (match := pattern.match(name))]
    if not found:
        raise ValueError(f"every weight must have a place in diffusers' UNets, got {name}")
    match, place = found[0]
    prefix, inner = match.expand(place), module[match.end() :]
    if ".attentions." not in prefix:
        axes = 2 if inner == "skip" and kind == "weight" else None
        return Key(name, tuple(f"{prefix}{there}.{kind}" for there in _BLOCK.get(inner, (inner,))), axes)
    if not config.context_channels:
        axes = 0 if kind == "weight" and inner != "norm" else None
        return Key(name, tuple(f"{prefix}{there}.{kind}" for there in _ATTENTION[inner]), axes)
    layer = re.match(r"blocks\.(\d+)\.", inner)
    if layer:
        prefix, inner = f"{prefix}transformer_blocks.{layer[1]}.", inner[layer.end() :]
    axes = (0 if linear_projection else 2) if kind == "weight" and inner in ("enter", "leave") else None
    return Key(name, tuple(f"{prefix}{there}.{kind}" for there in _TRANSFORMER.get(inner, (inner,))), axes)


def load(network: UNet, source: Source) -> None:
    """Their weights, a state dict or a file, into a network of ours, which takes their dtype.

    ValueError that lists every name which is missing, unknown or of another shape; the network is untouched then.
    """
    state = {OLD.sub(renamed, name): tensor for name, tensor in read_state(source).items()}
    classes = state.get("class_embedding.weight")
    fill(
        network,
        keys(
            network,
            linear_projection=any(t.dim() == 2 for name, t in state.items() if name.endswith(".proj_in.weight")),
            null_class=network.classes is not None and classes is not None and len(classes) > network.null_class,
        ),
        state,
    )


def renamed(match: re.Match[str]) -> str:
    return f"{match[1]}.{_RENAMED[match[2]]}.{match[3]}"


def export(network: UNet, linear_projection: bool = False) -> dict[str, Tensor]:
    """Their state dict of our network: `load`'s inverse, contiguous.

    "No class" is a class of its own there, the last, unless its row is zero, as that of weights which came from there.
    """
    return stored(to_theirs(keys(network, linear_projection, _knows_no_class(network)), network.state_dict()))


def _knows_no_class(network: UNet) -> bool:
    if network.classes is None or network.classes.weight.is_meta:
        return False
    return bool(network.classes.weight[-1].any())


def from_folder(
    path: str | os.PathLike[str],
    subfolder: str | None = None,
    *,
    variant: str | None = None,
    ids: int | None = None,
) -> UNet:
    """See `UNet.from_diffusers`."""
    from diffkern.nn.unet import UNet  # which calls this

    config, state = diffusers_folder.read(path, subfolder, variant)
    settings = config_from(config, ids)
    network = unfilled(lambda: UNet(settings))
    load(network, state)
    return network.eval()


def to_folder(network: UNet, path: str | os.PathLike[str], **fields: Any) -> None:
    """See `UNet.to_diffusers`."""
    if _knows_no_class(network):
        fields = {"num_class_embeds": network.null_class + 1, **fields}
    config = config_to(network.config, **fields)
    state = export(network, linear_projection=config.get("use_linear_projection", False))
    diffusers_folder.write(path, config, state)

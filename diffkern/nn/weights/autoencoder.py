"""Weights of diffusers' `AutoencoderKL` (SD, SDXL, SD 3, FLUX) and `VQModel` for `Autoencoder`, and back.

Names and shapes are those of diffusers 0.42, and those of attention before 2023, which old files have. Their q, k and
v, three layers, are one of ours; nothing is computed, so that a round trip gives the same bits.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffkern.nn.weights import diffusers_folder
from diffkern.nn.weights._keys import Key, Source, fill, read_state, stored, to_theirs, unfilled
from diffkern.nn.weights.autoencoder_config import to_ours as config_from
from diffkern.nn.weights.autoencoder_config import to_theirs as config_to
from diffkern.nn.weights.diffusers import OLD, renamed

if TYPE_CHECKING:
    from diffkern.nn.autoencoder import Autoencoder

__all__ = ["config_from", "config_to", "export", "from_folder", "keys", "load", "to_folder"]

CODES = "quantiser.codes"
_AVERAGES = ("quantiser.counts", "quantiser.sums", "quantiser.updates")
"""What our codes are averages of; diffusers keeps the codes alone."""
_OUTER = {"enter": "conv_in", "norm": "conv_norm_out", "leave": "conv_out"}
_BLOCK = {"skip": "conv_shortcut"}
_ATTENTION = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "proj_out": ("to_out.0",)}
_PLACES = (  # where a part stands here and there
    (re.compile(r"(en|de)coder\.(down|up)\.(\d+)\.blocks\.(\d+)\."), r"\1coder.\2_blocks.\3.resnets.\4."),
    (re.compile(r"(en|de)coder\.(down|up)\.(\d+)\.attentions\.(\d+)\."), r"\1coder.\2_blocks.\3.attentions.\4."),
    (re.compile(r"(en|de)coder\.(down|up)\.(\d+)\.resample\."), r"\1coder.\2_blocks.\3.\2samplers.0."),
)
_MIDDLE = re.compile(r"(en|de)coder\.middle\.(\d)\.")


def keys(network: Autoencoder) -> list[Key]:
    """The map of a network of ours."""
    return [_key(name, network.config.middle_attention) for name in network.state_dict()]


def _key(name: str, middle_attention: bool) -> Key:
    if name == CODES:
        return Key(name, ("quantize.embedding.weight",))
    if name in _AVERAGES or name.startswith(("quant_conv.", "post_quant_conv.")):
        return Key(name, (name,))
    module, _, kind = name.rpartition(".")
    half, _, part = module.partition(".")
    if part in _OUTER:
        return Key(name, (f"{half}.{_OUTER[part]}.{kind}",))
    middle = _MIDDLE.match(name)
    if middle:
        last = 2 if middle_attention else 1
        attends = middle_attention and middle[2] == "1"
        place = "attentions.0." if attends else f"resnets.{int(int(middle[2]) == last)}."
        prefix, inner = f"{half}.mid_block.{place}", module[middle.end() :]
    else:
        match, place = next((m, to) for pattern, to in _PLACES if (m := pattern.match(name)))
        prefix, inner = match.expand(place), module[match.end() :]
    if ".attentions." not in prefix:
        return Key(name, (f"{prefix}{_BLOCK.get(inner, inner)}.{kind}",))
    axes = 0 if kind == "weight" and inner != "norm" else None
    return Key(name, tuple(f"{prefix}{there}.{kind}" for there in _ATTENTION[inner]), axes)


def load(network: Autoencoder, source: Source) -> None:
    """Their weights, a state dict or a file, into a network of ours, which takes their dtype.

    Codes that are averages begin with a count of 1 each. ValueError that lists every name which is missing, unknown or
    of another shape; the network is untouched then.
    """
    state = {OLD.sub(renamed, name): _flat(name, tensor) for name, tensor in read_state(source).items()}
    codes = state.get("quantize.embedding.weight")
    if codes is not None and _AVERAGES[0] in network.state_dict():
        averages = (torch.ones_like(codes[:, 0]), codes, torch.zeros(1, dtype=torch.int64))
        state |= dict(zip(_AVERAGES, averages, strict=True))
    fill(network, keys(network), state)


def _flat(name: str, tensor: Tensor) -> Tensor:
    """Attention's layers were 1 x 1 convolutions in the files of 2022."""
    flat = ".attentions." in name and tensor.dim() == 4 and tensor.shape[2:] == (1, 1)
    return tensor[:, :, 0, 0] if flat else tensor


def export(network: Autoencoder) -> dict[str, Tensor]:
    """Their state dict of our network: `load`'s inverse, contiguous; ValueError for options that they do not have."""
    config_to(network.config)
    found = stored(to_theirs(keys(network), network.state_dict()))
    return {name: tensor for name, tensor in found.items() if name not in _AVERAGES}


def from_folder(
    path: str | os.PathLike[str], subfolder: str | None = None, *, variant: str | None = None
) -> Autoencoder:
    """See `Autoencoder.from_diffusers`."""
    from diffkern.nn.autoencoder import Autoencoder  # which calls this

    config, state = diffusers_folder.read(path, subfolder, variant, "vae")
    settings = config_from(config)
    network = unfilled(lambda: Autoencoder(settings))
    load(network, state)
    return network.eval()


def to_folder(network: Autoencoder, path: str | os.PathLike[str], **fields: Any) -> None:
    """See `Autoencoder.to_diffusers`."""
    diffusers_folder.write(path, config_to(network.config, **fields), export(network))

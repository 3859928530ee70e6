"""Weights of the DiT of Peebles & Xie 2023: its authors' checkpoints and diffusers' `DiTTransformer2DModel`, and back.

    load(source)                 a `DiT` with the weights of an authors' checkpoint; export(network) is the inverse
    from_folder(path)            one with those of a folder of diffusers; also `DiT.from_diffusers`
    load_diffusers(state, config), export_diffusers(network) -> (state, config)

Nothing is computed with the weights, so a round trip gives the same bits. Both compute the same function, but for the
sinusoids of the time (diffusers' frequencies are spaced by 1 / 127, the authors' by 1 / 128) and an eps of diffusers:
the configuration says which.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkern.nn.dit import DiT
from diffkern.nn.dit_config import DiTConfig
from diffkern.nn.weights import diffusers_folder
from diffkern.nn.weights._keys import Key, Source, fill, read_state, stored, to_theirs, unfilled
from diffkern.records import shown

__all__ = ["diffusers_config", "export", "export_diffusers", "from_folder", "load", "load_diffusers", "original_config"]

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Of the published widths: a checkpoint of the authors does not say."""
_ORIGINAL = {"qkv": "attn.qkv", "out": "attn.proj", "mlp_enter": "mlp.fc1", "mlp_leave": "mlp.fc2"}
_DIFFUSERS = {
    "out": "attn1.to_out.0",
    "mlp_enter": "ff.net.0.proj",
    "mlp_leave": "ff.net.2",
    "modulate": "norm1.linear",
}
_KINDS = ("weight", "bias")


# ------------------------------------------------------------------------------------------------- the authors' names
def original_config(state: Mapping[str, Tensor], heads: int | None = None, **fields: Any) -> DiTConfig:
    """The configuration of an authors' checkpoint, by its shapes; ``fields`` of `DiTConfig` come first.

    ``heads``: that of the published width unless given. ValueError where the shapes are missing or fit no DiT.
    """
    names = {
        "patches": "x_embedder.proj.weight",
        "positions": "pos_embed",
        "times": "t_embedder.mlp.0.weight",
        "classes": "y_embedder.embedding_table.weight",
        "mlp": "blocks.0.mlp.fc1.weight",
        "last": "final_layer.linear.weight",
    }
    missing = [name for name in names.values() if name not in state]
    if missing:
        raise ValueError(f"weights must be those of a DiT, with {', '.join(names.values())}, got none of {missing}")
    shapes = {key: tuple(state[name].shape) for key, name in names.items()}
    width, channels, patch = (*shapes["patches"], 0, 0, 0)[:3]
    side = round(shapes["positions"][-2] ** 0.5) if len(shapes["positions"]) == 3 else 0
    if heads is None and width not in HEADS:
        raise ValueError(f"heads must be given, as {width} is no width of the paper's, got none")
    known: dict[str, Any] = {
        "image_size": side * patch,
        "patch": patch,
        "in_channels": channels,
        "learned_variance": shapes["last"][0] == 2 * channels * patch**2,
        "width": width,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "heads": heads or HEADS[width],
        "mlp_ratio": shapes["mlp"][0] / max(width, 1),
        "classes": shapes["classes"][0] - 1,
        "time_channels": shapes["times"][1],
    }
    return DiTConfig(**{**known, **fields})


def _original_keys(config: DiTConfig) -> Iterator[Key]:
    if config.own_embeddings or not config.qkv_bias or config.classes == 0:
        raise ValueError(
            "network must have classes, a bias of qkv and one embedding of time and class, as the authors' has, got "
            f"classes={config.classes}, qkv_bias={config.qkv_bias}, own_embeddings={config.own_embeddings}"
        )
    modules = {
        "enter": "x_embedder.proj",
        "time.0": "t_embedder.mlp.0",
        "time.2": "t_embedder.mlp.2",
        "modulate": "final_layer.adaLN_modulation.1",
        "leave": "final_layer.linear",
    }
    for i in range(config.depth):
        modules |= {f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for ours, theirs in _ORIGINAL.items()}
        modules[f"blocks.{i}.modulate"] = f"blocks.{i}.adaLN_modulation.1"
    yield Key("positions", ("pos_embed",))
    yield Key("classes.weight", ("y_embedder.embedding_table.weight",))
    for ours, theirs in modules.items():
        yield from (Key(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in _KINDS)


def load(source: Source, heads: int | None = None, **fields: Any) -> DiT:
    """A `DiT` with the weights of an authors' checkpoint, a state dict or a file of one; for evaluation.

    The configuration is that of the shapes (`original_config`). ValueError that lists every name which is missing,
    unknown or of another shape.
    """
    state = read_state(source)
    network = _unfilled(original_config(state, heads, **fields))
    fill(network, _original_keys(network.config), state)
    return network.eval()


def export(network: DiT) -> dict[str, Tensor]:
    """The authors' state dict of our network: the inverse of `load`, contiguous.

    ValueError for a network that theirs is not: without classes, say.
    """
    return stored(to_theirs(_original_keys(network.config), network.state_dict()))


# -------------------------------------------------------------------------------------------------- diffusers' names
_FIXED: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
_SIZES = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
"""What decides the network there, and its defaults."""
_SAVED_POSITIONS = "pos_embed.pos_embed"
"""Fixed there as here; weights of diffusers before 0.22 have it."""
_WITHOUT_EFFECT = ("norm_num_groups", "upcast_attention")


def diffusers_config(config: Mapping[str, Any], own_embeddings: bool = False) -> DiTConfig:
    """The configuration of a `DiTTransformer2DModel` by its config.json.

    ``own_embeddings``: whether the embeddings of its blocks differ, which the weights say. ValueError for another
    class, for a name that it does not have, and for options without a `DiT`.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be an object, got {shown(config)}")
    kind = config.get("_class_name", "DiTTransformer2DModel")
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel"):  # what it was called before diffusers 0.29
        raise ValueError(f"_class_name must be DiTTransformer2DModel, got {shown(kind)}")
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    if kind == "Transformer2DModel":
        _only_dit(given)
    unknown = [name for name in given if name not in (*_FIXED, *_SIZES, *_WITHOUT_EFFECT)]
    if unknown:
        raise ValueError(f"config must have the names of DiTTransformer2DModel, got {', '.join(unknown)}")
    for name, value in _FIXED.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r}, as in the paper, got {shown(given[name])}")
    found = {**_SIZES, **given}
    channels = found["in_channels"]
    out = channels if found["out_channels"] is None else found["out_channels"]
    if out not in (channels, 2 * channels):
        raise ValueError(f"out_channels must be in_channels or twice that, {channels} or {2 * channels}, got {out}")
    return DiTConfig.from_dict(
        {
            "image_size": found["sample_size"],
            "patch": found["patch_size"],
            "in_channels": channels,
            "learned_variance": out != channels,
            "width": found["num_attention_heads"] * found["attention_head_dim"],
            "depth": found["num_layers"],
            "heads": found["num_attention_heads"],
            "qkv_bias": found["attention_bias"],
            "classes": found["num_embeds_ada_norm"],
            "own_embeddings": own_embeddings,
            "mlp_eps": found["norm_eps"],
            "dropout": found["dropout"],
            "time_freq_shift": 1.0,
        }
    )


def _only_dit(given: dict[str, Any]) -> None:
    """Takes what a general transformer's config says beside, as long as it says nothing."""
    beside = {
        "num_vector_embeds": None,
        "cross_attention_dim": None,
        "use_linear_projection": False,
        "only_cross_attention": False,
        "double_self_attention": False,
        "attention_type": "default",
        "caption_channels": None,
        "interpolation_scale": None,
        "use_additional_conditions": None,
    }
    for name, value in beside.items():
        if given.pop(name, value) != value:
            raise ValueError(f"{name} must be {value!r} for a DiT, got another")


def _embedding(i: int) -> dict[str, str]:
    """Their embedding of time and class in block i, by the names of ours."""
    there = f"transformer_blocks.{i}.norm1.emb"
    return {
        "time.0.weight": f"{there}.timestep_embedder.linear_1.weight",
        "time.0.bias": f"{there}.timestep_embedder.linear_1.bias",
        "time.2.weight": f"{there}.timestep_embedder.linear_2.weight",
        "time.2.bias": f"{there}.timestep_embedder.linear_2.bias",
        "classes.weight": f"{there}.class_embedder.embedding_table.weight",
    }


def _shares(state: Mapping[str, Tensor], depth: int) -> bool:
    """Whether every block has the same embedding of time and class, as the published weights have."""
    for ours, first in _embedding(0).items():
        others = [state[name] for i in range(1, depth) if (name := _embedding(i)[ours]) in state]
        if first in state and not all(torch.equal(state[first], other) for other in others):
            return False
    return True


def _diffusers_keys(config: DiTConfig, state: Mapping[str, Tensor], ours: bool) -> Iterator[Key]:
    """``state``: theirs, or (``ours``) ours, where the tensors are that every block there has a copy of."""
    yield Key("positions", ("positions",))  # computed there: see `load_diffusers`
    modules = {"enter": "pos_embed.proj", "modulate": "proj_out_1", "leave": "proj_out_2"}
    for i in range(config.depth):
        there = f"transformer_blocks.{i}"
        modules |= {f"blocks.{i}.{name}": f"{there}.{theirs}" for name, theirs in _DIFFUSERS.items()}
        for kind in _KINDS if config.qkv_bias else _KINDS[:1]:
            yield Key(f"blocks.{i}.qkv.{kind}", tuple(f"{there}.attn1.to_{part}.{kind}" for part in "qkv"))
        for name, theirs in _embedding(i).items():
            if i == 0 or config.own_embeddings:
                yield Key(f"blocks.{i}.{name}" if i else name, (theirs,))
                continue
            copied = state.get(name if ours else _embedding(0)[name])
            if copied is not None:
                yield Key(None, (theirs,), value=copied if ours else copied.cpu())
    for name, theirs in modules.items():
        yield from (Key(f"{name}.{kind}", (f"{theirs}.{kind}",)) for kind in _KINDS)


def load_diffusers(source: Source, config: Mapping[str, Any]) -> DiT:
    """A `DiT` with the weights of a `DiTTransformer2DModel`, its state dict or a file of it; for evaluation.

    Every block there has an embedding of time and class; where all are equal, as in the published weights, ours has
    one, else as many (``config.own_embeddings``). ValueError as of `diffusers_config`, and one that lists every name
    which is missing, unknown or of another shape.
    """
    state = read_state(source)
    found = diffusers_config(config)
    positions = state.pop(
        _SAVED_POSITIONS, DiT.positions_of(found).to(next(iter(state.values()), torch.empty(0)).dtype)
    )
    if not _shares(state, found.depth):
        found = diffusers_config(config, own_embeddings=True)
    network = _unfilled(found)
    fill(network, _diffusers_keys(found, state, ours=False), {**state, "positions": positions})
    return network.eval()


def export_diffusers(network: DiT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the config.json of a `DiTTransformer2DModel` that is our network: `load_diffusers` back.

    ValueError for a network that theirs is not.
    """
    config, state = network.config, network.state_dict()
    height, width = config.size
    fits = {
        "image_size": height == width,
        "mlp_ratio": config.mlp_ratio == 4.0,
        "classes": config.classes > 0,
        "time_channels": config.time_channels == 256,
        "embedding": config.embedding in (None, config.width),
        "eps": config.eps == 1e-6,
        "time_freq_shift": config.time_freq_shift == 1.0,
        "time_scale": config.time_scale == 1.0,
    }
    wrong = [f"{name}={getattr(config, name)}" for name, fit in fits.items() if not fit]
    if wrong:
        raise ValueError(
            "network must be square, with mlp_ratio 4, classes, 256 time_channels, an embedding as wide as it is, eps "
            f"1e-6, time_freq_shift 1 and time_scale 1, as diffusers' is, got {', '.join(wrong)}"
        )
    made = stored(to_theirs(_diffusers_keys(config, state, ours=True), state))
    del made["positions"]
    described = {
        "_class_name": "DiTTransformer2DModel",
        **_FIXED,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "dropout": config.dropout,
        "attention_bias": config.qkv_bias,
        "sample_size": height,
        "patch_size": config.patch,
        "num_embeds_ada_norm": config.classes,
        "norm_eps": config.eps if config.mlp_eps is None else config.mlp_eps,
    }
    return made, described


def from_folder(path: str | os.PathLike[str], subfolder: str | None = None, *, variant: str | None = None) -> DiT:
    """See `DiT.from_diffusers`."""
    folder = Path(path)
    if subfolder is None and (folder / "model_index.json").is_file() and not (folder / "config.json").is_file():
        subfolder = "transformer"
    config, state = diffusers_folder.read(path, subfolder, variant)
    return load_diffusers(state, config)


def to_folder(network: DiT, path: str | os.PathLike[str]) -> None:
    """See `DiT.to_diffusers`."""
    state, config = export_diffusers(network)
    diffusers_folder.write(path, config, state)


def _unfilled(config: DiTConfig) -> DiT:
    return unfilled(lambda: DiT(config))

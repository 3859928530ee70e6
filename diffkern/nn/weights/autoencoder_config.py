"""config.json of diffusers' `AutoencoderKL` and `VQModel` as an `AutoencoderConfig`, and back.

Each class has its fields here with diffusers' defaults and with the values that we have networks for: a literal type
names all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from diffkern import records
from diffkern.nn.autoencoder_config import AutoencoderConfig

__all__ = ["AutoencoderKL", "VQModel", "read", "to_ours", "to_theirs"]

Down = Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
Up = Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]
EPS = 1e-6
"""Of every norm there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model:
    """What both classes have."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[Down, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Up, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: Literal["silu", "swish"] = "silu"
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float | None = 0.18215
    mid_block_add_attention: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKL(_Model):
    """diffusers' fields of this name, the defaults of diffusers 0.42, the values that we have."""

    latent_channels: int = 4
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool | float = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQModel(_Model):
    """diffusers' fields of this name, the defaults of diffusers 0.42, the values that we have."""

    latent_channels: int = 3
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None
    norm_type: Literal["group"] = "group"
    lookup_from_codebook: bool = False
    force_upcast: bool | float = False


Theirs = AutoencoderKL | VQModel
CLASSES: dict[str, type[Theirs]] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
"""By the name that config.json has as ``_class_name``."""


def read(data: Mapping[str, Any]) -> Theirs:
    """The fields of a config.json, those that it lacks at diffusers' defaults.

    ValueError in one sentence for another class, an unknown field, and a value of a field that we have no network for.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"config must be an object, got {records.shown(data)}")
    name = data.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"_class_name must be one of {', '.join(CLASSES)}, got {records.shown(name)}")
    fields = {field: value for field, value in data.items() if not field.startswith("_")}
    theirs = records.record(CLASSES[name], fields, f"{name}.")
    levels = len(theirs.block_out_channels)
    for field in ("down_block_types", "up_block_types"):
        if len(getattr(theirs, field)) != levels:
            raise _refused(theirs, field, f"one value a level, {levels}")
    if theirs.out_channels != theirs.in_channels:
        raise _refused(theirs, "out_channels", f"in_channels, {theirs.in_channels}")
    if not levels or min(theirs.block_out_channels) < 1:
        raise _refused(theirs, "block_out_channels", "positive, one a level")
    if theirs.norm_num_groups < 1 or any(width % theirs.norm_num_groups for width in theirs.block_out_channels):
        raise _refused(theirs, "norm_num_groups", f"a divisor of block_out_channels {theirs.block_out_channels}")
    return theirs


def _refused(theirs: Any, field: str, rule: str) -> ValueError:
    return ValueError(f"{type(theirs).__name__}.{field} must be {rule}, got {records.shown(getattr(theirs, field))}")


def _attention_levels(theirs: Theirs) -> tuple[int, ...]:
    down, up = (
        [level for level, kind in enumerate(kinds) if kind.startswith("Attn")]
        for kinds in (theirs.down_block_types, theirs.up_block_types[::-1])
    )
    if down != up:
        rule = f"with attention at the levels where down_block_types have it, {theirs.down_block_types}"
        raise _refused(theirs, "up_block_types", rule)
    return tuple(down)


def to_ours(data: Mapping[str, Any]) -> AutoencoderConfig:
    """The `AutoencoderConfig` of a config.json of theirs: errors of `read`, and of `AutoencoderConfig`."""
    theirs = read(data)
    widths, size = theirs.block_out_channels, theirs.sample_size
    channels = math.gcd(*widths) if any(width % widths[0] for width in widths) else widths[0]
    divisor = 2 ** (len(widths) - 1)
    fits = all(n > 0 and n % divisor == 0 for n in (size if isinstance(size, tuple) else (size,)))
    found: dict[str, Any] = {
        "image_size": size if fits else None,
        "in_channels": theirs.in_channels,
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "blocks": theirs.layers_per_block,
        "groups": theirs.norm_num_groups,
        "eps": EPS,
        "attention_levels": _attention_levels(theirs),
        "middle_attention": theirs.mid_block_add_attention,
        "latent_channels": theirs.latent_channels,
        "scale": 1.0 if theirs.scaling_factor is None else theirs.scaling_factor,
        "upcast": bool(theirs.force_upcast),
    }
    if isinstance(theirs, VQModel):
        found |= {
            "regularisation": "vq",
            "codes": theirs.num_vq_embeddings,
            "code_channels": theirs.vq_embed_dim,
            "decay": None,
        }
        return AutoencoderConfig(**found)
    return AutoencoderConfig(
        **found | _scale(theirs), quant_conv=theirs.use_quant_conv, post_quant_conv=theirs.use_post_quant_conv
    )


def _scale(theirs: AutoencoderKL) -> dict[str, Any]:
    """Of diffusion's latents: (z - shift) factor, or with numbers for each channel (z - mean) factor / std."""
    factor = 1.0 if theirs.scaling_factor is None else theirs.scaling_factor
    mean, std = theirs.latents_mean, theirs.latents_std
    if mean is None and std is None:
        return {"scale": factor, "shift": theirs.shift_factor or 0.0}
    if mean is None or std is None:
        raise _refused(theirs, "latents_std" if std is None else "latents_mean", "given where the other one is")
    if min(std, default=1.0) <= 0.0:
        raise _refused(theirs, "latents_std", "positive")
    return {"scale": tuple(factor / each for each in std), "shift": mean}


def to_theirs(config: AutoencoderConfig, **fields: Any) -> dict[str, Any]:
    """A config.json of theirs for an autoencoder of ours: `AutoencoderKL` of "kl", `VQModel` of "vq".

    ``fields``: others of theirs, such as sample_size. ValueError in one sentence for an option that they do not have.
    """
    if config.regularisation not in ("kl", "vq"):
        raise _unknown("regularisation", '"kl" or "vq"', config)
    quantises = config.regularisation == "vq"
    whose = "VQModel" if quantises else "AutoencoderKL"
    if config.eps != EPS:
        raise _unknown("eps", f"{EPS} for diffusers' {whose}", config)
    if any(width % config.groups for width in config.widths):
        raise _unknown("groups", f"a divisor of the channels {config.widths} for diffusers' {whose}", config)
    kinds = ["Attn" if level in config.attention_levels else "" for level in range(len(config.multipliers))]
    found: dict[str, Any] = {
        "_class_name": whose,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in kinds[::-1]],
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.middle_attention,
        "force_upcast": config.upcast,
    }
    if config.image_size is not None:
        found["sample_size"] = config.image_size
    scale, shift = config.scale, config.shift
    if quantises:
        if not (config.quant_conv and config.post_quant_conv):
            raise _unknown("quant_conv" if config.post_quant_conv else "post_quant_conv", "True for a VQModel", config)
        if isinstance(scale, tuple) or shift != 0.0:
            name = "scale" if isinstance(scale, tuple) else "shift"
            raise _unknown(name, "one number for a VQModel" if name == "scale" else "0 for a VQModel", config)
        found |= {"scaling_factor": scale, "num_vq_embeddings": config.codes, "vq_embed_dim": config.z_channels}
    else:
        found |= {"use_quant_conv": config.quant_conv, "use_post_quant_conv": config.post_quant_conv}
        if isinstance(scale, tuple) or isinstance(shift, tuple):
            scales = scale if isinstance(scale, tuple) else (scale,) * config.z_channels
            shifts = shift if isinstance(shift, tuple) else (shift,) * config.z_channels
            found |= {
                "scaling_factor": 1.0,
                "latents_mean": list(shifts),
                "latents_std": [1.0 / each for each in scales],
            }
        else:
            found |= {"scaling_factor": scale, "shift_factor": shift or None}
    read(found | fields)
    return found | fields


def _unknown(field: str, rule: str, config: AutoencoderConfig) -> ValueError:
    return ValueError(f"AutoencoderConfig.{field} must be {rule}, got {records.shown(getattr(config, field))}")

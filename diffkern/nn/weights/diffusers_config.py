"""config.json of diffusers' `UNet2DModel` and `UNet2DConditionModel` as a `UNetConfig`.

Each class has its fields here with diffusers' defaults and with the values that we have networks for: a literal type
names all of them. What a field means to us is in `_shared`, `_plain` and `_conditional`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from diffkern import records
from diffkern.nn.heads import count_heads
from diffkern.nn.unet_config import UNetConfig

Down = Literal["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
Up = Literal["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]
CrossDown = Literal["DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"]
CrossUp = Literal["UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"]
Sizes = int | tuple[int, ...]
_EMA = {
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
}
"""What diffusers' `EMAModel` adds to the config.json of the network that it averages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model:
    """What both classes have."""

    sample_size: Sizes | None = None
    center_input_sample: Literal[False] = False
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0.0
    flip_sin_to_cos: bool = True
    mid_block_scale_factor: float = 1.0
    downsample_padding: Literal[0, 1] = 1
    dropout: float = 0.0
    act_fn: Literal["silu", "swish"] = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    num_class_embeds: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DModel(_Model):
    """diffusers' fields of this name, the defaults of diffusers 0.42, the values that we have."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[Down, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: Literal["UNetMidBlock2D"] = "UNetMidBlock2D"
    up_block_types: tuple[Up, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    downsample_type: Literal["conv", "resnet"] = "conv"
    upsample_type: Literal["conv", "resnet"] = "conv"
    attention_head_dim: int | None = 8
    attn_norm_num_groups: int | None = None
    add_attention: bool = True
    class_embed_type: None = None
    num_train_timesteps: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DConditionModel(_Model):
    """diffusers' fields of this name, the defaults of diffusers 0.42, the values that we have."""

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[CrossDown, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[CrossUp, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    only_cross_attention: Literal[False] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: Sizes = 2
    cross_attention_dim: Sizes = 1280
    transformer_layers_per_block: Sizes = 1
    reverse_transformer_layers_per_block: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: Sizes = 8
    num_attention_heads: None = None
    dual_cross_attention: Literal[False] = False
    use_linear_projection: bool = False
    class_embed_type: Literal["projection"] | None = None
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: int | None = None
    upcast_attention: bool = False
    resnet_skip_time_act: Literal[False] = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_act_fn: None = None
    timestep_post_act: None = None
    time_cond_proj_dim: None = None
    conv_in_kernel: Literal[3] = 3
    conv_out_kernel: Literal[3] = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] = False
    mid_block_only_cross_attention: Literal[False] | None = None
    cross_attention_norm: None = None
    addition_embed_type_num_heads: int = 64


Theirs = UNet2DModel | UNet2DConditionModel
TRANSFORMER_EPS = 1e-6
"""Of the group norm before their transformer blocks."""

CLASSES: dict[str, type[Theirs]] = {
    "UNet2DModel": UNet2DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
}
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
    fields = {field: value for field, value in data.items() if not field.startswith("_") and field not in _EMA}
    for field in ("down_block_types", "up_block_types"):  # of 2022: UNetResDownBlock2D for DownBlock2D
        if isinstance(fields.get(field), list | tuple):
            kinds = fields[field]
            fields[field] = [kind.removeprefix("UNetRes") if isinstance(kind, str) else kind for kind in kinds]
    theirs = records.record(CLASSES[name], fields, f"{name}.")
    levels = len(theirs.block_out_channels)
    for field, value in vars(theirs).items():
        if isinstance(value, tuple) and field != "sample_size" and len(value) != levels:
            raise _refused(theirs, field, f"one value a level, {levels}")
        if field in ("mid_block_scale_factor", "resnet_out_scale_factor") and value != 1.0:
            raise _refused(theirs, field, "1")
    return theirs


def _refused(theirs: Any, field: str, rule: str) -> ValueError:
    return ValueError(f"{type(theirs).__name__}.{field} must be {rule}, got {records.shown(getattr(theirs, field))}")


def to_ours(data: Mapping[str, Any], ids: int | None = None) -> UNetConfig:
    """The `UNetConfig` of a config.json of theirs.

    ``ids``: how many numbers go with the pooled text of SDXL, which config.json does not say; left out 6, and 5 for
    SDXL's refiner. Errors of `read`; ValueError for what `UNetConfig` refuses.
    """
    theirs = read(data)
    own = _plain(theirs) if isinstance(theirs, UNet2DModel) else _conditional(theirs, ids)
    return UNetConfig(**_shared(theirs), **own)


def _shared(theirs: Theirs) -> dict[str, Any]:
    """What both classes mean alike."""
    widths = theirs.block_out_channels
    if not widths or min(widths) < 1:
        raise _refused(theirs, "block_out_channels", "positive, one a level")
    if theirs.norm_num_groups < 1 or any(width % theirs.norm_num_groups for width in widths):
        raise _refused(theirs, "norm_num_groups", f"a divisor of block_out_channels {widths}")
    channels = math.gcd(*widths) if any(width % widths[0] for width in widths) else widths[0]
    embedding = theirs.time_embedding_dim or 4 * widths[0]
    concatenated = max(theirs.in_channels - theirs.out_channels, 0)
    state, divisor = theirs.in_channels - concatenated, 2 ** (len(widths) - 1)
    learned = theirs.out_channels == 2 * state
    size = theirs.sample_size
    sizes = size if isinstance(size, tuple) else (size or 0,)
    return {
        "image_size": size if all(n > 0 and n % divisor == 0 for n in sizes) else None,
        "in_channels": state,
        "out_channels": state if learned else theirs.out_channels,
        "learned_variance": learned,
        "concat_channels": concatenated,
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "blocks": theirs.layers_per_block,
        "attention_levels": _attention_levels(theirs),
        "embedding": None if embedding == 4 * channels else embedding,
        "time_channels": None if widths[0] == channels else widths[0],
        "time_sin_first": not theirs.flip_sin_to_cos,
        "time_freq_shift": theirs.freq_shift,
        "classes": (theirs.num_class_embeds or 0) if theirs.class_embed_type is None else 0,
        "modulation": "add" if theirs.resnet_time_scale_shift == "default" else "scale_shift",
        "resample": _resample(theirs),
        "downsample_padding": "symmetric" if theirs.downsample_padding else "asymmetric",
        "groups": theirs.norm_num_groups,
        "eps": theirs.norm_eps,
        "dropout": theirs.dropout,
    }


def _attention_levels(theirs: Theirs) -> tuple[int, ...]:
    down, up = (
        [level for level, kind in enumerate(kinds) if "Attn" in kind]
        for kinds in (theirs.down_block_types, theirs.up_block_types[::-1])
    )
    if down != up:
        rule = f"with attention at the levels where down_block_types have it, {theirs.down_block_types}"
        raise _refused(theirs, "up_block_types", rule)
    return tuple(down)


def _resample(theirs: Theirs) -> Literal["residual", "conv"]:
    """How every level but the last changes the resolution, on both ways: all alike in our networks."""
    found = set()
    for field, kinds in ("downsample_type", theirs.down_block_types), ("upsample_type", theirs.up_block_types):
        of_attention = getattr(theirs, field, "conv") == "resnet"  # of UNet2DModel's blocks with attention alone
        found |= {kind.startswith("Resnet") or (of_attention and "Attn" in kind) for kind in kinds[:-1]}
    if len(found) > 1:
        rule = "of blocks that all resample by convolutions, or all by residual blocks, as up_block_types"
        raise _refused(theirs, "down_block_types", rule)
    return "residual" if True in found else "conv"


def _plain(theirs: UNet2DModel) -> dict[str, Any]:
    attends = theirs.add_attention
    if attends and theirs.resnet_time_scale_shift == "scale_shift" and theirs.attn_norm_num_groups is None:
        rule = "norm_num_groups where resnet_time_scale_shift is 'scale_shift', as the middle has no norm without"
        raise _refused(theirs, "attn_norm_num_groups", rule)
    if attends and theirs.attn_norm_num_groups not in (None, theirs.norm_num_groups):
        raise _refused(theirs, "attn_norm_num_groups", f"norm_num_groups, {theirs.norm_num_groups}")
    levels = {*_attention_levels(theirs), *([len(theirs.block_out_channels) - 1] if attends else [])}
    width = theirs.attention_head_dim
    for level in levels:
        channels = theirs.block_out_channels[level]
        _check_heads(theirs, channels, 1 if width is None else channels / width if width else 0)
    return {
        "middle_attention": attends,
        **({"heads": 1} if width is None else {"head_channels": width}),
    }


def _conditional(theirs: UNet2DConditionModel, ids: int | None) -> dict[str, Any]:
    last = len(theirs.block_out_channels) - 1
    used = sorted({*_attention_levels(theirs), last})  # what holds for the last level holds for the middle
    depths, contexts = (
        value if isinstance(value, tuple) else (value,) * (last + 1)
        for value in (theirs.transformer_layers_per_block, theirs.cross_attention_dim)
    )
    if len({contexts[level] for level in used}) > 1 or contexts[last] < 1:
        raise _refused(theirs, "cross_attention_dim", "positive and the same at every level with attention")
    if min(depths[level] for level in used) < 1:
        raise _refused(theirs, "transformer_layers_per_block", "at least 1 at every level with attention")
    alike = len({depths[level] for level in used}) == 1
    return {
        "transformer_depth": depths[last] if alike else tuple(d if i in used else 0 for i, d in enumerate(depths)),
        "context_channels": contexts[last],
        "attention_eps": TRANSFORMER_EPS,
        **_heads(theirs, used),
        **_vector(theirs, ids),
    }


def _heads(theirs: UNet2DConditionModel, used: list[int]) -> dict[str, Any]:
    """What their attention_head_dim says: the number of heads, not their width (diffusers issue 2011)."""
    given, channels = theirs.attention_head_dim, theirs.block_out_channels
    counts = given if isinstance(given, tuple) else (given,) * len(channels)
    for level in used:
        _check_heads(theirs, channels[level], counts[level])
    if len({counts[level] for level in used}) == 1:
        return {"heads": counts[used[0]]}
    widths = {channels[level] // counts[level] for level in used}
    if len(widths) == 1:
        return {"head_channels": widths.pop()}
    raise _refused(theirs, "attention_head_dim", "one number of heads, or numbers that give all heads one width")


def _check_heads(theirs: Theirs, channels: int, heads: float) -> None:
    try:
        count_heads(channels, int(heads) if heads == int(heads) else 0)
    except ValueError:
        rule = f"a number that gives {channels} channels heads of a multiple of 8 channels up to 256, or of 512"
        raise _refused(theirs, "attention_head_dim", rule) from None


def _vector(theirs: UNet2DConditionModel, ids: int | None) -> dict[str, Any]:
    total, width = theirs.projection_class_embeddings_input_dim, theirs.addition_time_embed_dim
    if theirs.class_embed_type is None and theirs.addition_embed_type is None:
        return {}
    if theirs.class_embed_type is not None and theirs.addition_embed_type is not None:
        raise _refused(theirs, "addition_embed_type", f"None where class_embed_type is {theirs.class_embed_type!r}")
    if total is None:
        raise _refused(theirs, "projection_class_embeddings_input_dim", "given where a vector is embedded")
    if theirs.class_embed_type is not None:
        return {"vector_channels": total}
    if width is None:
        raise _refused(theirs, "addition_time_embed_dim", "given where addition_embed_type is 'text_time'")
    if ids is None:
        ids = 5 if total - 5 * width == 1280 else 6
    if ids < 1 or total < ids * width:
        rule = f"the width of a vector and of {ids} numbers, each {width}"
        raise _refused(theirs, "projection_class_embeddings_input_dim", rule)
    return {"vector_channels": total - ids * width, "ids": ids, "id_channels": width}

"""The arguments of EDM's networks (Karras et al. 2022) as configurations of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from diffkern.checks import misspelt
from diffkern.nn.unet_config import UNetConfig

__all__ = ["dhariwal_unet_config", "song_unet_config"]

_ELSEWHERE = (  # arguments of the preconditioners and of the training
    "M",
    "C_1",
    "C_2",
    "beta_d",
    "beta_min",
    "epsilon_t",
    "label_dropout",
    "model_type",
    "sigma_data",
    "sigma_max",
    "sigma_min",
    "use_fp16",
)


def song_unet_config(
    *,
    img_resolution: int,
    img_channels: int = 3,
    in_channels: int | None = None,
    out_channels: int | None = None,
    label_dim: int = 0,
    augment_dim: int = 0,
    model_channels: int = 128,
    channel_mult: Sequence[int] = (1, 2, 2, 2),
    channel_mult_emb: int = 4,
    num_blocks: int = 4,
    attn_resolutions: Sequence[int] = (16,),
    dropout: float = 0.10,
    embedding_type: Literal["positional", "fourier"] = "positional",
    channel_mult_noise: int = 1,
    encoder_type: Literal["standard", "residual"] = "standard",
    decoder_type: Literal["standard"] = "standard",
    resample_filter: Sequence[float] = (1, 1),
    **others: Any,
) -> UNetConfig:
    """The configuration of EDM's SongUNet with these arguments.

    `img_channels` is the preconditioner's, for both `in_channels` and `out_channels`. ValueError for the "skip" types
    of encoder and decoder, which none of EDM's networks has, and for sizes that fit no network; TypeError for an
    unknown argument.
    """
    _only_known("song_unet_config", others)
    for name, value, known in (
        ("embedding_type", embedding_type, ("positional", "fourier")),
        ("encoder_type", encoder_type, ("standard", "residual")),
        ("decoder_type", decoder_type, ("standard",)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
    return UNetConfig(
        **_shared(
            img_resolution,
            img_channels if in_channels is None else in_channels,
            img_channels if out_channels is None else out_channels,
            model_channels,
            channel_mult,
            attn_resolutions,
        ),
        enter_channels=model_channels,
        blocks=num_blocks,
        modulation="add",
        filter=tuple(float(tap) for tap in resample_filter),
        resampled_skip_conv=True,
        input_skips="residual" if encoder_type == "residual" else "none",
        residual_scale=math.sqrt(0.5),
        eps=1e-6,
        dropout=dropout,
        up_attention="last",
        heads=1,
        embedding=model_channels * channel_mult_emb,
        time_embedding="fourier" if embedding_type == "fourier" else "sinusoidal",
        time_channels=model_channels * channel_mult_noise,
        time_sin_first=True,
        time_freq_shift=1.0 if embedding_type == "positional" else 0.0,
        classes=label_dim,
        class_place="before",
        class_scale=math.sqrt(label_dim) if label_dim else 1.0,
        class_bias=bool(label_dim),
        augment_channels=augment_dim,
    )


def dhariwal_unet_config(
    *,
    img_resolution: int,
    img_channels: int = 3,
    in_channels: int | None = None,
    out_channels: int | None = None,
    label_dim: int = 0,
    augment_dim: int = 0,
    model_channels: int = 192,
    channel_mult: Sequence[int] = (1, 2, 3, 4),
    channel_mult_emb: int = 4,
    num_blocks: int = 3,
    attn_resolutions: Sequence[int] = (32, 16, 8),
    dropout: float = 0.10,
    **others: Any,
) -> UNetConfig:
    """The configuration of EDM's DhariwalUNet with these arguments; ValueError and TypeError as of
    `song_unet_config`."""
    _only_known("dhariwal_unet_config", others)
    return UNetConfig(
        **_shared(
            img_resolution,
            img_channels if in_channels is None else in_channels,
            img_channels if out_channels is None else out_channels,
            model_channels,
            channel_mult,
            attn_resolutions,
        ),
        blocks=num_blocks,
        dropout=dropout,
        head_channels=64,
        embedding=model_channels * channel_mult_emb,
        classes=label_dim,
        augment_channels=augment_dim,
    )


def _shared(
    img_resolution: int,
    in_channels: int,
    out_channels: int,
    model_channels: int,
    channel_mult: Sequence[int],
    attn_resolutions: Sequence[int],
) -> dict[str, Any]:
    levels = range(len(channel_mult))
    return {
        "image_size": img_resolution,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "channels": model_channels,
        "multipliers": tuple(channel_mult),
        "groups": 32,
        "group_channels": 4,
        "attention_levels": tuple(level for level in levels if img_resolution >> level in attn_resolutions),
    }


def _only_known(function: str, others: dict[str, Any]) -> None:
    for name in others:
        if name not in _ELSEWHERE:
            raise TypeError(misspelt(function, name, _ELSEWHERE))

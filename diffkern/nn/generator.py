"""The generator of a GAN: normals to images, by transposed convolutions or by repetition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.nn.adversarial_config import GeneratorConfig
from diffkern.nn.conditions import check_unconditional, embed_classes
from diffkern.nn.convolution import convolve
from diffkern.nn.norm import GroupNormAct, count_groups

STD = 0.02
"""Of the weights' first values (arXiv 1511.06434, section 4)."""


def start_weights(network: nn.Module) -> None:
    """Convolutions and linear layers start as N(0, 0.02^2), biases as 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, std=STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class NormAct(nn.Module):
    """Normalisation, a class's scale and shift where it has one, activation: [B, C, H, W] of the same shape."""

    def __init__(self, config: GeneratorConfig, channels: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.norm: nn.Module
        if config.norm == "group":
            groups = count_groups(channels, config.groups)
            self.norm = GroupNormAct(groups, channels, config.eps, silu=config.activation == "silu")
        else:
            self.norm = nn.Identity() if config.norm == "none" else nn.BatchNorm2d(channels, config.eps)
        self.modulate = None
        if config.condition == "modulation":
            self.modulate = nn.Linear(config.embedding, 2 * channels)

    def forward(self, x: Tensor, vector: Tensor | None) -> Tensor:
        scale, shift = (None, None) if self.modulate is None else self.modulate(vector).chunk(2, dim=1)
        if isinstance(self.norm, GroupNormAct):
            h = self.norm(x, scale=scale, shift=shift)
            return h if self.activation == "silu" else F.relu(h)
        h = self.norm(x)
        if scale is not None and shift is not None:
            h = torch.addcmul(shift[:, :, None, None], h, 1.0 + scale[:, :, None, None])
        return F.silu(h) if self.activation == "silu" else F.relu(h)


class Double(nn.Module):
    """Twice the height and the width: [B, C_in, H, W] to [B, C_out, 2 H, 2 W]."""

    def __init__(self, config: GeneratorConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.repeats = config.resample == "nearest"
        self.conv: nn.Module
        if self.repeats:
            self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        else:
            self.conv = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.repeats:
            return convolve(self.conv, x, upsample=True)
        found: Tensor = self.conv(x)
        return found


class Generator(nn.Module):
    """G(z): ``model(z, cond)`` with z [B, latent_channels] of standard normals to images [B, C, H, W] in [-1, 1].

    The generator of DCGAN (Radford et al. 2015, arXiv 1511.06434; lecture 000), sizes and normalisation by `config`: z
    is laid out on the start size by a linear layer, every level normalises, activates and doubles the size, and tanh
    ends it. ``cond``: classes int64 [B] in 0..classes - 1 where the configuration has a condition, else None. With
    group norm or none each image is made of its own z and class alone, in training too. ValueError for z of another
    shape or dtype, a condition that is missing or not wanted, and classes outside.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        beside = {"concatenation": config.classes, "embedding": config.embedding}.get(config.condition, 0)
        self.embed = None
        if config.condition in ("embedding", "modulation"):
            self.embed = nn.Embedding(config.classes, config.embedding)
        height, width = config.start
        self.enter = nn.Linear(config.latent_channels + beside, widths[-1] * height * width)
        self.norms = nn.ModuleList(NormAct(config, width) for width in reversed(widths))
        outputs = [*reversed(widths[:-1]), config.out_channels]
        self.doubles = nn.ModuleList(
            Double(config, before, after) for before, after in zip(reversed(widths), outputs, strict=True)
        )
        start_weights(self)

    @property
    def latent_channels(self) -> int:
        """Numbers of z."""
        return self.config.latent_channels

    def forward(self, z: Tensor, cond: Any = None) -> Tensor:
        config, weight = self.config, self.enter.weight
        _check_latents(z, config.latent_channels, weight)
        vector = None
        if config.condition == "none":
            check_unconditional(cond)
        elif self.embed is None:
            vector = embed_classes(self._one_hot, config.classes - 1, cond, z.shape[0], weight.device, none=False)
        else:
            vector = embed_classes(self.embed, config.classes - 1, cond, z.shape[0], weight.device, none=False)
        if vector is not None and config.condition != "modulation":
            z = torch.cat([z, vector.to(z.dtype)], dim=1)
        h = self.enter(z).unflatten(1, (-1, *config.start))
        for norm, double in zip(self.norms, self.doubles, strict=True):
            h = double(norm(h, vector))
        return torch.tanh(h)

    def _one_hot(self, classes: Tensor) -> Tensor:
        return F.one_hot(classes, self.config.classes).to(self.enter.weight.dtype)


def _check_latents(z: Any, channels: int, weight: Tensor) -> None:
    if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[1] != channels:
        got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"z must have shape (B, {channels}), got {got}")
    if z.device != weight.device:
        raise ValueError(f"z must be on {weight.device}, the device of the weights, got {z.device}")
    if not z.is_floating_point() or (z.dtype != weight.dtype and not torch.is_autocast_enabled(z.device.type)):
        raise ValueError(f"z must have {weight.dtype}, the dtype of the weights, got {z.dtype}")

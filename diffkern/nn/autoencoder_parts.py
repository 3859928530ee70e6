"""Encoder and decoder of an autoencoder: a UNet's blocks without time, and without skips from one to the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffkern.nn import strips
from diffkern.nn.attention import SpatialSelfAttention
from diffkern.nn.autoencoder_config import AutoencoderConfig
from diffkern.nn.blocks import ConvResample, Pointwise, joined
from diffkern.nn.convolution import convolve
from diffkern.nn.norm import GroupNormAct, count_groups

__all__ = ["Block", "Decoder", "Encoder"]


class Block(nn.Module):
    """Pre-activation residual block: GroupNorm, SiLU, conv 3x3, GroupNorm, SiLU, dropout, conv 3x3, plus the skip.

    [B, C_in, H, W] to [B, C_out, H, W]: a `ResBlock` that no time and no class enters (Esser and others 2021).
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = GroupNormAct(count_groups(in_channels, groups), in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormAct(count_groups(out_channels, groups), out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else Pointwise(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if strips.fits(self, x):
            return strips.run(self, x)
        h = convolve(self.conv1, self.norm1(x))
        return joined(self.skip(x), convolve(self.conv2, self.dropout(self.norm2(h))), 1.0, self.conv2)


class Level(nn.Module):
    """The blocks of one resolution, each with the attention that may follow it, and what leads to the next."""

    def __init__(self, blocks: list[Block], attentions: list[SpatialSelfAttention], resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    @property
    def run_order(self) -> list[nn.Module]:
        """Blocks and attentions by turns, then what resamples."""
        found: list[nn.Module] = []
        for i, block in enumerate(self.blocks):
            found += [block, *([self.attentions[i]] if len(self.attentions) else [])]
        return found if self.resample is None else [*found, self.resample]


class _Parts:
    """Makes the parts of both halves from their configuration."""

    def __init__(self, config: AutoencoderConfig) -> None:
        self.config = config

    def norm(self, channels: int) -> GroupNormAct:
        return GroupNormAct(count_groups(channels, self.config.groups), channels, self.config.eps)

    def block(self, in_channels: int, out_channels: int) -> Block:
        config = self.config
        return Block(in_channels, out_channels, config.groups, config.eps, config.dropout)

    def attention(self, channels: int) -> SpatialSelfAttention:
        config = self.config
        groups = count_groups(channels, config.groups)
        made = SpatialSelfAttention(channels, groups=groups, eps=config.eps, attention=config.attention)
        made.proj_out.reset_parameters()
        return made

    def level(self, in_channels: int, level: int, blocks: int, resample: nn.Module | None) -> Level:
        width = self.config.widths[level]
        made = [self.block(in_channels if i == 0 else width, width) for i in range(blocks)]
        attends = level in self.config.attention_levels
        return Level(made, [self.attention(width) for _ in range(blocks)] if attends else [], resample)

    def middle(self, channels: int) -> nn.ModuleList:
        attention = [self.attention(channels)] if self.config.middle_attention else []
        return nn.ModuleList([self.block(channels, channels), *attention, self.block(channels, channels)])


class _Half(nn.Module):
    """What encoder and decoder share: how their parts are run."""

    checkpointing = False
    """Whether blocks keep nothing for the backward pass but their input, and run again in it (training alone)."""

    def _run(self, parts: list[Any], h: Tensor) -> Tensor:
        for part in parts:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                h = checkpoint(part, h, use_reentrant=False)
            else:
                h = part(h)
        return h


class Encoder(_Half):
    """[B, C, H, W] to [B, out_channels, H / f, W / f], channels_last inside.

    Downsampling pads at the right and below alone, as in DDPM, LDM and diffusers.
    """

    def __init__(self, config: AutoencoderConfig, out_channels: int) -> None:
        super().__init__()
        parts, widths = _Parts(config), config.widths
        current = widths[0]
        self.enter = nn.Conv2d(config.in_channels, current, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            down = ConvResample(width, "down", "asymmetric") if level + 1 < len(widths) else None
            self.down.append(parts.level(current, level, config.blocks, down))
            current = width
        self.middle = parts.middle(current)
        self.norm = parts.norm(current)
        self.leave = nn.Conv2d(current, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        levels: list[Any] = [*self.down]
        parts = [part for level in levels for part in level.run_order]
        h = self._run([*parts, *self.middle], self.enter(x))
        return convolve(self.leave, self.norm(h))


class Decoder(_Half):
    """[B, latent_channels, h, w] to [B, C, f h, f w], channels_last inside."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        parts, widths = _Parts(config), config.widths
        current = widths[-1]
        self.enter = nn.Conv2d(config.latent_channels, current, 3, padding=1)
        self.middle = parts.middle(current)
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            up = ConvResample(width, "up") if level else None
            self.up.append(parts.level(current, level, config.blocks + 1, up))
            current = width
        self.norm = parts.norm(current)
        self.leave = nn.Conv2d(current, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        levels: list[Any] = [*self.up]
        parts = [part for level in levels for part in level.run_order]
        h = self._run([*self.middle, *parts], convolve(self.enter, z))
        return convolve(self.leave, self.norm(h))

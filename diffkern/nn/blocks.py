"""The blocks of a UNet: residual and ConvNeXt blocks that know the time, and changes of the resolution."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.modes import fakes, kept
from diffkern.nn.convolution import convolve
from diffkern.nn.norm import GroupNormAct, count_groups
from diffkern.nn.plain import is_plain
from diffkern.nn.unet_config import Modulation, Padding

Resample = Literal["none", "down", "up"]


def zeroed(module: Any, zero: bool = True) -> Any:
    """The module with weights and bias 0: a branch that starts silent (Ho et al. 2020; lecture 002)."""
    if zero:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    return module


def filter_kernel(taps: tuple[float, ...], x: Tensor, scale: float = 1.0) -> Tensor:
    """[C, 1, n, n]: scale f f^T / (sum f)^2 of the taps f, for every channel of x.

    Kept by device: the copy to a GPU would wait for it, and has no place in a CUDA graph.
    """
    made = _outer if torch.compiler.is_compiling() or fakes(x.device) is not None else _kept_outer
    return made(taps, scale, x.dtype, x.device).expand(x.shape[1], 1, -1, -1)


def _outer(taps: tuple[float, ...], scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    total = sum(taps)
    return torch.tensor([[a * b * scale / total**2 for b in taps] for a in taps], dtype=dtype, device=device)


_kept_outer = kept(64)(_outer)


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution, [B, C_in, H, W] to [B, C_out, H, W]: of channels_last a product of what lies there."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.stride(1) != 1:
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Resampler(nn.Module):
    """Half or twice the resolution, [B, C, H, W] to [B, C, H / 2, W / 2] or [B, C, 2 H, 2 W], without weights.

    Without a filter the mean of 2 x 2 pixels, or repetition. With the taps f of a filter (an even number, (1, 3, 3, 1)
    say): convolution with f f^T / (sum f)^2 and every second pixel, or zeros between the pixels and convolution with
    four times that (Karras et al. 2020, as in NCSN++ of Song et al. 2021). "none": x itself.
    """

    def __init__(self, kind: Resample, filter: tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.kind = kind
        plain = filter is None or (len(set(filter)) == 1 and len(filter) == 2)
        self.taps = None if plain or kind == "none" else filter

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.taps is None:
            return F.avg_pool2d(x, 2) if self.kind == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
        kernel = filter_kernel(self.taps, x, 4.0 if self.kind == "up" else 1.0)
        convolve = F.conv2d if self.kind == "down" else F.conv_transpose2d
        return convolve(x, kernel, stride=2, padding=(kernel.shape[-1] - 1) // 2, groups=x.shape[1])


class ConvResample(nn.Module):
    """Half the resolution by a 3 x 3 convolution of stride 2, or twice by repetition and a 3 x 3 convolution.

    `padding` of the way down: "symmetric", or "asymmetric": zeros at the right and below alone, as in DDPM.
    """

    def __init__(self, channels: int, kind: Literal["down", "up"], padding: Padding = "symmetric") -> None:
        super().__init__()
        self.kind: Resample = kind
        self.asymmetric = kind == "down" and padding == "asymmetric"
        self.conv = nn.Conv2d(
            channels, channels, 3, stride=2 if kind == "down" else 1, padding=0 if self.asymmetric else 1
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "up":
            return convolve(self.conv, x, upsample=True)
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
        return out


class InputSkip(nn.Module):
    """The input of the network brought to a level and mixed in: (h + down(conv(input))) scale; also the next input.

    NCSN++'s progressive input (Song et al. 2021): a 3 x 3 convolution, then the filter and every second pixel.
    """

    def __init__(self, in_channels: int, out_channels: int, filter: tuple[float, ...] | None, scale: float) -> None:
        super().__init__()
        self.taps = filter or (1.0, 1.0)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1 + (len(self.taps) - 1) // 2)
        self.scale = scale

    def forward(self, h: Tensor, given: Tensor) -> Tensor:
        made = self.conv(given)
        kernel = filter_kernel(self.taps, made)
        return (h + F.conv2d(made, kernel, stride=2, groups=made.shape[1])) * self.scale


class ResBlock(nn.Module):
    """Pre-activation residual block: GroupNorm, SiLU, conv 3x3, embedding, GroupNorm, SiLU, dropout, conv 3x3, plus
    the skip.

    ``block(x, change)``: [B, C_in, H, W] to [B, C_out, H', W']. ``change = block.modulate(silu(embedding))`` of the
    embedding [B, E] of time and class enters between the convolutions, either as adaptive group norm,
    (1 + scale) GroupNorm(h) + shift with change [B, 2 C_out] = [scale, shift], or as GroupNorm(h + change) with change
    [B, C_out]. With resample "down" or "up" both branches change the resolution (the BigGAN block of Dhariwal and
    Nichol 2021; lecture 002). The sum is multiplied by `residual_scale`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        modulation: Modulation = "scale_shift",
        resample: Resample = "none",
        filter: tuple[float, ...] | None = None,
        resampled_skip_conv: bool = False,
        dropout: float = 0.0,
        groups: int = 8,
        group_channels: int = 1,
        eps: float = 1e-5,
        residual_scale: float = 1.0,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.modulation: Modulation = modulation
        self.residual_scale = residual_scale
        self.norm1 = GroupNormAct(count_groups(in_channels, groups, group_channels), in_channels, eps)
        self.resample = Resampler(resample, filter)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulate = nn.Linear(embedding, (2 if modulation == "scale_shift" else 1) * out_channels)
        self.norm2 = GroupNormAct(count_groups(out_channels, groups, group_channels), out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1), zero_init)
        same = in_channels == out_channels and not (resampled_skip_conv and resample != "none")
        self.skip = nn.Identity() if same else Pointwise(in_channels, out_channels)

    def forward(self, x: Tensor, change: Tensor) -> Tensor:
        repeats = self.resample.kind == "up" and self.resample.taps is None and is_plain(self.resample, Resampler)
        h = self.norm1(x)
        h = convolve(self.conv1, h if repeats else self.resample(h), upsample=repeats)
        if self.modulation == "scale_shift":
            scale, shift = change.chunk(2, dim=1)
            h = self.norm2(h, scale=scale, shift=shift)
        else:
            h = self.norm2(h, add=change)
        return joined(
            self.skip(self.resample(x)), convolve(self.conv2, self.dropout(h)), self.residual_scale, self.conv2
        )


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block that knows the time: depthwise 7x7, LayerNorm over channels, 1x1, GELU, 1x1, plus the skip.

    Liu et al. 2022 (arXiv 2201.03545) as a diffusion UNet's block (lecture 002, "ConvNext Blocks", "Swish and GeLU").
    ``block(x, change)`` as `ResBlock`: the change modulates the normalised tensor (or is added before the norm).
    """

    EXPANSION = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        modulation: Modulation = "scale_shift",
        resample: Resample = "none",
        filter: tuple[float, ...] | None = None,
        resampled_skip_conv: bool = False,
        dropout: float = 0.0,
        groups: int = 8,
        group_channels: int = 1,
        eps: float = 1e-5,
        residual_scale: float = 1.0,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        del groups, group_channels  # of group norms, which this block has none of
        self.modulation: Modulation = modulation
        self.residual_scale = residual_scale
        self.resample = Resampler(resample, filter)
        self.depthwise = nn.Conv2d(in_channels, in_channels, 7, padding=3, groups=in_channels)
        self.modulate = nn.Linear(embedding, (2 if modulation == "scale_shift" else 1) * in_channels)
        self.norm = nn.LayerNorm(in_channels, eps=eps)
        self.conv1 = Pointwise(in_channels, self.EXPANSION * in_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(Pointwise(self.EXPANSION * in_channels, out_channels), zero_init)
        same = in_channels == out_channels and not (resampled_skip_conv and resample != "none")
        self.skip = nn.Identity() if same else Pointwise(in_channels, out_channels)

    def forward(self, x: Tensor, change: Tensor) -> Tensor:
        x = self.resample(x)
        h = self.depthwise(x).permute(0, 2, 3, 1)
        change = change[:, None, None, :]
        if self.modulation == "scale_shift":
            scale, shift = change.chunk(2, dim=-1)
            h = torch.addcmul(shift, self.norm(h), 1.0 + scale)
        else:
            h = self.norm(h + change)
        h = F.gelu(self.conv1(h.permute(0, 3, 1, 2)))
        return joined(self.skip(x), self.conv2(self.dropout(h)), self.residual_scale, self.conv2)


def joined(skip: Tensor, branch: Tensor, scale: float, last: nn.Module) -> Tensor:
    """(skip + branch) scale; in place of the branch where the layer that has just made it is alone to know it."""
    fresh = is_plain(last, nn.Conv2d) or is_plain(last, Pointwise)
    total = branch.add_(skip) if fresh and branch.dtype == skip.dtype else skip + branch
    return total if scale == 1.0 else total * scale

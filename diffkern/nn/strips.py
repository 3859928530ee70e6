"""Residual blocks of large images in strips of rows: beside input and output nothing of their size is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.nn.blocks import Pointwise
from diffkern.nn.convolution import convolve
from diffkern.nn.norm import GroupNormAct
from diffkern.nn.plain import is_plain
from diffkern.nn.rows import is_eager

__all__ = ["LEAST", "STRIP", "fits", "run"]

LEAST = 1 << 26
"""Bytes of a sample from which on strips are taken: 256 channels of 256 x 256 pixels in float32."""
STRIP = 3 << 22
"""Bytes of a strip, of which there are a few at a time."""


def fits(block: Any, x: Tensor) -> bool:
    """Whether `run` may stand for the block: large float32 images on a CPU, no gradients, no graph, plain layers.

    It does not ask for the batch, so that a sample's bits do not depend on it.
    """
    return (
        x.dtype == torch.float32
        and x.is_cpu
        and x.stride(1) == 1
        and x[:1].nbytes >= LEAST
        and is_eager()
        and not (block.training and block.dropout.p)
        and all(is_plain(norm, GroupNormAct) and norm.attention == "diffkern" for norm in (block.norm1, block.norm2))
        and all(is_plain(conv, nn.Conv2d) for conv in (block.conv1, block.conv2))
        and type(block.skip) in (nn.Identity, Pointwise)
    )


def run(block: Any, x: Tensor) -> Tensor:
    """``block(x)`` of [B, C, H, W] in channels_last, within rounding: x and one tensor of the output's size.

    Both norms are made of their means and deviations first; every strip is then normalised, activated and convolved
    with a row more on either side. What the second convolution makes takes the place of what it reads, a strip later.
    """
    width = block.conv1.out_channels
    h = torch.empty(x.shape[0], width, *x.shape[2:], memory_format=torch.channels_last)
    for i in range(len(x)):
        own, made = x[i : i + 1], h[i : i + 1]
        line = Affine(block.norm1, own)
        for first, last in _strips(own):
            low, high = max(first - 1, 0), min(last + 1, own.shape[2])
            out = convolve(block.conv1, line.applied(own[:, :, low:high]))
            made[:, :, first:last] = out[:, :, first - low : last - low]
            del out
        line, before = Affine(block.norm2, made), None
        for first, last in _strips(made):
            seen = line.applied(made[:, :, first : min(last + 1, made.shape[2])], before)
            before = made[:, :, last - 1 : last].clone()
            out = convolve(block.conv2, seen)
            start = 1 if first else 0
            torch.add(
                out[:, :, start : start + last - first], block.skip(own[:, :, first:last]), out=made[:, :, first:last]
            )
            del out, seen
    return h


def _strips(x: Tensor) -> Iterator[tuple[int, int]]:
    """First row and the one after the last, an even number of rows."""
    height = x.shape[2]
    rows = max(2, STRIP // (x.nbytes // height) // 2 * 2)
    return ((first, min(first + rows, height)) for first in range(0, height, rows))


class Affine:
    """GroupNorm of one sample as a u + b for each channel: its moments are made once, in one pass over strips."""

    def __init__(self, norm: GroupNormAct, x: Tensor) -> None:
        channels, groups = x.shape[1], norm.num_groups
        shift: Tensor | None = None
        total = square = torch.zeros(channels, dtype=torch.float64)
        for first, last in _strips(x):
            rows = x[0, :, first:last].permute(1, 2, 0).flatten(0, 1)
            shift = rows.mean(dim=0) if shift is None else shift
            rows = rows - shift
            total = total + rows.sum(dim=0)
            square = square + rows.square_().sum(dim=0)
        assert shift is not None
        count = x.shape[2] * x.shape[3]
        mean = (shift + total / count).view(groups, -1)
        var = (square / count - (total / count).square()).view(groups, -1)
        middle = mean.mean(dim=1, keepdim=True)
        spread = (var + (mean - middle).square()).mean(dim=1, keepdim=True)
        rstd = (spread + norm.eps).rsqrt().expand(groups, channels // groups).flatten()
        middle = middle.expand(groups, channels // groups).flatten()
        scale = rstd * norm.weight.double()
        offset = norm.bias.double() - middle * scale
        self.silu = norm.silu
        self.scale, self.offset = (t.float().view(1, -1, 1, 1) for t in (scale, offset))

    def applied(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """Normalised and activated, of ``before`` (a row) and x one below the other."""
        above = 0 if before is None else before.shape[2]
        shape = (1, x.shape[1], above + x.shape[2], x.shape[3])
        out = torch.empty(shape, memory_format=torch.channels_last)
        if before is not None:
            torch.addcmul(self.offset, before, self.scale, out=out[:, :, :above])
        torch.addcmul(self.offset, x, self.scale, out=out[:, :, above:])
        return F.silu(out, inplace=True) if self.silu else out

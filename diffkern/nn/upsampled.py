"""A 3 x 3 convolution of an image upsampled to twice its size, from the small image: 16 products a pixel, not 36.

Nearest upsampling repeats every pixel, so that of the three weights in a row two meet the same pixel and can be added
beforehand. Output 2 i has w0 on pixel i - 1 and w1 + w2 on i; output 2 i + 1 has w0 + w1 on i and w2 on i + 1; the same
along the columns. The four parities are one 2 x 2 convolution with four times the channels, over a border of one pixel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.nn.plain import is_plain

_MAKING = 2000
"""What it costs to add up the weights (16 a channel pair, freshly allocated), in products of one image: whatever the
batch, so that a sample's bits do not change with it."""


def is_worth_it(conv: Any, x: Tensor) -> bool:
    """Whether the convolution of the upsampled x may be made so, and is the faster one (measured on the CPU).

    Not in 16 bits, where the sums of weights would be rounded.
    """
    height, width = x.shape[2:]
    return (
        not torch.compiler.is_compiling()
        and is_plain(conv, nn.Conv2d)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and conv.weight.dtype == x.dtype
        and not torch.is_autocast_enabled("cpu")
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (conv.groups, conv.padding_mode) == (1, "zeros")
        and 28 * height * width > 16 * (height + 1) * (width + 1) + _MAKING
    )


def conv_of_upsampled(conv: Any, x: Tensor) -> Tensor:
    """conv(nearest upsampling by 2 of x), [B, C, H, W] to [B, C', 2 H, 2 W] in channels_last."""
    height, width = x.shape[2:]
    bias = None if conv.bias is None else conv.bias.repeat(4)
    y = F.conv2d(x, _four_kernels(conv.weight), bias, padding=1)  # [B, (row, column, C'), H + 1, W + 1]
    y = y.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))
    rows = [
        torch.stack([y[:, r : r + height, c : c + width, r, c] for c in (0, 1)], dim=3)  # [B, H, W, 2, C']
        for r in (0, 1)
    ]
    return torch.stack(rows, dim=2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _four_kernels(weight: Tensor) -> Tensor:
    """[C', C, 3, 3] to [(row, column, C'), C, 2, 2], in channels_last."""
    w = weight.permute(0, 2, 3, 1)  # contiguous in channels_last
    tall = _pairs(w[:, 0], w[:, 1], w[:, 2])
    wide = [[_pairs(t[:, 0], t[:, 1], t[:, 2]) for t in pair] for pair in tall]  # [row][tap of it][column][tap of it]
    kernels = [
        torch.stack([wide[r][0][c][0], wide[r][0][c][1], wide[r][1][c][0], wide[r][1][c][1]], dim=1)
        for r in (0, 1)
        for c in (0, 1)
    ]
    return torch.cat(kernels).unflatten(1, (2, 2)).permute(0, 3, 1, 2)


def _pairs(w0: Tensor, w1: Tensor, w2: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two weights of even and of odd outputs."""
    return (w0, w1 + w2), (w0 + w1, w2)

"""Times as vectors: sinusoids of fixed and of random frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(
    t: Tensor, width: int, max_period: float = 10000.0, *, freq_shift: float = 0.0, sin_first: bool = False
) -> Tensor:
    """[B] times (any dtype) to [B, width] float32: cos(t f_i) then sin(t f_i).

    f_i = max_period^(-i / (width / 2 - freq_shift)).

    The time embedding of Vaswani et al. 2017 as used by Ho et al. 2020 (lectures 000 and 002; `freq_shift` 1 and
    `sin_first` there, 0 and cosines first in guided-diffusion). ValueError for an odd width.
    """
    if width % 2:
        raise ValueError(f"width must be even, got {width}")
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.to(torch.float32).reshape(-1, 1) * torch.exp(-math.log(max_period) * exponents)
    waves = [angles.sin(), angles.cos()] if sin_first else [angles.cos(), angles.sin()]
    return torch.cat(waves, dim=1)


class FourierEmbedding(nn.Module):
    """[B] times to [B, width] float32: cos(2 pi t f_i) then sin(2 pi t f_i), f_i normal with deviation `scale`, kept.

    Random Fourier features (Tancik et al. 2020) as in NCSN++ (Song et al. 2021). The frequencies are a buffer of the
    state dict, `frequencies` [width / 2]. ValueError for an odd width.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 16.0, *, sin_first: bool = False) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width must be even, got {width}")
        self.sin_first = sin_first
        self.register_buffer("frequencies", torch.randn(width // 2) * scale)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(torch.float32).reshape(-1, 1) * (2.0 * math.pi * self.frequencies.to(torch.float32))
        waves = [angles.sin(), angles.cos()] if self.sin_first else [angles.cos(), angles.sin()]
        return torch.cat(waves, dim=1)

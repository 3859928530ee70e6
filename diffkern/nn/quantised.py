"""Latents that are codes: the nearest of a codebook, or levels of each channel."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffkern import ops

__all__ = ["CodebookStatistics", "FiniteScalars", "Quantised", "nearest"]

MOST_DISTANCES = 1 << 24
"""That are made at a time (64 MiB of float32)."""


class CodebookStatistics(NamedTuple):
    """How much of a codebook is in use."""

    usage: float
    """The share of the codes that occur, in [0, 1]."""
    perplexity: float
    """exp(-sum_k p_k ln p_k) of the shares p_k of the codes: how many equally frequent codes say as much."""


@dataclasses.dataclass(frozen=True)
class Quantised:
    """Latents and their codes.

    before      [B, C, h, w]: what the encoder put out (of "fsq": brought into the range of the levels)
    latents     [B, C, h, w]: the codes; their gradient is that of ``before`` (straight-through)
    indices     int64 [B, h, w]: which codes they are
    commitment  [B]: mean |before - sg(code)|^2, whose gradient pulls the encoder to its codes
    codebook    [B]: mean |sg(before) - code|^2, whose gradient pulls the codes; the same numbers
    seeds       of the examples, where they were given: what `Autoencoder.update_codebook` draws by
    """

    before: Tensor
    latents: Tensor
    indices: Tensor
    commitment: Tensor
    codebook: Tensor
    seeds: ops.Seeds | None = None

    def mode(self) -> Tensor:
        """The codes."""
        return self.latents

    def point(self, seeds: ops.Seeds | None = None) -> Tensor:
        """The codes, whatever the seeds: what the decoder takes."""
        return self.latents

    def diffused(self, seeds: ops.Seeds | None = None) -> Tensor:
        """What diffusion is trained on: the latents before they are quantised (arXiv 2112.10752, section 3.1)."""
        return self.before


def nearest(rows: Tensor, codes: Tensor) -> Tensor:
    """int64 [N]: of each row of [N, C] the nearest of the codes [K, C], the first of equal ones.

    Each distance is summed by itself, so that a row's code depends on neither the other rows nor their number. In
    float32 (float64 for float64), some rows at a time.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    rows, codes = rows.detach().to(wide), codes.detach().to(wide)
    at_once = max(1, MOST_DISTANCES // max(1, len(codes)))
    parts = [
        torch.cdist(part, codes, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).indices
        for part in rows.split(at_once)
    ]
    return torch.cat(parts) if parts else rows.new_zeros(0, dtype=torch.int64)


def squared_error(one: Tensor, other: Tensor) -> Tensor:
    """[B]: the mean of (one - other)^2 over a sample, in float32 or wider."""
    wide = torch.promote_types(one.dtype, torch.float32)
    return (one.to(wide) - other.to(wide)).square().flatten(1).mean(dim=1)


def straight_through(code: Tensor, before: Tensor) -> Tensor:
    """The code, bit for bit, with the gradient of ``before`` (Bengio and others 2013; van den Oord and others 2017)."""
    return (before - before.detach()) + code.detach()


class FiniteScalars(nn.Module):
    """Finite scalar quantisation (Mentzer and others 2023, arXiv 2309.15505): every channel has a few levels.

    With L_i levels in channel i: b = tanh(z + s) (L - 1)(1 + 1e-3) / 2 - o, o = 1/2 for an even L and else 0, s such
    that b(0) = 0; the code is round(b) / floor(L / 2), with the gradient of b. There is nothing to learn and no code
    can die: the codebook is all prod L_i combinations. The index of a code counts its levels with channel 0 fastest.
    """

    EPS = 1e-3
    _half: Tensor
    _levels: Tensor
    _basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels = levels
        every = torch.tensor(levels, dtype=torch.int64)
        bases = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_levels", every, persistent=False)
        self.register_buffer("_basis", torch.tensor(bases, dtype=torch.int64), persistent=False)
        self.register_buffer("_half", every // 2, persistent=False)

    def _column(self, values: Tensor, like: Tensor) -> Tensor:
        return values.to(like.dtype).view(-1, 1, 1)

    def bound(self, z: Tensor) -> Tensor:
        """b, in units of the codes: between -1 and 1 and a little beyond."""
        reach = self._column(self._levels - 1, z) * ((1.0 + self.EPS) / 2.0)
        offset = self._column((self._levels + 1) % 2, z) * 0.5
        return (torch.tanh(z + torch.atanh(offset / reach)) * reach - offset) / self._column(self._half, z)

    def snap(self, bounded: Tensor) -> Tensor:
        """The nearest code of numbers in units of the codes, without a gradient; within the levels for any number."""
        half, levels = self._column(self._half, bounded), self._column(self._levels, bounded)
        least = -half
        return (bounded.detach() * half).round().clamp(least, least + levels - 1) / half

    def forward(self, z: Tensor, seeds: ops.Seeds | None = None) -> Quantised:
        bounded = self.bound(z)
        code = self.snap(bounded)
        zeros = squared_error(bounded.detach(), code)
        return Quantised(bounded, straight_through(code, bounded), self.indices_of(code), zeros, zeros, seeds)

    def indices_of(self, codes: Tensor) -> Tensor:
        """int64 [B, h, w] of codes [B, C, h, w]."""
        levels = (codes * self._column(self._half, codes)).round().to(torch.int64) + self._half.view(-1, 1, 1)
        return (levels * self._basis.view(-1, 1, 1)).sum(dim=1)

    def codes_of(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, C, h, w] of indices [B, h, w]."""
        levels = indices[:, None] // self._basis.view(-1, 1, 1) % self._levels.view(-1, 1, 1)
        half = self._half.view(-1, 1, 1)
        return ((levels - half).to(torch.float64) / half).to(dtype)

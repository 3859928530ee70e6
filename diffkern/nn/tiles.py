"""Large images in tiles that overlap, whose results are blended."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["starts", "tiled", "weights"]


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: every ``tile - overlap``, the last one moved back so that it ends with the axis."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def weights(size: int, tile: int, overlap: int, scale: int) -> list[Tensor]:
    """What each tile counts at each of its ``scale * min(tile, size)`` places along an axis, float64.

    They add up to 1 everywhere. Where tiles meet, a quarter of the overlap at the end of each counts nothing, as what
    is there sees the zeros beyond the border most; the half between is a ramp.
    """
    length, margin = scale * min(tile, size), scale * overlap / 4.0
    most = max(0.5, 2.0 * margin)
    places = torch.arange(length, dtype=torch.float64) + 0.5
    begins = starts(size, tile, overlap)
    total, ramps = torch.zeros(scale * size, dtype=torch.float64), []
    for begin in begins:
        before = places - margin if begin else torch.full_like(places, most)
        after = places.flip(0) - margin if begin != begins[-1] else before.new_tensor(most)
        ramps.append(torch.minimum(before, after).clamp(0.0, most))
        total[scale * begin : scale * begin + length] += ramps[-1]
    return [ramp / total[scale * begin : scale * begin + length] for begin, ramp in zip(begins, ramps, strict=True)]


def tiled(run: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, unit: int = 1, made: int = 1) -> Tensor:
    """``run`` of tiles of x [B, C, H, W], blended: sum over tiles of (weight of the tile) run(tile).

    ``tile`` and ``overlap`` count latents, of which each is ``unit`` places of x and ``made`` places of the result. At
    a time there are x, the result and what ``run`` needs for one tile.
    """
    height, width = (n // unit for n in x.shape[2:])
    down, across = weights(height, tile, overlap, made), weights(width, tile, overlap, made)
    out: Tensor | None = None
    for i, row in zip(starts(height, tile, overlap), down, strict=True):
        for j, column in zip(starts(width, tile, overlap), across, strict=True):
            part = run(x[:, :, unit * i : unit * (i + tile), unit * j : unit * (j + tile)])
            if out is None:
                out = part.new_zeros(*part.shape[:2], made * height, made * width)
            weight = (row[:, None] * column).to(device=part.device, dtype=part.dtype)
            where = slice(made * i, made * i + len(row)), slice(made * j, made * j + len(column))
            out[:, :, where[0], where[1]] += part * weight
    assert out is not None
    return out

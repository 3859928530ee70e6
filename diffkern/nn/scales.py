"""The scale of latents: numbers that bring them to mean 0 and standard deviation 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.integers import integer
from diffkern.records import shown

__all__ = ["column", "measured"]


def column(value: float | tuple[float, ...], z: Tensor) -> float | Tensor:
    """What fits beside latents [B, C, h, w]: a number, or [C, 1, 1] of one for each channel."""
    if not isinstance(value, tuple):
        return value
    return torch.tensor(value, dtype=z.dtype, device=z.device)[:, None, None]


def _batches(images: Tensor | Iterable[Tensor], seeds: ops.Seeds | None, batch: int) -> Iterator[tuple[Tensor, Any]]:
    if isinstance(images, Tensor):
        every = ops.seeds(seeds, len(images)) if isinstance(seeds, int) else seeds
        for first in range(0, len(images), batch):
            yield images[first : first + batch], None if every is None else every[first : first + batch]
    elif seeds is not None:
        raise ValueError("seeds must go with a tensor of images, got batches of them")
    else:
        for part in images:
            yield part, None


def measured(
    model: Any, images: Tensor | Iterable[Tensor], seeds: ops.Seeds | None, center: bool, channels: bool, batch: int
) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
    """See `Autoencoder.measure_scale`: counts, means and squares are merged batch by batch (Chan and others 1979)."""
    batch, count = integer("batch", batch), 0
    mean = square = torch.zeros(())
    for part, own in _batches(images, seeds, batch):
        z = model.encode(part).diffused(own).double()
        rows = z.permute(1, 0, 2, 3).flatten(1) if channels else z.reshape(1, -1)
        n = rows.shape[1]
        if not n:
            continue
        var, middle = torch.var_mean(rows, dim=1, correction=0)
        mean, square = (torch.zeros_like(middle), torch.zeros_like(var)) if not count else (mean, square)
        gap = middle - mean
        square = square + var * n + gap.square() * (count * n / (count + n))
        count += n
        mean = mean + gap * (n / count)
    if not count:
        raise ValueError("images must be at least one, got none")
    every = [math.sqrt(v) for v in (square / count).tolist()]
    if not min(every) > 0.0 or not math.isfinite(sum(every)):
        raise ValueError(f"the latents of images must differ and be finite, got standard deviations {shown(every)}")
    scale, shift = tuple(1.0 / std for std in every), tuple(mean.tolist()) if center else (0.0,) * len(every)
    return (scale, shift) if channels else (scale[0], shift[0])

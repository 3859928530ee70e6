"""Draws that are made of `ops.randn` or of its seeds: the seeds of an iteration, uniform numbers, random directions."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from diffkern import ops, streams
from diffkern.checks import unknown
from diffkern.names import Projection

__all__ = ["PROJECTIONS", "draw_seeds", "projections", "uniform_by_address"]

PROJECTIONS = get_args(Projection)


def draw_seeds(n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None) -> Tensor:
    """n int64 seeds from torch's generator, for one training iteration: the run repeats under torch.manual_seed."""
    check_count(n)
    device = generator.device if device is None and generator is not None else device
    return torch.randint(-(2**63), 2**63 - 1, (n,), dtype=torch.int64, device=device, generator=generator)


def check_count(n: int) -> None:
    """ValueError unless n random numbers can be asked for."""
    if not 0 <= n < 2**40:
        raise ValueError(f"n must be at least 0 and below 2**40, got {n}")


def uniform_by_address(seeds: Tensor, stream: int) -> Tensor:
    """One u in (0, 1) a seed, float64: Phi of the address's normal."""
    z = ops.randn([seeds.shape[0], 1], seeds, stream)[:, 0].to(torch.float64)
    return 0.5 * torch.erfc(-z / math.sqrt(2.0))


def projections(
    shape: torch.Size | tuple[int, ...],
    seeds: ops.Seeds,
    k: int = 0,
    kind: Projection = "rademacher",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The k-th random direction of each sample, [B, ...] with E[v v^T] = I, by address (stream HUTCHINSON + k).

    ``gaussian``: standard normals; ``rademacher``: their signs, whose trace estimate varies least.
    """
    if kind not in PROJECTIONS:
        raise ValueError(unknown("projection", kind, PROJECTIONS))
    z = ops.randn(shape, seeds, streams.HUTCHINSON + k, dtype=dtype)
    return z if kind == "gaussian" else torch.where(z < 0, -1.0, 1.0).to(dtype)

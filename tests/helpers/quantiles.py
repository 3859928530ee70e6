"""What quantiles are compared with: torch.quantile, or its steps where this torch takes others."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """[B, elements] in the dtype of the result."""
    return (x if x.dtype == torch.float64 else x.float()).reshape(x.shape[0], math.prod(x.shape[1:]))


def fused(a: float, b: float, c: float) -> float:
    """a b + c rounded once, to float64."""
    if not all(map(math.isfinite, (a, b, c))):
        return a * b + c
    return float(Fraction(a) * Fraction(b) + Fraction(c))


def by_sorting(x: Tensor, q: float) -> Tensor:
    """The steps of torch.quantile on |x|: the rank in float64, torch.lerp with a fused product. Any size, any CPU."""
    ordered = rows(x).abs().sort(1)[0]
    rank = torch.tensor(q, dtype=ordered.dtype).item() * (ordered.shape[1] - 1)
    lower, upper = ordered[:, math.floor(rank)], ordered[:, math.ceil(rank)]
    weight = torch.tensor(rank - math.floor(rank), dtype=ordered.dtype).item()
    factor, base = (weight, lower) if weight < 0.5 else (weight - 1, upper)
    between = [fused(factor, d, b) for d, b in zip((upper - lower).tolist(), base.tolist(), strict=True)]
    result = torch.tensor(between, dtype=torch.float64).to(ordered.dtype)
    return torch.where(ordered.isnan().any(1), math.nan, result)


def _torch_takes_these_steps() -> bool:
    """Older versions take the rank in float32; on CPUs without FMA torch.lerp rounds twice."""
    x = torch.rand(8, 12288, generator=torch.Generator().manual_seed(0))
    return all(torch.equal(torch.quantile(x, q, dim=1), by_sorting(x, q)) for q in (0.1, 0.3, 0.77, 0.9, 0.995))


TORCH_TAKES_THESE_STEPS = _torch_takes_these_steps()


def torch_quantile(x: Tensor, q: float) -> Tensor:
    """torch.quantile of |x| over each sample, where it takes the steps above; else the steps."""
    return torch.quantile(rows(x).abs(), q, dim=1) if TORCH_TAKES_THESE_STEPS else by_sorting(x, q)

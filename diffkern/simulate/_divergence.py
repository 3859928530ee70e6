"""The divergence of a drift: exact, or Hutchinson's estimate along given or drawn directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from diffkern.checks import unknown
from diffkern.draws import PROJECTIONS, draw_seeds, projections
from diffkern.integers import integer
from diffkern.names import Divergence, Projection
from diffkern.ops import Seeds, as_seeds
from diffkern.simulate._process import ODE, shaped

DIVERGENCES = get_args(Divergence)


def with_divergence(ode: ODE, x: Tensor, t: Tensor, directions: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
    """(u, its divergence [B]); exact without directions."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = shaped("drift_coefficient", ode.drift_coefficient(x, t), x)
        if not u.requires_grad:
            raise ValueError("the drift must be differentiable in x, got one without a gradient (no_grad or detach?)")
        flat, parts = u.flatten(1), []
        if directions is None:
            for d in range(flat.shape[1]):
                parts.append(_derivative(flat[:, d], x)[:, d])
            return u.detach(), pairwise_sum(torch.stack(parts, 1))
        for v in directions:
            parts.append(pairwise_sum(_derivative((flat * v).sum(), x) * v))
    return u.detach(), pairwise_sum(torch.stack(parts, 1)) / len(parts)


def _derivative(value: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x).flatten(1) if gradient is None else gradient.flatten(1)


def drawn_directions(
    x: Tensor, divergence: Divergence, probes: int, probe: Projection, seeds: Seeds | None
) -> list[Tensor] | None:
    """Directions of `probe` for Hutchinson's estimate, float64 [B, D] each; None for the exact divergence."""
    if divergence not in DIVERGENCES:
        raise ValueError(unknown("divergence", divergence, DIVERGENCES))
    probes = integer("probes", probes)
    if probe not in PROJECTIONS:
        raise ValueError(unknown("probe", probe, PROJECTIONS))
    if seeds is not None:
        seeds = as_seeds(seeds, len(x), x.device)
    if divergence == "exact":
        return None
    seeds = draw_seeds(len(x), device=x.device) if seeds is None else seeds
    return [projections(x.shape, seeds, k, probe, torch.float64).flatten(1) for k in range(probes)]


def given_directions(
    x: Tensor, divergence: Divergence, seeds: Seeds | None, directions: Sequence[Tensor]
) -> list[Tensor]:
    """The caller's directions, checked, float64 [B, D] each."""
    if divergence != "hutchinson":
        raise ValueError(f"directions belong to the divergence 'hutchinson', got them for {divergence!r}")
    if seeds is not None:
        raise ValueError("give seeds or directions, not both, got both")
    if not directions or any(v.shape != x.shape for v in directions):
        shapes = [list(v.shape) for v in directions]
        raise ValueError(f"directions must be one or more tensors of shape {list(x.shape)}, got {shapes}")
    return [v.to(torch.float64).flatten(1) for v in directions]


def pairwise_sum(values: Tensor) -> Tensor:
    """The sum over the columns of [B, D] in an order that does not depend on B: pairs, then pairs of pairs."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        pairs = values[:, :half] + values[:, half : 2 * half]
        values = torch.cat([pairs, values[:, 2 * half :]], 1) if values.shape[1] % 2 else pairs
    return values.sum(1)

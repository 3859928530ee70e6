"""Dormand and Prince's pair in plain torch, with a step size for each row: the state of a sample and its integral."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffkern import tableaus
from diffkern.simulate._divergence import pairwise_sum

MAX_ROUNDS = 10_000


def dormand_prince(
    slope: Callable[[Tensor, Tensor], Tensor], y: Tensor, start: float, end: float, rtol: float, atol: float
) -> Tensor:
    """Dormand-Prince from start to end with a step size for each row of y [B, D + 1]; a row that is there waits."""
    pair = tableaus.DORMAND_PRINCE
    span = end - start
    t = torch.full(y.shape[:1], start, dtype=torch.float64, device=y.device)
    first = slope(y, t)
    scale = atol + rtol * y.abs()
    # Hairer, Norsett and Wanner, section II.4: a step in which the state moves by 1% of its size.
    size, speed = _norm(y / scale), _norm(first / scale)
    h = torch.where((size > 1e-5) & (speed > 1e-5), 0.01 * size / speed, 1e-6 * abs(span)).clamp(max=abs(span))
    h = math.copysign(1.0, span) * h
    for _ in range(MAX_ROUNDS):
        left = end - t
        last = h.abs() >= left.abs()
        h = torch.where(last, left, h)
        wide = h[:, None]
        ks = tableaus.stages(slope, y, t, h, wide, pair, first)
        new = y + wide * tableaus.combine(pair.weights, ks)
        ks.append(slope(new, torch.where(last, end, t + h)))
        error = wide * tableaus.combine(pair.error, ks) / (atol + rtol * torch.maximum(y.abs(), new.abs()))
        norm = _norm(error)
        accepted = norm <= 1.0  # False for NaN: the step is made smaller, until it is too small
        y = torch.where(accepted[:, None], new, y)
        first = torch.where(accepted[:, None], ks[-1], first)
        t = torch.where(accepted, torch.where(last, end, t + h), t)
        if bool((t == end).all()):
            return y
        factor = (0.9 * norm.clamp(min=1e-10) ** -0.2).clamp(0.2, 10.0)
        h = h * torch.where(accepted, factor, torch.where(norm.isfinite(), factor.clamp(max=1.0), 0.2))
        if bool(((h.abs() < 1e-12 * abs(span)) & (t != end)).any()):
            break
    raise RuntimeError(f"rk45 did not reach t = {end:g} with rtol = {rtol:g}: the drift is too steep or not finite")


def _norm(scaled: Tensor) -> Tensor:
    """The larger of the root mean square over a sample's elements and the size of its integral, [B]."""
    elements = scaled[:, :-1]
    return torch.maximum((pairwise_sum(elements.square()) / max(elements.shape[1], 1)).sqrt(), scaled[:, -1].abs())

"""A Brownian path W on [0, 1] for every seed and element, as a function of its address: nothing is stored.

Levy's midpoint construction (Levy 1948; Ciesielski 1961). With Z of node (l, k) the standard normal on stream
``streams.BROWNIAN + 2^l + k``, and Z of W(1) on ``streams.BROWNIAN`` itself:

    W(t) = t Z + sum_{l < LEVELS} 2^(-l/2 - 1) tent(2^l t - k) Z_{l,k},     k = floor(2^l t),  tent(x) = 1 - |2 x - 1|

Node (l, k) moves the middle of [k, k + 1] 2^-l and nothing outside of it. Times are rounded to multiples of 2^-LEVELS,
where the sum is complete: increments between such times have exactly the law of Brownian motion, Cov(W(s), W(t)) =
min(s, t). An increment needs the nodes above its two ends, at most 2 LEVELS of them, each once: `ops.noise_sum` draws
and adds them in one pass. So W(t) - W(s) depends on seed, element, s and t alone: not on the batch, the device, or on
what else was asked for, and any number of steps of any size is along the same path.

This is what torchsde's BrownianInterval and k-diffusion's BrownianTreeNoiseSampler give; those keep a tree of tensors
(or of seeds) on the host, and search it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffkern import streams
from diffkern.modes import kept

__all__ = ["LEVELS", "increment", "noise", "position"]

LEVELS = 20
"""Times are multiples of 2^-LEVELS: 1e-6, a hundredth of the steps of a plan of 10 000 rows."""
_UNITS = 1 << LEVELS


def increment(s: float, t: float, *, normalised: bool = False) -> tuple[Tensor, Tensor]:
    """W(t) - W(s) for 0 <= s < t <= 1 as the terms of `ops.noise_sum`: streams int64 [n] and weights float64 [n].

    ``normalised`` divides by sqrt(t - s), of the rounded times: a standard normal. Raises ValueError for times outside
    [0, 1], and for s >= t after rounding to multiples of 2^-LEVELS. The tensors are shared: do not write into them.
    """
    first, last = _units("s", s), _units("t", t)
    if first >= last:
        raise ValueError(f"s must lie before t by 2^-{LEVELS} at least, got s = {s} and t = {t}")
    return _terms(first, last, normalised)


def noise(
    size: Sequence[int],
    seeds: int | Tensor,
    s: float,
    t: float,
    *,
    normalised: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`increment` drawn: [B, ...] on the device of ``seeds`` (int64 [B]), a path for every element of every sample."""
    from diffkern import ops  # which plans, made of positions and increments alone, do without

    return ops.noise_sum(size, seeds, *increment(s, t, normalised=normalised), dtype)


def position(alpha: float, sigma: float) -> float:
    """Where on [0, 1] a sampler's path is at the level alpha x0 + sigma eps: sqrt(alpha)/(sqrt(alpha) + sqrt(sigma)).

    0 is pure noise and 1 clean data, for every schedule: two plans share the path wherever they pass the same
    alpha/sigma, whatever their ends and steps. It is the logistic function of ln(alpha/sigma)/2, which spreads the
    levels that images are sampled at: 1e-4 < sigma/alpha < 1e4 lies in (0.0099, 0.9901), 0.002 to 80 in (0.10, 0.96).
    Any increasing function of the level makes a Brownian path in another clock, with the same law of each step's noise.
    """
    if not (0.0 <= alpha < math.inf and 0.0 <= sigma < math.inf and alpha + sigma > 0.0):
        raise ValueError(f"alpha and sigma must be finite, not negative and not both 0, got {alpha} and {sigma}")
    return math.sqrt(alpha) / (math.sqrt(alpha) + math.sqrt(sigma))


def _units(argument: str, time: float) -> int:
    if not 0.0 <= time <= 1.0:
        raise ValueError(f"{argument} must lie in [0, 1], got {time}")
    return round(time * _UNITS)


@kept(4096)
def _terms(first: int, last: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """The terms between two times in units of 2^-LEVELS, from the root down."""
    # In integers: tent and t in units of their node's width, so that differences are exact. Then one rounding.
    length = last - first
    nodes, sizes = [0], [float(length)]
    for level in range(LEVELS):
        width = _UNITS >> level
        for k in sorted({first // width, last // width}):
            rise = _tent(last - k * width, width) - _tent(first - k * width, width)
            if rise:
                nodes.append((1 << level) + k)
                sizes.append(rise * math.sqrt(1 << level))
    unit = 1.0 / math.sqrt(length * _UNITS) if normalised else 1.0 / _UNITS
    return torch.tensor(nodes, dtype=torch.int64) + streams.BROWNIAN, torch.tensor(sizes, dtype=torch.float64) * unit


def _tent(x: int, width: int) -> int:
    """Distance to the nearer end of [0, width], 0 outside."""
    return max(0, min(x, width - x))

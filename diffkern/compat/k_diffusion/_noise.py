"""k-diffusion's Brownian noise sampler on noise by address: no tree, no cache, one fused op a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffkern import ops, streams
from diffkern.integers import as_integer
from diffkern.modes import kept

Level = float | Tensor
NoiseSampler = Callable[[Level, Level], Tensor]

OCTAVES = 20
"""The clock is cut at length 2^-1, 2^-2, ... 2^-OCTAVES: each piece has a path of its own."""


class BrownianTreeNoiseSampler:
    """``sampler(sigma, sigma_next)``: (W(t') - W(t))/sqrt(abs(t' - t)) with t = transform(sigma), one path a sample.

    The law is that of k-diffusion's sampler over torchsde's BrownianTree: increments over disjoint intervals are
    independent, nested ones share their noise in proportion to their length, and the same (seed, interval) always has
    the same noise; the numbers are other ones. ``x`` gives shape, dtype and device. ``seed``: an int for a job (sample
    b has ``ops.seeds(seed, B)[b]``), or a list of one int a sample, whose noise then does not depend on the batch; None
    draws one from torch's generator, as k-diffusion does. Levels outside [sigma_min, sigma_max] count as its ends.

    W(t) is a sum of independent paths over [L/2, L], [L/4, L/2], ..., t and L counted from the low end, so that times
    are resolved to 1e-6 of the distance to that end (`diffkern.brownian` resolves 1e-6 of the whole).
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: Level,
        sigma_max: Level,
        seed: int | Sequence[int] | Tensor | None = None,
        transform: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.transform = transform
        first, last = self._clock(sigma_min), self._clock(sigma_max)
        if not (math.isfinite(first) and math.isfinite(last)) or first == last:
            raise ValueError(f"sigma_min and sigma_max must be two finite levels, got {first:g} and {last:g}")
        self.low, self.high = min(first, last), max(first, last)
        self.sign = 1.0 if first < last else -1.0
        self.shape, self.dtype = x.shape, x.dtype
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []))
        job = as_integer(seed)
        if job is not None and not isinstance(seed, Tensor):
            self.seeds = ops.seeds(job, x.shape[0], device=x.device)
        else:
            self.seeds = torch.as_tensor(seed, dtype=torch.int64).to(x.device)
            if self.seeds.shape != x.shape[:1]:
                raise ValueError(
                    f"seed must be an int or one int a sample ({x.shape[0]}), got shape {list(self.seeds.shape)}"
                )

    def __call__(self, sigma: Level, sigma_next: Level) -> Tensor:
        """Standard normal noise of the shape and dtype of x. Levels on a GPU are read; floats are not."""
        t, s = self._clock(sigma), self._clock(sigma_next)
        length = self.high - self.low
        u, v = (min(max((value - self.low) / length, 0.0), 1.0) for value in (t, s))
        found, weights = terms(min(u, v), max(u, v))
        sign = self.sign * (1.0 if u < v else -1.0)
        return ops.noise_sum(self.shape, self.seeds, found, sign * weights, self.dtype)

    def _clock(self, sigma: Level) -> float:
        wide = sigma if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=torch.float64, device="cpu")
        return float(self.transform(wide))


@kept(4096)
def terms(s: float, t: float) -> tuple[Tensor, Tensor]:
    """(streams, weights) of (W(t) - W(s))/sqrt(t - s) for 0 <= s < t <= 1, as `ops.noise_sum` takes them."""
    from diffkern import brownian

    if not s < t:
        raise ValueError(f"the two levels of an increment must differ, got the same place {s:g} on the path")
    found, weights = [], []
    for k in range(OCTAVES + 1):
        # Piece k is [2^-k-1, 2^-k]; the last one reaches down to 0.
        top = 2.0**-k
        bottom = 0.0 if k == OCTAVES else 0.5 * top
        first, last = (min(max((value - bottom) / (top - bottom), 0.0), 1.0) for value in (s, t))
        if round(first * _UNITS) == round(last * _UNITS):
            continue
        nodes, sizes = brownian.increment(first, last)
        found.append(nodes + (k << brownian.LEVELS))
        weights.append(sizes * math.sqrt(top - bottom))
    if not found:
        raise ValueError(f"the two levels of an increment must differ by 1e-6 of their distance, got {s:g} and {t:g}")
    joined = torch.cat(weights)
    # Of the rounded interval, whose length is the variance: the noise is exactly standard.
    return torch.cat(found), joined / joined.square().sum().sqrt()


_UNITS = 1 << 20
assert streams.BROWNIAN + (OCTAVES + 1) * _UNITS < streams.DROPOUT

"""Grids of noise levels from sigma_max down to sigma_min and 0, and the shifts of flow models; see `grids`."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from diffkern.checks import unknown
from diffkern.integers import check_rows, integer
from diffkern.names import ShiftKind

SHIFTS = get_args(ShiftKind)


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """n Karras noise levels and a final 0, [n + 1] float64 (arXiv 2206.00364, eq. 5); n = 1 gives (sigma_max, 0).

    sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i < n.
    """
    _check_levels(n, sigma_min, sigma_max)
    _check_positive("rho", rho)
    low, high = sigma_min ** (1.0 / rho), sigma_max ** (1.0 / rho)
    return _ending_in_0((high + _ramp(n) * (low - high)) ** rho)


def exponential_sigmas(n: int, sigma_min: float, sigma_max: float) -> Tensor:
    """n levels evenly spaced in ln sigma, which is evenly in log-SNR, and a final 0, [n + 1] float64.

    arXiv 2206.00927, section 4.1 ("uniform log-SNR"); the "lu lambdas" of arXiv 2211.01095's code are the same levels.
    """
    return polyexponential_sigmas(n, sigma_min, sigma_max, 1.0)


def polyexponential_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """ln sigma_i = ln sigma_min + (1 - i/(n-1))^rho ln(sigma_max/sigma_min), i < n, and a final 0, [n + 1] float64.

    rho = 1 is `exponential_sigmas`; a larger rho puts more levels at low noise.
    """
    _check_levels(n, sigma_min, sigma_max)
    _check_positive("rho", rho)
    part = (1.0 - _ramp(n)) ** rho
    return _ending_in_0((math.log(sigma_min) + part * (math.log(sigma_max) - math.log(sigma_min))).exp())


def beta_sigmas(n: int, sigma_min: float, sigma_max: float, a: float = 0.6, b: float = 0.6) -> Tensor:
    """n levels at quantiles of a Beta(a, b) distribution over [sigma_min, sigma_max], and a final 0, [n + 1] float64.

    sigma_i = sigma_min + F^-1(1 - i/(n-1)) (sigma_max - sigma_min): with a, b < 1 dense at both ends
    (arXiv 2407.12173). Needs scipy for the quantile function: pip install 'diffkern[grids]'.
    """
    _check_levels(n, sigma_min, sigma_max)
    _check_positive("a", a)
    _check_positive("b", b)
    try:
        from scipy.special import betaincinv
    except ImportError as error:
        raise ImportError("beta_sigmas needs scipy: pip install 'diffkern[grids]'") from error
    part = torch.tensor(
        [float(betaincinv(a, b, 1.0 - x)) for x in _ramp(n).tolist()], dtype=torch.float64, device="cpu"
    )
    return _ending_in_0(sigma_min + part * (sigma_max - sigma_min))


def vp_sigmas(n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps: float = 1e-3) -> Tensor:
    """sqrt(e^(beta_d t^2/2 + beta_min t) - 1) at n times evenly from 1 to eps, and a final 0, [n + 1] float64.

    The levels sigma/alpha of the VP SDE with beta from beta_min to beta_min + beta_d (arXiv 2206.00364, table 1).
    """
    _check_count(n)
    _check_positive("beta_d", beta_d)
    _check_positive("beta_min", beta_min)
    if not 0.0 < eps < 1.0:
        raise ValueError(f"eps must lie in (0, 1), got {eps}")
    t = 1.0 - _ramp(n) * (1.0 - eps)
    return _ending_in_0(torch.expm1(t * (0.5 * beta_d * t + beta_min)).sqrt())


def flow_sigmas(
    n: int,
    *,
    sigma_max: float = 1.0,
    sigma_min: float | None = None,
    shift: float = 1.0,
    mu: float | None = None,
    kind: ShiftKind = "exponential",
    terminal: float | None = None,
) -> Tensor:
    """n levels of a flow, sigma = 1 - t, evenly from sigma_max to sigma_min, shifted once, and a final 0, [n + 1].

    sigma_min is sigma_max/n by default, which makes all n steps equal before the shift. ``shift`` is `shifted`'s,
    ``mu`` with ``kind`` is `dynamically_shifted`'s (not both), ``terminal`` is `stretched`'s, in this order. diffusers
    shifts its default levels twice (its stored ends are shifted already); these are shifted once.
    The times for `euler` and `heun` on a flow schedule are 1 - these.
    """
    _check_count(n)
    low = sigma_max / n if sigma_min is None else sigma_min
    if not 0.0 < low <= sigma_max <= 1.0:
        raise ValueError(
            f"sigma_min and sigma_max must be 0 < sigma_min <= sigma_max <= 1, got {low:g} and {sigma_max:g}"
        )
    if mu is not None and shift != 1.0:
        raise ValueError(f"give shift or mu, not both, got shift = {shift:g} and mu = {mu:g}")
    sigmas = sigma_max + _ramp(n) * (low - sigma_max)
    sigmas = shifted(sigmas, shift) if mu is None else dynamically_shifted(sigmas, mu, kind)
    return _ending_in_0(sigmas if terminal is None else stretched(sigmas, terminal))


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """s sigma/(1 + (s-1) sigma): a flow's levels in [0, 1] moved towards the noise by a shift s > 1.

    The odds (1-sigma)/sigma are divided by s, so the log-SNR falls by 2 ln s (arXiv 2403.03206, eq. 23). 0 and 1 stay.
    """
    _check_positive("shift", shift)
    _check_unit(sigmas)
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def dynamically_shifted(sigmas: Tensor, mu: float, kind: ShiftKind = "exponential") -> Tensor:
    """`shifted` by s = e^mu ("exponential") or s = mu ("linear"): s/(s + 1/sigma - 1); see `resolution_mu`."""
    if kind not in SHIFTS:
        raise ValueError(unknown("kind", kind, SHIFTS))
    if not math.isfinite(mu) or (kind == "linear" and mu <= 0):
        raise ValueError(f"mu must be {'positive' if kind == 'linear' else 'finite'}, got {mu}")
    return shifted(sigmas, math.exp(mu) if kind == "exponential" else mu)


def stretched(sigmas: Tensor, terminal: float) -> Tensor:
    """1 - (1-sigma) (1-terminal)/(1-sigma_last): the last, lowest level becomes ``terminal``, 1 stays 1."""
    if not 0.0 <= terminal < 1.0:
        raise ValueError(f"terminal must lie in [0, 1), got {terminal}")
    _check_unit(sigmas)
    if sigmas.ndim != 1 or not len(sigmas) or float(sigmas[-1]) >= 1.0:
        raise ValueError(f"sigmas must be a list that ends below 1, got {sigmas.tolist()}")
    return 1.0 - (1.0 - sigmas) * ((1.0 - terminal) / (1.0 - float(sigmas[-1])))


def resolution_mu(
    tokens: int, base_tokens: int = 256, base: float = 0.5, most_tokens: int = 4096, most: float = 1.15
) -> float:
    """mu for an image of that many tokens: the line through (base_tokens, base) and (most_tokens, most)."""
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if base_tokens == most_tokens:
        raise ValueError(f"base_tokens and most_tokens must differ, got {base_tokens} for both")
    return base + (tokens - base_tokens) * (most - base) / (most_tokens - base_tokens)


def _ramp(n: int) -> Tensor:
    """i/(n-1), [n]; 0 for n = 1."""
    return torch.arange(n, dtype=torch.float64, device="cpu") / max(n - 1, 1)


def _ending_in_0(levels: Tensor) -> Tensor:
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64, device="cpu")])


def _check_count(n: int) -> None:
    check_rows("n", integer("n", n), 1)


def _check_levels(n: int, sigma_min: float, sigma_max: float) -> None:
    _check_count(n)
    if not 0.0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f"sigma_min and sigma_max must be 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")


def _check_positive(argument: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ValueError(f"{argument} must be positive, got {value}")


def _check_unit(sigmas: Tensor) -> None:
    if not bool(((sigmas >= 0) & (sigmas <= 1)).all()):
        bad = sigmas[~((sigmas >= 0) & (sigmas <= 1))].flatten()[0].item()
        raise ValueError(f"sigmas of a flow must lie in [0, 1], got {bad:g}")

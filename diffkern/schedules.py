"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, in float64.

Time conventions, which differ between code bases as much as the formulas do:

| schedule | time t | noise at | data at | alpha (signal rate) | sigma (noise rate) | velocity dx/dt points |
|---|---|---|---|---|---|---|
| `DiscreteSchedule` | int 0..T-1; -1 is clean data | T-1 | -1 | sqrt(abar_t) | sqrt(1 - abar_t) | to noise |
| `FlowSchedule` | float 0..1 | 0 | 1 | t | 1 - (1 - sigma_min) t | to data |
| `EDMSchedule` | sigma >= 0 | sigma_max | 0 | 1 | t | to noise |

The lectures count diffusion steps 1..T; index t here is their step t+1, so t = 0 already holds one step of noise.

Sources: lectures 000, 001, 002 (DDPM, arXiv 2006.11239; cosine, arXiv 2102.09672), 000 and 003 (flow matching,
arXiv 2210.02747), EDM (arXiv 2206.00364). Lecture 000 prints a last linear beta of 0.04; the paper and every other
implementation use 0.02, as here.

A time may be a Python number or a tensor; results are float64 tensors of its shape on its device. On the CPU a time
outside the schedule raises ValueError; on a device, where looking would stall it, the value is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkern._discrete import DiscreteSchedule, float64_vector
from diffkern._schedule import Schedule, Time, as_time, check_times

__all__ = [
    "DiscreteSchedule",
    "EDMSchedule",
    "FlowSchedule",
    "Schedule",
    "Time",
    "as_time",
    "cosine",
    "cosine_arc",
    "edm",
    "flow",
    "from_alphas_cumprod",
    "from_betas",
    "karras_sigmas",
    "linear",
    "scaled_linear",
]


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Optimal-transport path: alpha = t, sigma = 1 - (1 - sigma_min) t, t in [0, 1], noise at 0 and data at 1.

    Its velocity is data - (1 - sigma_min) noise. Lectures 000 and 003; arXiv 2210.02747, eq. 20-23.
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.sigma_min < 1.0:
            raise ValueError(f"sigma_min must lie in [0, 1), got {self.sigma_min}")

    name = "flow"
    default_prediction = "velocity"
    noise_end = 0.0
    data_end = 1.0

    def _times(self, t: Time) -> Tensor:
        t = as_time(t).to(torch.float64)
        return torch.where(check_times((t >= 0) & (t <= 1), t, "lie in [0, 1] (0 is noise, 1 is data)"), t, torch.nan)

    def alpha(self, t: Time) -> Tensor:
        """t."""
        return self._times(t)

    def sigma(self, t: Time) -> Tensor:
        """1 - (1 - sigma_min) t, written so that it is exactly sigma_min at t = 1."""
        t = self._times(t)
        return (1.0 - t) + self.sigma_min * t

    def alpha_dot(self, t: Time) -> Tensor:
        """1."""
        return torch.ones_like(self._times(t))

    def sigma_dot(self, t: Time) -> Tensor:
        """-(1 - sigma_min)."""
        return torch.full_like(self._times(t), -(1.0 - self.sigma_min))


@dataclass(frozen=True)
class EDMSchedule(Schedule):
    """Variance-exploding schedule whose time is sigma itself: x = x0 + sigma eps (arXiv 2206.00364).

    Carries the Karras grid of noise levels and the preconditioning of the prediction ``edm``.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )
        for argument, value in (("rho", self.rho), ("sigma_data", self.sigma_data)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{argument} must be positive, got {value}")

    name = "edm"
    default_prediction = "edm"
    data_end = 0.0

    @property
    def noise_end(self) -> float:  # type: ignore[override]
        """sigma_max."""
        return self.sigma_max

    def _times(self, t: Time) -> Tensor:
        t = as_time(t).to(torch.float64)
        return torch.where(check_times((t >= 0) & torch.isfinite(t), t, "be a finite sigma >= 0"), t, torch.nan)

    def alpha(self, t: Time) -> Tensor:
        """1."""
        return torch.ones_like(self._times(t))

    def sigma(self, t: Time) -> Tensor:
        """t."""
        return self._times(t)

    def alpha_dot(self, t: Time) -> Tensor:
        """0."""
        return torch.zeros_like(self._times(t))

    def sigma_dot(self, t: Time) -> Tensor:
        """1."""
        return torch.ones_like(self._times(t))

    def sigmas(self, n: int) -> Tensor:
        """n noise levels from sigma_max to sigma_min and a final 0, [n + 1]: see `karras_sigmas`."""
        return karras_sigmas(n, self.sigma_min, self.sigma_max, self.rho)

    def preconditioning(self, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in, c_noise): D = c_skip x + c_out F(c_in x, c_noise), arXiv 2206.00364, table 1."""
        sigma = self._times(t)
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), total.rsqrt(), 0.25 * sigma.log()

    def model_time(self, prediction: str, t: Time) -> Tensor:
        """c_noise for ``edm``, else sigma."""
        return self.preconditioning(t)[3] if prediction == "edm" else self._times(t)

    def input_scale(self, prediction: str, t: Time) -> Tensor:
        """c_in for ``edm``, else 1."""
        return self.preconditioning(t)[2] if prediction == "edm" else torch.ones_like(self._times(t))


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """n Karras noise levels and a final 0, [n + 1] float64 (arXiv 2206.00364, eq. 5); n = 1 gives (sigma_max, 0).

    sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i < n.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 0.0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f"sigma_min and sigma_max must be 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")
    if not 0.0 < rho < math.inf:
        raise ValueError(f"rho must be positive, got {rho}")
    ramp = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    low, high = sigma_min ** (1.0 / rho), sigma_max ** (1.0 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def from_alphas_cumprod(
    alphas_cumprod: Tensor | Iterable[float], name: str = "from_alphas_cumprod"
) -> DiscreteSchedule:
    """A schedule from its table abar_0..abar_{T-1} (another library's float32 table keeps its values)."""
    return DiscreteSchedule(alphas_cumprod, name)


def from_betas(betas: Tensor | Iterable[float], name: str = "from_betas") -> DiscreteSchedule:
    """A schedule from beta_0..beta_{T-1}, each in (0, 1): abar_t = prod_{i<=t} (1 - beta_i)."""
    table = float64_vector("betas", betas)
    bad = ~((table > 0) & (table < 1))
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(f"beta must lie in (0, 1), got betas[{i}] = {float(table[i])}")
    return DiscreteSchedule(torch.cumprod(1.0 - table, 0), name)


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
    """Betas evenly spaced from beta_start to beta_end (lectures 000, 002; arXiv 2006.11239)."""
    return from_betas(torch.linspace(beta_start, beta_end, _steps(T), dtype=torch.float64), "linear")


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> DiscreteSchedule:
    """Square roots of the betas evenly spaced: the schedule of latent diffusion (arXiv 2112.10752)."""
    for argument, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"beta must lie in (0, 1), got {argument} = {value}")
    roots = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), _steps(T), dtype=torch.float64)
    return from_betas(roots**2, "scaled_linear")


def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> DiscreteSchedule:
    """beta_i = min(1 - f((i+1)/T)/f(i/T), max_beta) with f(t) = cos^2((t+s)/(1+s) pi/2).

    Lecture 002; arXiv 2102.09672, eq. 17.
    """
    if not 0.0 <= s < math.inf:
        raise ValueError(f"s must be >= 0, got {s}")
    f = torch.cos((torch.arange(_steps(T) + 1, dtype=torch.float64) / T + s) / (1.0 + s) * (math.pi / 2)) ** 2
    return from_betas((1.0 - f[1:] / f[:-1]).clamp(max=max_beta), "cosine")


def cosine_arc(T: int = 1000, eps: float = 1e-5) -> DiscreteSchedule:
    """abar = (cos(pi t/T) + 1)/2 for the steps t = 1..T, kept inside [eps, 1 - eps].

    Lecture 000, slide "DDPM – Noise Schedule".
    Signal and noise rate move uniformly on a quarter circle. Steps whose values meet the same bound add no noise.
    """
    if not 0.0 < eps < 0.5:
        raise ValueError(f"eps must lie in (0, 0.5), got {eps}")
    t = torch.arange(1, _steps(T) + 1, dtype=torch.float64) / T
    return DiscreteSchedule((0.5 * (torch.cos(math.pi * t) + 1.0)).clamp(eps, 1.0 - eps), "cosine_arc")


def flow(sigma_min: float = 0.0) -> FlowSchedule:
    """See `FlowSchedule`."""
    return FlowSchedule(sigma_min)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, sigma_data: float = 0.5) -> EDMSchedule:
    """See `EDMSchedule`."""
    return EDMSchedule(sigma_min, sigma_max, rho, sigma_data)


def _steps(T: int) -> int:
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"T must be an integer of at least 1, got {T!r}")
    return T

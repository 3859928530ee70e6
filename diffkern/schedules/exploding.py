"""Variance-exploding schedules, alpha = 1: VE, dx = base^t dw, EDM; reached through `diffkern.schedules`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkern.names import Prediction
from diffkern.schedules.base import Schedule, Time, UnitTime, as_log_snr, check_log_snrs, times_within
from diffkern.schedules.predictions import prediction_of
from diffkern.schedules.spacings import karras_sigmas

__all__ = ["EDMSchedule", "ExponentialVESchedule", "VESchedule"]


class _Exploding(UnitTime):
    """alpha = 1: no drift, log_snr = -2 ln sigma."""

    time_eps = 1e-5

    def alpha(self, t: Time) -> Tensor:
        """1."""
        return torch.ones_like(self._times(t))

    def alpha_dot(self, t: Time) -> Tensor:
        """0."""
        return torch.zeros_like(self._times(t))

    def drift(self, t: Time) -> Tensor:
        """0."""
        return torch.zeros_like(self._times(t))

    def log_snr(self, t: Time) -> Tensor:
        """-2 ln sigma."""
        return -2.0 * self.sigma(t).log()

    def sigma_ve(self, t: Time) -> Tensor:
        """Sigma."""
        return self.sigma(t)


@dataclass(frozen=True)
class VESchedule(_Exploding):
    """VE SDE with geometric noise: sigma = sigma_min (sigma_max/sigma_min)^t, dx = sigma sqrt(2 ln(max/min)) dw.

    NCSN's geometric sigma_1..sigma_L with t for the index: arXiv 1907.05600; 2011.13456, eq. 30; lectures 001, 003.
    Data at t = 0 hold noise of sigma_min already; the SDE started from clean data at t = 0 would have variance
    sigma^2 - sigma_min^2. The prior is N(0, sigma_max^2 I). Samplers and training stay above t = 1e-5.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    name = "ve"

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Time) -> Tensor:
        """sigma_min^(1-t) sigma_max^t."""
        t = self._times(t)
        return torch.where(t == 1, self.sigma_max, self.sigma_min * (self._rate * t).exp())

    def sigma_dot(self, t: Time) -> Tensor:
        """sigma ln(sigma_max/sigma_min)."""
        return self._rate * self.sigma(t)

    def diffusion_squared(self, t: Time) -> Tensor:
        """2 sigma^2 ln(sigma_max/sigma_min)."""
        return 2.0 * self._rate * self.sigma(t) ** 2

    def log_snr_dot(self, t: Time) -> Tensor:
        """-2 ln(sigma_max/sigma_min)."""
        return torch.full_like(self._times(t), -2.0 * self._rate)

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """ln(sigma/sigma_min)/ln(sigma_max/sigma_min) with ln sigma = -log_snr/2."""
        value = self._log_snrs(log_snr, -2.0 * math.log(self.sigma_max), -2.0 * math.log(self.sigma_min))
        return ((-0.5 * value - math.log(self.sigma_min)) / self._rate).clamp(0.0, 1.0)


@dataclass(frozen=True)
class ExponentialVESchedule(_Exploding):
    """dx = base^t dw: sigma^2 = (base^(2t) - 1)/(2 ln base), clean data at t = 0.

    Lectures 001 and 003 have base = e, dx = e^t dw. That ends at sigma(1) = 1.79, too little to hide data of unit
    variance; for images a base of 25 (sigma(1) = 9.9) is usual. Samplers and training stay above t = 1e-5.
    """

    base: float = math.e

    name = "ve_exponential"

    def __post_init__(self) -> None:
        if not 1.0 < self.base < math.inf:
            raise ValueError(f"base must be a finite number > 1, got {self.base}")

    @property
    def _rate(self) -> float:
        return 2.0 * math.log(self.base)

    def sigma(self, t: Time) -> Tensor:
        """sqrt((base^(2t) - 1)/(2 ln base))."""
        return (torch.expm1(self._rate * self._times(t)) / self._rate).sqrt()

    def sigma_dot(self, t: Time) -> Tensor:
        """g^2/(2 sigma); inf at t = 0."""
        return 0.5 * self.diffusion_squared(t) / self.sigma(t)

    def diffusion_squared(self, t: Time) -> Tensor:
        """base^(2t)."""
        return (self._rate * self._times(t)).exp()

    def log_snr_dot(self, t: Time) -> Tensor:
        """-g^2/sigma^2."""
        return self._rate / torch.expm1(-self._rate * self._times(t))

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """ln(1 + 2 ln(base) sigma^2)/(2 ln base) with sigma^2 = e^-log_snr."""
        value = self._log_snrs(log_snr, lowest=float(self.log_snr(1.0)))
        return (torch.log1p(self._rate * (-value).exp()) / self._rate).clamp(max=1.0)


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
    default_prediction: Prediction = "edm"
    data_end = 0.0

    @property
    def noise_end(self) -> float:  # type: ignore[override]
        """sigma_max."""
        return self.sigma_max

    def _times(self, t: Time) -> Tensor:
        return times_within(t, 0.0, torch.finfo(torch.float64).max, "be a finite sigma >= 0")

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

    def drift(self, t: Time) -> Tensor:
        """0."""
        return torch.zeros_like(self._times(t))

    def diffusion_squared(self, t: Time) -> Tensor:
        """2 sigma: dx = sqrt(2 sigma) dw with sigma itself as the time."""
        return 2.0 * self._times(t)

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """e^(-log_snr/2); any level from 0 (log_snr = +inf) up, not only sigma_min..sigma_max."""
        value = as_log_snr(log_snr)
        bounds = check_log_snrs(value, -2.0 * math.log(torch.finfo(torch.float64).max), math.inf)
        return torch.where(bounds, (-0.5 * value).exp(), torch.nan)

    @property
    def time_range(self) -> tuple[float, float]:
        """(sigma_min, sigma_max)."""
        return self.sigma_min, self.sigma_max

    def sigmas(self, n: int) -> Tensor:
        """n noise levels from sigma_max to sigma_min and a final 0, [n + 1]: see `karras_sigmas`."""
        return karras_sigmas(n, self.sigma_min, self.sigma_max, self.rho)

    def preconditioning(self, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in, c_noise): D = c_skip x + c_out F(c_in x, c_noise), arXiv 2206.00364, table 1."""
        sigma = self._times(t)
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), total.rsqrt(), 0.25 * sigma.log()

    def model_time(self, prediction: Prediction, t: Time) -> Tensor:
        """c_noise for ``edm``, else sigma."""
        return self.preconditioning(t)[3] if prediction_of(self, prediction) == "edm" else self._times(t)

    def input_scale(self, prediction: Prediction, t: Time) -> Tensor:
        """c_in for ``edm``, else 1."""
        return (
            self.preconditioning(t)[2] if prediction_of(self, prediction) == "edm" else torch.ones_like(self._times(t))
        )

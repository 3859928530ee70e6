"""Continuous schedules with alpha^2 + sigma^2 = 1 and sub-VP, t in [0, 1]; reached through `diffkern.schedules`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkern.schedules.base import (
    LogSNRDefined,
    Time,
    UnitTime,
    VariancePreserving,
)

__all__ = ["CosineSchedule", "LaplaceSchedule", "LinearLogSNRSchedule", "SubVPSchedule", "VPSchedule"]


@dataclass(frozen=True)
class LinearBeta(UnitTime):
    """What VP and sub-VP share: beta(t) = beta_min + t (beta_max - beta_min) and alpha = exp(-1/2 int_0^t beta)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    time_eps = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"beta_min and beta_max must be 0 < beta_min <= beta_max, got {self.beta_min} and {self.beta_max}"
            )

    def beta(self, t: Time) -> Tensor:
        """beta_min + t (beta_max - beta_min)."""
        return self.beta_min + self._times(t) * (self.beta_max - self.beta_min)

    def beta_integral(self, t: Time) -> Tensor:
        """B(t) = int_0^t beta = t beta_min + t^2/2 (beta_max - beta_min); the log-mean coefficient is -B/2."""
        t = self._times(t)
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _time_of_integral(self, total: Tensor) -> Tensor:
        """The t with B(t) = total, in the form of the quadratic's root that does not cancel."""
        root = (self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * total).sqrt()
        return (2.0 * total / (self.beta_min + root)).clamp(0.0, 1.0)

    def alpha(self, t: Time) -> Tensor:
        """e^(-B/2)."""
        return (-0.5 * self.beta_integral(t)).exp()

    def alpha_dot(self, t: Time) -> Tensor:
        """-beta alpha/2."""
        return self.drift(t) * self.alpha(t)

    def drift(self, t: Time) -> Tensor:
        """-beta/2."""
        return -0.5 * self.beta(t)

    @property
    def prior_std(self) -> float:
        """1, what remains of the signal (alpha(1) = 0.0066 with the default betas) neglected."""
        return 1.0


@dataclass(frozen=True)
class VPSchedule(LinearBeta):
    """VP SDE dx = -beta/2 x dt + sqrt(beta) dw with beta(t) linear: alpha = e^(-B/2), sigma = sqrt(1 - e^-B).

    arXiv 2011.13456, eq. 11 and 33; lecture 001. The discrete `linear` schedule of T steps with betas
    beta(i/T)/T tends to it (T = 1000, beta 0.0001 .. 0.02). Samplers and training stay above t = 1e-3.
    """

    name = "vp"

    def sigma(self, t: Time) -> Tensor:
        """sqrt(1 - e^-B)."""
        return (-torch.expm1(-self.beta_integral(t))).sqrt()

    def sigma_dot(self, t: Time) -> Tensor:
        """beta alpha^2/(2 sigma); inf at t = 0."""
        return 0.5 * self.beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def diffusion_squared(self, t: Time) -> Tensor:
        """Beta."""
        return self.beta(t)

    def log_snr(self, t: Time) -> Tensor:
        """-ln(e^B - 1), as -B - ln(1 - e^-B)."""
        total = self.beta_integral(t)
        return -total - (-torch.expm1(-total)).log()

    def log_snr_dot(self, t: Time) -> Tensor:
        """-beta/sigma^2."""
        return self.beta(t) / torch.expm1(-self.beta_integral(t))

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """B = ln(1 + e^-log_snr), then the quadratic's root."""
        value = self._log_snrs(log_snr, lowest=float(self.log_snr(1.0)))
        return self._time_of_integral(torch.nn.functional.softplus(-value, threshold=700.0))


@dataclass(frozen=True)
class SubVPSchedule(LinearBeta):
    """Sub-VP SDE: alpha = e^(-B/2), sigma = 1 - e^-B, so less variance than VP at every t (arXiv 2011.13456, eq. 14).

    dx = -beta/2 x dt + sqrt(beta (1 - e^-2B)) dw. Samplers and training stay above t = 1e-3.
    """

    name = "sub_vp"

    def sigma(self, t: Time) -> Tensor:
        """1 - e^-B, which is alpha's 1 - alpha^2 and not its root."""
        return -torch.expm1(-self.beta_integral(t))

    def sigma_dot(self, t: Time) -> Tensor:
        """beta e^-B."""
        return self.beta(t) * (-self.beta_integral(t)).exp()

    def diffusion_squared(self, t: Time) -> Tensor:
        """beta (1 - e^-2B)."""
        return self.beta(t) * -torch.expm1(-2.0 * self.beta_integral(t))

    def log_snr(self, t: Time) -> Tensor:
        """-B - 2 ln(1 - e^-B)."""
        total = self.beta_integral(t)
        return -total - 2.0 * (-torch.expm1(-total)).log()

    def log_snr_dot(self, t: Time) -> Tensor:
        """-beta (1 + e^-B)/(1 - e^-B)."""
        decay = -self.beta_integral(t)
        return self.beta(t) * (1.0 + decay.exp()) / torch.expm1(decay)

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """With r = e^(log_snr/2) = alpha/(1 - alpha^2): alpha = 2r/(1 + sqrt(1 + 4r^2)), B = -2 ln alpha."""
        value = self._log_snrs(log_snr, lowest=float(self.log_snr(1.0)))
        inverse = (-0.5 * value).exp()  # 1/r; 1 - alpha^2 = alpha/r, which does not cancel where alpha -> 1
        alpha = 2.0 / (inverse + torch.hypot(inverse, torch.tensor(2.0, dtype=torch.float64, device=value.device)))
        small = torch.log1p(-(alpha * inverse).clamp(max=0.5))
        return self._time_of_integral(-torch.where(alpha * inverse < 0.5, small, 2.0 * alpha.log()))


@dataclass(frozen=True)
class CosineSchedule(VariancePreserving):
    """abar = cos^2(theta)/cos^2(theta_0), theta = (t+s)/(1+s) pi/2, theta_0 = s/(1+s) pi/2: continuous cosine.

    arXiv 2102.09672, eq. 17, and lectures 000 and 002, without the bound on beta: alpha is 0 at t = 1. With s = 0
    (default) alpha = cos(pi t/2) and sigma = sin(pi t/2), which is lecture 000's abar = (cos(pi t) + 1)/2 without its
    bounds, and with time reversed the cosine path of flow matching. The discrete `cosine` schedule has s = 0.008.
    """

    s: float = 0.0

    name = "cosine_vp"

    def __post_init__(self) -> None:
        if not 0.0 <= self.s < math.inf:
            raise ValueError(f"s must be a finite number >= 0, got {self.s}")

    @property
    def _speed(self) -> float:
        return 0.5 * math.pi / (1.0 + self.s)

    @property
    def _start(self) -> float:
        return self._speed * self.s

    def _cos(self, t: Time) -> Tensor:
        """cos theta as the sine of the angle left, so that it is exactly 0 at t = 1."""
        return (self._speed * (1.0 - self._times(t))).sin()

    def _sin(self, t: Time) -> Tensor:
        return (self._speed * self._times(t) + self._start).sin()

    def alpha(self, t: Time) -> Tensor:
        """cos(theta)/cos(theta_0)."""
        return self._cos(t) / math.sin(self._speed)

    def sigma(self, t: Time) -> Tensor:
        """sqrt(sin(theta - theta_0) sin(theta + theta_0))/cos(theta_0): 1 - abar without cancellation."""
        moved = self._speed * self._times(t)
        if self.s == 0:
            return moved.sin()
        return (moved.sin() * (moved + 2.0 * self._start).sin()).clamp(min=0.0).sqrt() / math.sin(self._speed)

    def alpha_dot(self, t: Time) -> Tensor:
        """-theta_dot sin(theta)/cos(theta_0)."""
        return -self._speed * self._sin(t) / math.sin(self._speed)

    def sigma_dot(self, t: Time) -> Tensor:
        """theta_dot sin(theta) cos(theta)/(cos^2(theta_0) sigma); inf at t = 0 if s > 0."""
        cos = self._cos(t)
        if self.s == 0:
            return self._speed * cos
        return self._speed * self._sin(t) * cos / (math.sin(self._speed) ** 2 * self.sigma(t))

    def drift(self, t: Time) -> Tensor:
        """-theta_dot tan(theta); -inf at t = 1."""
        return -self._speed * self._sin(t) / self._cos(t)

    def log_snr_dot(self, t: Time) -> Tensor:
        """2 f/sigma^2; -inf at both ends."""
        sigma = self.sigma(t)
        return torch.where(sigma == 0, -math.inf, 2.0 * self.drift(t) / sigma**2)

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """theta - theta_0 from its sine and cosine; with s = 0, 2/pi atan(e^(-log_snr/2))."""
        value = self._log_snrs(log_snr)
        alpha, sigma = torch.sigmoid(value).sqrt(), torch.sigmoid(-value).sqrt()
        cos0, sin0 = math.sin(self._speed), math.sin(self._start)
        cos, sin = cos0 * alpha, (sin0**2 + cos0**2 * sigma**2).sqrt()
        # sin(a - b) = (sin^2 a - sin^2 b)/sin(a + b), whose numerator is known without cancellation.
        total = sin * cos0 + cos * sin0
        moved = torch.where(total > 0, cos0**2 * sigma**2 / total, 0.0)
        return (torch.atan2(moved, cos * cos0 + sin * sin0) / self._speed).clamp(0.0, 1.0)


@dataclass(frozen=True)
class LinearLogSNRSchedule(LogSNRDefined):
    """log_snr falls evenly from ``highest`` at t = 0 to ``lowest`` at t = 1 (arXiv 2107.00630, its starting values)."""

    highest: float = 13.3
    lowest: float = -5.0

    name = "linear_log_snr"

    def __post_init__(self) -> None:
        if not -math.inf < self.lowest < self.highest < math.inf:
            raise ValueError(f"lowest and highest must be finite, lowest < highest, got {self.lowest}, {self.highest}")

    def log_snr(self, t: Time) -> Tensor:
        """highest + t (lowest - highest)."""
        t = self._times(t)
        return self.highest * (1.0 - t) + self.lowest * t

    def log_snr_dot(self, t: Time) -> Tensor:
        """lowest - highest."""
        return torch.full_like(self._times(t), self.lowest - self.highest)

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """(highest - log_snr)/(highest - lowest)."""
        return (self.highest - self._log_snrs(log_snr, self.lowest, self.highest)) / (self.highest - self.lowest)


@dataclass(frozen=True)
class LaplaceSchedule(LogSNRDefined):
    """log_snr has a Laplace density of mean mu and scale b for uniform t (arXiv 2407.03297, table 1).

    log_snr = mu - b sgn(1/2 - t) ln(1 - 2 (1-eps) |1/2 - t|); eps bounds it, at mu +- b ln(1/eps). (Other code adds eps
    to the logarithm's argument, which makes log_snr rise for a moment at t = 1/2.)
    """

    mu: float = 0.0
    b: float = 0.5
    eps: float = 1e-6

    name = "laplace_vp"

    def __post_init__(self) -> None:
        if not math.isfinite(self.mu):
            raise ValueError(f"mu must be finite, got {self.mu}")
        if not 0.0 < self.b < math.inf:
            raise ValueError(f"b must be positive, got {self.b}")
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps must lie in (0, 1), got {self.eps}")

    def _inside(self, t: Tensor) -> Tensor:
        """1 - 2 (1-eps) |1/2 - t| from the distance to the nearer end."""
        return self.eps + 2.0 * (1.0 - self.eps) * torch.minimum(t, 1.0 - t)

    def log_snr(self, t: Time) -> Tensor:
        """The class's formula."""
        t = self._times(t)
        return self.mu - self.b * torch.sign(0.5 - t) * self._inside(t).log()

    def log_snr_dot(self, t: Time) -> Tensor:
        """-2 b (1-eps)/(1 - 2 (1-eps) |1/2 - t|)."""
        return -2.0 * self.b * (1.0 - self.eps) / self._inside(self._times(t))

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """From e^(-|log_snr - mu|/b) = 1 - 2 (1-eps) |1/2 - t|."""
        reach = -self.b * math.log(self.eps)
        away = self._log_snrs(log_snr, self.mu - reach, self.mu + reach) - self.mu
        end = (((-away.abs() / self.b).exp() - self.eps) / (2.0 * (1.0 - self.eps))).clamp(min=0.0)
        return torch.where(away >= 0, end, 1.0 - end)

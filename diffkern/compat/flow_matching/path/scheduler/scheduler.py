"""alpha_t, sigma_t and their derivatives by time; noise at t = 0, data at t = 1 (arXiv 2412.06264, section 4.8).

Plain torch in the dtype and shape of t, differentiable: these are numbers for each sample, not for each element.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SchedulerOutput:
    """The rates at the times a scheduler was asked for."""

    alpha_t: Tensor
    sigma_t: Tensor
    d_alpha_t: Tensor
    """The derivative of alpha by t."""
    d_sigma_t: Tensor
    """The derivative of sigma by t."""


class Scheduler(ABC):
    """Rates of a path; anything with this call will do in its place."""

    @abstractmethod
    def __call__(self, t: Tensor) -> SchedulerOutput:
        """The rates at t, any shape."""

    @abstractmethod
    def snr_inverse(self, snr: Tensor) -> Tensor:
        """The time at which alpha/sigma is ``snr``."""


class ConvexScheduler(Scheduler):
    """alpha = kappa, sigma = 1 - kappa."""

    @abstractmethod
    def __call__(self, t: Tensor) -> SchedulerOutput:
        """The rates at t, any shape."""

    @abstractmethod
    def kappa_inverse(self, kappa: Tensor) -> Tensor:
        """The time at which alpha is ``kappa``."""

    def snr_inverse(self, snr: Tensor) -> Tensor:
        """kappa = snr/(1 + snr)."""
        return self.kappa_inverse(snr / (1.0 + snr))


class CondOTScheduler(ConvexScheduler):
    """alpha = t, sigma = 1 - t: straight lines (arXiv 2210.02747, 2209.03003)."""

    def __call__(self, t: Tensor) -> SchedulerOutput:
        one = torch.ones_like(t)
        return SchedulerOutput(t, 1.0 - t, one, -one)

    def kappa_inverse(self, kappa: Tensor) -> Tensor:
        return kappa


class PolynomialConvexScheduler(ConvexScheduler):
    """alpha = t^n, sigma = 1 - t^n, n > 0."""

    def __init__(self, n: float | int) -> None:
        if not isinstance(n, float | int):
            raise AssertionError(f"n must be a float or an int, got {n!r}")
        if not n > 0:
            raise AssertionError(f"n must be positive, got {n}")
        self.n = n

    def __call__(self, t: Tensor) -> SchedulerOutput:
        alpha, slope = t**self.n, self.n * t ** (self.n - 1)
        return SchedulerOutput(alpha, 1.0 - alpha, slope, -slope)

    def kappa_inverse(self, kappa: Tensor) -> Tensor:
        return torch.pow(kappa, 1.0 / self.n)


class VPScheduler(Scheduler):
    """alpha = exp(-T/2), sigma = sqrt(1 - exp(-T)), T = (1-t) beta_min + (1-t)^2/2 (beta_max - beta_min).

    The variance-preserving path of arXiv 2011.13456 with its time reversed.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min, self.beta_max = beta_min, beta_max
        super().__init__()

    def __call__(self, t: Tensor) -> SchedulerOutput:
        left, rise = 1.0 - t, self.beta_max - self.beta_min
        total = 0.5 * left**2 * rise + left * self.beta_min
        rate = 0.5 * (left * rise + self.beta_min)  # -T'/2
        kept = torch.exp(-total)
        alpha, sigma = torch.exp(-0.5 * total), torch.sqrt(1.0 - kept)
        return SchedulerOutput(alpha, sigma, rate * alpha, -rate * kept / sigma)

    def snr_inverse(self, snr: Tensor) -> Tensor:
        total = -torch.log(snr**2 / (snr**2 + 1.0))
        low, rise = self.beta_min, self.beta_max - self.beta_min
        return 1.0 - (-low + torch.sqrt(low**2 + 2.0 * rise * total)) / rise


class LinearVPScheduler(Scheduler):
    """alpha = t, sigma = sqrt(1 - t^2)."""

    def __call__(self, t: Tensor) -> SchedulerOutput:
        sigma = (1.0 - t**2) ** 0.5
        return SchedulerOutput(t, sigma, torch.ones_like(t), -t / sigma)

    def snr_inverse(self, snr: Tensor) -> Tensor:
        return torch.sqrt(snr**2 / (1.0 + snr**2))


class CosineScheduler(Scheduler):
    """alpha = sin(pi t/2), sigma = cos(pi t/2)."""

    def __call__(self, t: Tensor) -> SchedulerOutput:
        angle = 0.5 * math.pi
        alpha, sigma = torch.sin(angle * t), torch.cos(angle * t)
        return SchedulerOutput(alpha, sigma, angle * sigma, -angle * alpha)

    def snr_inverse(self, snr: Tensor) -> Tensor:
        return 2.0 * torch.atan(snr) / math.pi

"""Densities of training times in closed form; see `objectives.time_sampling`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffkern.objectives._time_sampler import TimeSampler, level_index, require
from diffkern.schedules.base import Schedule, as_float64, as_time, check_constants
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule


def _normal(x: Tensor, mean: float, std: float) -> Tensor:
    """The density N(x; mean, std^2)."""
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2.0 * math.pi))


def _check_normal(mean: float, std: float) -> None:
    check_constants(mean=mean, std=std)
    if not math.isfinite(mean):
        raise ValueError(f"mean must be finite, got {mean}")
    if not 0.0 < std < math.inf:
        raise ValueError(f"std must be positive and finite, got {std}")


class _Share(TimeSampler):
    """A density on [0, 1], the share of the way from data to noise."""

    def density(self, t: Tensor, schedule: Schedule | None = None) -> Tensor:
        """cdf((t+1)/T) - cdf(t/T), or pdf divided by the length of the time range."""
        t = t if isinstance(t, Tensor) else as_time(t)
        if isinstance(schedule, DiscreteSchedule):
            k = level_index(schedule, t)
            return self.cdf((k + 1.0) / schedule.T) - self.cdf(k / schedule.T)
        t = as_float64(t)
        if schedule is None:
            require((t >= 0) & (t <= 1), t, "lie in [0, 1] (0 is data, 1 is noise)")
            return self.pdf(t)
        low, high = self._range(schedule)
        require((t >= low) & (t <= high), t, f"lie in [{low:g}, {high:g}], the training times of {schedule.name}")
        share = (t - low if schedule.direction > 0 else high - t) / (high - low)
        return self.pdf(share.clamp(0.0, 1.0)) / (high - low)

    def times(self, u: Tensor, schedule: Schedule | None = None) -> Tensor:
        """floor(T share), or linear over the time range."""
        share = self.quantile(u)
        if schedule is None:
            return share
        if isinstance(schedule, DiscreteSchedule):
            return (share * schedule.T).floor().clamp(0, schedule.T - 1).to(torch.int64)
        low, high = self._range(schedule)
        return (low + share * (high - low) if schedule.direction > 0 else high - share * (high - low)).clamp(low, high)

    def _range(self, schedule: Schedule) -> tuple[float, float]:
        if isinstance(schedule, EDMSchedule):
            raise ValueError(
                f"time sampler {self.name!r} needs a time of its own, and that of edm is sigma: log_normal"
            )
        return schedule.time_range


@dataclass(frozen=True)
class Uniform(_Share):
    """Uniform on [low, high] within [0, 1]."""

    low: float = 0.0
    high: float = 1.0
    stratified: bool = False
    permute: bool = True
    name = "uniform"

    def __post_init__(self) -> None:
        check_constants(low=self.low, high=self.high)
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ValueError(f"low and high must be 0 <= low < high <= 1, got {self.low} and {self.high}")

    def quantile(self, u: Tensor) -> Tensor:
        """low + u (high - low)."""
        return self.low + u * (self.high - self.low)

    def cdf(self, x: Tensor) -> Tensor:
        """(x - low)/(high - low), kept in [0, 1]."""
        return ((x - self.low) / (self.high - self.low)).clamp(0.0, 1.0)

    def pdf(self, x: Tensor) -> Tensor:
        """1/(high - low) inside."""
        return ((x >= self.low) & (x <= self.high)).to(torch.float64) / (self.high - self.low)


def stratified(low: float = 0.0, high: float = 1.0, permute: bool = True) -> Uniform:
    """`Uniform`, evenly spread over the batch: (i + offset)/B. Any other sampler takes ``stratified=True``."""
    return Uniform(stratified=True, permute=permute, low=low, high=high)


@dataclass(frozen=True)
class LogitNormal(_Share):
    """logit t ~ N(mean, std^2): mean < 0 leans to the data, > 0 to the noise (arXiv 2403.03206)."""

    mean: float = 0.0
    std: float = 1.0
    stratified: bool = False
    permute: bool = True
    name = "logit_normal"

    def __post_init__(self) -> None:
        _check_normal(self.mean, self.std)

    def quantile(self, u: Tensor) -> Tensor:
        """sigmoid(mean + std Phi^-1(u))."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def cdf(self, x: Tensor) -> Tensor:
        """Phi((logit x - mean)/std)."""
        return torch.special.ndtr((torch.logit(x) - self.mean) / self.std)

    def pdf(self, x: Tensor) -> Tensor:
        """0 at both ends."""
        inside = (x > 0) & (x < 1)
        x = torch.where(inside, x, 0.5)
        return torch.where(inside, _normal(torch.logit(x), self.mean, self.std) / (x * (1.0 - x)), 0.0)


@dataclass(frozen=True)
class Mode(_Share):
    """t = f(u) = 1 - u - scale (cos^2(pi u/2) - 1 + u): scale > 0 prefers the middle, < 0 the ends.

    arXiv 2403.03206. f is monotone for -1 <= scale <= 2/(pi - 2); the default is the paper's best. `quantile` is
    f(1 - u), which rises. The density is that of the exact inverse, found by bisection.
    """

    scale: float = 1.29
    stratified: bool = False
    permute: bool = True
    name = "mode"

    def __post_init__(self) -> None:
        check_constants(scale=self.scale)
        if not -1.0 <= self.scale <= 2.0 / (math.pi - 2.0):
            raise ValueError(f"scale must lie in [-1, 2/(pi - 2)], got {self.scale}")

    def quantile(self, u: Tensor) -> Tensor:
        """u - scale (sin^2(pi u/2) - u)."""
        return u - self.scale * (torch.sin(0.5 * math.pi * u) ** 2 - u)

    def cdf(self, x: Tensor) -> Tensor:
        """`quantile` inverted by bisection, to 1e-16."""
        low, high = torch.zeros_like(x), torch.ones_like(x)
        for _ in range(54):
            middle = 0.5 * (low + high)
            below = self.quantile(middle) < x
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(x <= 0, 0.0, torch.where(x >= 1, 1.0, 0.5 * (low + high)))

    def pdf(self, x: Tensor) -> Tensor:
        """1/(1 + scale - scale pi/2 sin(pi u)) at u = cdf(x); infinite in one point at either limit of `scale`."""
        return 1.0 / (1.0 + self.scale - self.scale * 0.5 * math.pi * torch.sin(math.pi * self.cdf(x)))


@dataclass(frozen=True)
class CosMap(_Share):
    """t = 1 - 1/(tan(pi u/2) + 1): the log-SNR of a cosine schedule on the flow's path (arXiv 2403.03206)."""

    stratified: bool = False
    permute: bool = True
    name = "cosmap"

    def quantile(self, u: Tensor) -> Tensor:
        """sin/(sin + cos) of pi u/2, which has no infinite tangent."""
        angle = 0.5 * math.pi * u
        return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))

    def cdf(self, x: Tensor) -> Tensor:
        """(2/pi) atan2(x, 1 - x)."""
        return torch.atan2(x, 1.0 - x) * (2.0 / math.pi)

    def pdf(self, x: Tensor) -> Tensor:
        """2/(pi (1 - 2x + 2x^2))."""
        return 2.0 / (math.pi * (1.0 - 2.0 * x + 2.0 * x**2))


@dataclass(frozen=True)
class LogNormal(TimeSampler):
    """ln(sigma/alpha) ~ N(mean, std^2): EDM's training noise levels, P_mean and P_std (arXiv 2206.00364, table 1).

    Its own axis is sigma, the time of `EDMSchedule`. Other continuous schedules get the density inside their range of
    levels; a discrete one the level nearest in t, which gives its two ends the tails.
    """

    mean: float = -1.2
    std: float = 1.2
    stratified: bool = False
    permute: bool = True
    name = "log_normal"

    def __post_init__(self) -> None:
        _check_normal(self.mean, self.std)

    def quantile(self, u: Tensor) -> Tensor:
        """exp(mean + std Phi^-1(u))."""
        return torch.exp(self.mean + self.std * torch.special.ndtri(u))

    def cdf(self, x: Tensor) -> Tensor:
        """Phi((ln x - mean)/std)."""
        return torch.special.ndtr((x.log() - self.mean) / self.std)

    def pdf(self, x: Tensor) -> Tensor:
        """0 at sigma = 0."""
        positive = x > 0
        x = torch.where(positive, x, 1.0)
        return torch.where(positive, _normal(x.log(), self.mean, self.std) / x, 0.0)

    def times(self, u: Tensor, schedule: Schedule | None = None) -> Tensor:
        """sigma; the schedule's time of that sigma/alpha."""
        if schedule is None or isinstance(schedule, EDMSchedule):
            return self.quantile(u)
        if isinstance(schedule, DiscreteSchedule):
            lowest, highest = numbers(schedule.sigma_ve(torch.tensor([0, schedule.T - 1], device=host(u.device))))
            sigma = self.quantile(u).clamp(lowest, highest)
            return schedule.time_of_log_snr(-2.0 * sigma.log()).add(0.5).floor().to(torch.int64)
        lowest, highest, below, part = self._inside(schedule, u.device)
        sigma = self.quantile(below + u * part).clamp(lowest, highest)
        low, high = schedule.time_range
        return schedule.time_of_log_snr(-2.0 * sigma.log()).clamp(low, high)

    def density(self, t: Tensor, schedule: Schedule | None = None) -> Tensor:
        """On sigma; or pdf(sigma/alpha) |d(sigma/alpha)/dt| over the part inside; or the mass nearest to a level."""
        t = t if isinstance(t, Tensor) else as_time(t)
        if isinstance(schedule, DiscreteSchedule):
            k, last = level_index(schedule, t), schedule.T - 1
            above = torch.where(k < last, self.cdf(schedule.sigma_ve((k + 0.5).clamp(max=last))), 1.0)
            below = torch.where(k > 0, self.cdf(schedule.sigma_ve((k - 0.5).clamp(min=0.0))), 0.0)
            return above - below
        t = as_float64(t)
        if schedule is None or isinstance(schedule, EDMSchedule):
            require(t >= 0, t, "be a noise level >= 0")
            return self.pdf(t)
        low, high = schedule.time_range
        require((t >= low) & (t <= high), t, f"lie in [{low:g}, {high:g}], the training times of {schedule.name}")
        sigma = schedule.sigma_ve(t)
        part = self._inside(schedule, t.device)[3]
        # pdf(sigma) d(sigma)/dt with d(sigma)/dt = sigma/2 |d log_snr/dt|, and 0, not 0 times inf, at sigma = 0 or inf
        inside = (sigma > 0) & torch.isfinite(sigma)
        slope = 0.5 * sigma * schedule.log_snr_dot(t).abs()
        return torch.where(inside, self.pdf(sigma) * torch.where(inside, slope, 0.0) / part, 0.0)

    def _inside(self, schedule: Schedule, device: torch.device) -> tuple[Any, Any, Any, Any]:
        """Lowest and highest sigma/alpha of the schedule's time range, the share of the density below and inside it.

        Made on the host, as plain numbers: a device has nothing to wait for.
        """
        ends = torch.tensor(schedule.time_range, dtype=torch.float64, device=host(device))
        levels = schedule.sigma_ve(ends).sort().values
        below, above = numbers(self.cdf(levels))
        return *numbers(levels), below, above - below


def host(device: torch.device) -> torch.device:
    """Where to work out plain numbers: the CPU, but on the device in a graph, which has none."""
    return device if torch.compiler.is_compiling() else torch.device("cpu")


def numbers(values: Tensor) -> Sequence[Any]:
    """Plain numbers; in a graph 0-dim tensors."""
    return values.unbind() if torch.compiler.is_compiling() else values.tolist()

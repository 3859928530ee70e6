"""Functions that make schedules, by the names that the field has for them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from diffkern.integers import integer
from diffkern.modes import neutrally
from diffkern.names import Prediction
from diffkern.schedules.base import Schedule, UnitTime, check_constants, number
from diffkern.schedules.continuous import (
    CosineSchedule,
    LaplaceSchedule,
    LinearLogSNRSchedule,
    SubVPSchedule,
    VPSchedule,
)
from diffkern.schedules.discrete import DiscreteSchedule, float64_vector
from diffkern.schedules.exploding import EDMSchedule, ExponentialVESchedule, VESchedule
from diffkern.schedules.paths import FlowSchedule, Function, LogSNRSchedule, PathSchedule

__all__ = [
    "SCHEDULES",
    "cosine",
    "cosine_arc",
    "cosine_vp",
    "discretise",
    "edm",
    "exponential",
    "flow",
    "from_alphas_cumprod",
    "from_betas",
    "laplace",
    "laplace_vp",
    "linear",
    "linear_log_snr",
    "log_snr_path",
    "path",
    "rectified_flow",
    "scaled_linear",
    "sigmoid",
    "sub_vp",
    "ve",
    "ve_exponential",
    "vp",
    "zero_terminal_snr",
]


F = TypeVar("F", bound=Callable[..., Any])


def _of_constants(function: F) -> F:
    """Decorator: made under neutral modes, of arguments that require no gradient."""
    made = neutrally(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        named = {f"argument {i + 1} of {function.__name__}": value for i, value in enumerate(args)}
        check_constants(**named, **kwargs)
        return made(*args, **kwargs)

    return cast(F, checked)


@_of_constants
def from_alphas_cumprod(
    alphas_cumprod: Tensor | Iterable[float], name: str = "from_alphas_cumprod"
) -> DiscreteSchedule:
    """A schedule from its table abar_0..abar_{T-1} (another library's float32 table keeps its values)."""
    return DiscreteSchedule(alphas_cumprod, name)


@_of_constants
def from_betas(betas: Tensor | Iterable[float], name: str = "from_betas") -> DiscreteSchedule:
    """A schedule from beta_0..beta_{T-1}, each in (0, 1): abar_t = prod_{i<=t} (1 - beta_i)."""
    table = float64_vector("betas", betas)
    bad = ~((table > 0) & (table < 1))
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(f"beta must lie in (0, 1), got betas[{i}] = {float(table[i])}")
    return DiscreteSchedule(torch.cumprod(1.0 - table, 0), name)


@_of_constants
def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
    """Betas evenly spaced from beta_start to beta_end (arXiv 2006.11239; lectures 000, 002)."""
    low, high = _betas(beta_start, beta_end)
    return from_betas(torch.linspace(low, high, _steps(T), dtype=torch.float64), "linear")


@_of_constants
def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> DiscreteSchedule:
    """Square roots of the betas evenly spaced: the schedule of latent diffusion (arXiv 2112.10752)."""
    low, high = _betas(beta_start, beta_end)
    roots = torch.linspace(math.sqrt(low), math.sqrt(high), _steps(T), dtype=torch.float64)
    return from_betas(roots**2, "scaled_linear")


@_of_constants
def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> DiscreteSchedule:
    """beta_i = min(1 - f((i+1)/T)/f(i/T), max_beta) with f(t) = cos^2((t+s)/(1+s) pi/2).

    arXiv 2102.09672, eq. 17; lecture 002.
    """
    s, max_beta = number("s", s), number("max_beta", max_beta)
    if not 0.0 <= s < math.inf:
        raise ValueError(f"s must be >= 0, got {s}")
    if not 0.0 < max_beta < 1.0:
        raise ValueError(f"max_beta must lie in (0, 1), got {max_beta}")
    f = torch.cos((torch.arange(_steps(T) + 1, dtype=torch.float64) / T + s) / (1.0 + s) * (math.pi / 2)) ** 2
    betas = 1.0 - f[1:] / f[:-1]
    if not bool((betas > 0.0).all()):
        raise ValueError(f"s must leave a positive beta at each of the {T} steps, got {s}")
    return from_betas(betas.clamp(max=max_beta), "cosine")


@_of_constants
def cosine_arc(T: int = 1000, eps: float = 1e-5) -> DiscreteSchedule:
    """abar = (cos(pi t/T) + 1)/2 for the steps t = 1..T, kept inside [eps, 1 - eps].

    Lecture 000, slide "DDPM – Noise Schedule".
    Signal and noise rate move uniformly on a quarter circle. Steps whose values meet the same bound add no noise.
    """
    eps = number("eps", eps)
    if not 0.0 < eps < 0.5:
        raise ValueError(f"eps must lie in (0, 0.5), got {eps}")
    t = torch.arange(1, _steps(T) + 1, dtype=torch.float64) / T
    return DiscreteSchedule((0.5 * (torch.cos(math.pi * t) + 1.0)).clamp(eps, 1.0 - eps), "cosine_arc")


@_of_constants
def sigmoid(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
    """beta_i = beta_start + sigmoid(x_i) (beta_end - beta_start), x evenly from -6 to 6 (arXiv 2203.02923, GeoDiff)."""
    beta_start, beta_end = number("beta_start", beta_start), number("beta_end", beta_end)
    x = torch.linspace(-6.0, 6.0, _steps(T), dtype=torch.float64)
    return from_betas(torch.sigmoid(x) * (beta_end - beta_start) + beta_start, "sigmoid")


@_of_constants
def exponential(T: int = 1000, rate: float = 12.0) -> DiscreteSchedule:
    """abar_t = e^(-rate (t+1)/T): equal betas 1 - e^(-rate/T)."""
    rate = number("rate", rate)
    if not 0.0 < rate < math.inf:
        raise ValueError(f"rate must be positive, got {rate}")
    return DiscreteSchedule((-rate * _fractions(T)).exp(), "exponential")


@_of_constants
def laplace(
    T: int = 1000, mu: float = 0.0, b: float = 0.5, eps: float = 1e-6, *, compat: bool = False
) -> DiscreteSchedule:
    """abar_t = sigmoid(log_snr((t+1)/T)) of `laplace_vp` (arXiv 2407.03297, table 1).

    ``compat`` gives the table that diffusers makes with the same numbers, mu = 0, b = 0.5, eps = 1e-6: it takes the
    signal rate, the root of abar, for abar, divides by its value at t = 0 and bounds the betas by 0.999.
    """
    mu, b, eps = number("mu", mu), number("b", b), number("eps", eps)
    path = laplace_vp(mu, b, eps)
    if not compat:
        return discretise(path, T, "laplace")
    if (mu, b, eps) != (0.0, 0.5, 1e-6):
        raise ValueError(f"compat knows mu = 0, b = 0.5, eps = 1e-6 only, got mu = {mu}, b = {b}, eps = {eps}")
    t = torch.cat([torch.zeros(1, dtype=torch.float64), _fractions(T)])
    away = 0.5 - t
    log_snr = -0.5 * torch.where(away >= 0, 1.0, -1.0) * (1.0 - 2.0 * away.abs() + 1e-6).log()
    rate = torch.sigmoid(log_snr).sqrt()
    return from_betas((1.0 - rate[1:] / rate[:-1]).clamp(max=0.999), "laplace")


@_of_constants
def discretise(schedule: Schedule, T: int = 1000, name: str | None = None) -> DiscreteSchedule:
    """The table of T levels of a continuous schedule of t in [0, 1]: abar_i = alpha^2/(alpha^2 + sigma^2) at its times.

    The times are (i+1)/T of the way from the data end to the noise end, so the last level is the noise end's and may
    have zero SNR. For a path with alpha^2 + sigma^2 = 1 abar is alpha^2; others keep their SNR in a state that is
    scaled to unit total variance.
    """
    if not isinstance(schedule, UnitTime):
        raise ValueError(
            f"discretise needs a continuous schedule of t in [0, 1], got {getattr(schedule, 'name', schedule)}"
        )
    part = _fractions(T)
    t = part if schedule.data_end == 0 else 1.0 - part
    return DiscreteSchedule(torch.sigmoid(schedule.log_snr(t)), name or schedule.name)


@_of_constants
def zero_terminal_snr(schedule: DiscreteSchedule) -> DiscreteSchedule:
    """The schedule with sqrt(abar) shifted and scaled so that it ends on 0 and starts where it did.

    sqrt(abar)' = (sqrt(abar_t) - sqrt(abar_last)) sqrt(abar_0)/(sqrt(abar_0) - sqrt(abar_last)): arXiv 2305.08891,
    algorithm 1. At the last t the prediction eps says nothing about x0: use v or x0. (diffusers leaves abar = 0 in DDIM
    and DDPM, where its eps-prediction gives inf, and sets it to 2^-24 in samplers that divide by it.)
    """
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(f"zero_terminal_snr needs a discrete schedule, got {type(schedule).__name__}")
    root = schedule.alphas_cumprod.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    if not bool(first > last):
        raise ValueError(f"zero_terminal_snr needs a table whose abar falls, got {schedule!r}")
    return DiscreteSchedule(((root - last) * (first / (first - last))) ** 2, schedule.name + "_zero_snr")


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> VPSchedule:
    """See `VPSchedule`."""
    return VPSchedule(beta_min, beta_max)


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> SubVPSchedule:
    """See `SubVPSchedule`."""
    return SubVPSchedule(beta_min, beta_max)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> VESchedule:
    """See `VESchedule`."""
    return VESchedule(sigma_min, sigma_max)


def ve_exponential(base: float = math.e) -> ExponentialVESchedule:
    """See `ExponentialVESchedule`: dx = base^t dw."""
    return ExponentialVESchedule(base)


def cosine_vp(s: float = 0.0) -> CosineSchedule:
    """See `CosineSchedule`."""
    return CosineSchedule(s)


def laplace_vp(mu: float = 0.0, b: float = 0.5, eps: float = 1e-6) -> LaplaceSchedule:
    """See `LaplaceSchedule`."""
    return LaplaceSchedule(mu, b, eps)


def linear_log_snr(highest: float = 13.3, lowest: float = -5.0) -> LinearLogSNRSchedule:
    """See `LinearLogSNRSchedule`."""
    return LinearLogSNRSchedule(highest, lowest)


@_of_constants
def log_snr_path(log_snr: Function, slope: Function | None = None, name: str = "log_snr_path") -> LogSNRSchedule:
    """See `LogSNRSchedule`."""
    return LogSNRSchedule(log_snr, slope, name)


@_of_constants
def path(
    alpha: Function,
    beta: Function,
    *,
    alpha_slope: Function | None = None,
    beta_slope: Function | None = None,
    name: str = "path",
    prediction: Prediction = "velocity",
    time_eps: float = 0.0,
) -> PathSchedule:
    """See `PathSchedule`: any path from alpha(t) and beta(t), ``path(lambda t: t, lambda t: 1 - t)`` for one."""
    return PathSchedule(alpha, beta, alpha_slope, beta_slope, name, prediction, time_eps)


def flow(sigma_min: float = 0.0) -> FlowSchedule:
    """See `FlowSchedule`."""
    return FlowSchedule(sigma_min)


def rectified_flow() -> FlowSchedule:
    """`flow` with sigma_min = 0: x_t = t x0 + (1-t) eps, velocity data - noise (arXiv 2209.03003)."""
    return FlowSchedule(0.0)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, sigma_data: float = 0.5) -> EDMSchedule:
    """See `EDMSchedule`."""
    return EDMSchedule(sigma_min, sigma_max, rho, sigma_data)


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "cosine_arc": cosine_arc,
    "sigmoid": sigmoid,
    "laplace": laplace,
    "exponential": exponential,
    "vp": vp,
    "sub_vp": sub_vp,
    "cosine_vp": cosine_vp,
    "laplace_vp": laplace_vp,
    "linear_log_snr": linear_log_snr,
    "ve": ve,
    "ve_exponential": ve_exponential,
    "edm": edm,
    "flow": flow,
}
"""Every schedule with its defaults, by name."""


def _betas(beta_start: float, beta_end: float) -> tuple[float, float]:
    found = number("beta_start", beta_start), number("beta_end", beta_end)
    for argument, value in zip(("beta_start", "beta_end"), found, strict=True):
        if not 0.0 < value < 1.0:
            raise ValueError(f"beta must lie in (0, 1), got {argument} = {value}")
    return found


def _fractions(T: int) -> Tensor:
    """(i+1)/T, [T]."""
    return torch.arange(1, _steps(T) + 1, dtype=torch.float64) / T


def _steps(T: int) -> int:
    return integer("T", T)

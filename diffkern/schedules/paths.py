"""Flow paths and paths that a user defines, t in [0, 1]; reached through `diffkern.schedules`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffkern.modes import neutral, readable
from diffkern.names import Prediction
from diffkern.schedules.base import LogSNRDefined, Schedule, Time, UnitTime
from diffkern.schedules.predictions import check_prediction

__all__ = ["FlowSchedule", "LogSNRSchedule", "PathSchedule"]

Function = Callable[[Tensor], Tensor]
"""A function of time: float64 times of any shape in, one value a time out, by torch operations."""


@dataclass(frozen=True)
class FlowSchedule(UnitTime):
    """Optimal-transport path: alpha = t, sigma = 1 - (1 - sigma_min) t, t in [0, 1], noise at 0 and data at 1.

    Its velocity is data - (1 - sigma_min) noise. arXiv 2210.02747, eq. 20-23; lectures 000 and 003. With sigma_min = 0
    it is the rectified flow (arXiv 2209.03003). Time runs from noise to data as in lectures 000 and 003, against that
    of the diffusion schedules; its SDE is therefore in noising time 1 - t, and its ends have f = -inf (t = 0).
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.sigma_min < 1.0:
            raise ValueError(f"sigma_min must lie in [0, 1), got {self.sigma_min}")

    name = "flow"
    default_prediction: Prediction = "velocity"
    noise_end = 0.0
    data_end = 1.0

    def alpha(self, t: Time) -> Tensor:
        """t."""
        return self._times(t)

    def sigma(self, t: Time) -> Tensor:
        """1 - (1 - sigma_min) t, written so that it is exactly sigma_min at t = 1."""
        t = self._times(t)
        return 1.0 - t if self.sigma_min == 0 else (1.0 - t) + self.sigma_min * t

    def alpha_dot(self, t: Time) -> Tensor:
        """1."""
        return torch.ones_like(self._times(t))

    def sigma_dot(self, t: Time) -> Tensor:
        """-(1 - sigma_min)."""
        return torch.full_like(self._times(t), -(1.0 - self.sigma_min))

    def drift(self, t: Time) -> Tensor:
        """-1/t in noising time 1 - t: -inf at the noise end."""
        return -1.0 / self._times(t)

    def diffusion_squared(self, t: Time) -> Tensor:
        """2 sigma/t in noising time 1 - t: inf at the noise end, 2 sigma_min at the data end."""
        return 2.0 * self.sigma(t) / self._times(t)

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """1/(e^(-log_snr/2) + 1 - sigma_min)."""
        highest = -2.0 * math.log(self.sigma_min) if self.sigma_min > 0 else math.inf
        value = self._log_snrs(log_snr, highest=highest)
        return (1.0 / ((-0.5 * value).exp() + (1.0 - self.sigma_min))).clamp(max=1.0)


def call(name: str, function: Function, t: Tensor) -> Tensor:
    """``function(t)`` in float64 and in the shape of ``t``; a number is a constant function."""
    value = torch.as_tensor(function(t), dtype=torch.float64, device=t.device)
    if value.ndim == 0:
        return value.expand(t.shape)
    if value.shape != t.shape:
        raise ValueError(f"{name} must give one value a time, shape {list(t.shape)}, got {list(value.shape)}")
    return value


def derivative(name: str, function: Function, t: Tensor) -> Tensor:
    """d function/dt by automatic differentiation, in float64; 0 for a constant. Needs a function of each t alone.

    Itself differentiable in t and in what the function holds, where gradients are recorded and either requires one.
    """
    if torch.compiler.is_dynamo_compiling():  # which traces this form of it
        return torch.func.grad(lambda at: call(name, function, at).sum())(t)
    learned = torch.is_grad_enabled() and (t.requires_grad or call(name, function, t).requires_grad)
    with torch.inference_mode(False), torch.enable_grad():
        at = t.clone() if learned and t.requires_grad else t.detach().clone().requires_grad_(True)
        value = call(name, function, at)
        if not value.requires_grad:
            return torch.zeros_like(t)
        (slope,) = torch.autograd.grad(value.sum(), at, create_graph=learned, allow_unused=True)
    return torch.zeros_like(t) if slope is None else slope


def _check(name: str, value: Tensor, t: Tensor, ok: Tensor, rule: str) -> Tensor:
    """``value``; raises the rule with the first offending time if it is on the CPU."""
    if readable(value) and not bool(ok.all()):
        bad, where = value[~ok].flatten()[0].item(), t[~ok].flatten()[0].item()
        raise ValueError(f"{name} must {rule} for every t in [0, 1], got {name}({where:g}) = {bad:g}")
    return value


def _grid() -> Tensor:
    return torch.linspace(0.0, 1.0, 1025, dtype=torch.float64, device="cpu")


def _falling(schedule: Schedule) -> str:
    """Empty if log_snr falls (weakly) from data to noise on a fine grid, else where it does not."""
    t = _grid() if schedule.direction > 0 else _grid().flip(0)
    values = schedule.log_snr(t)
    rise = values[1:] > values[:-1] + 1e-9 * (1.0 + values[:-1].abs())
    if not bool(rise.any()):
        return ""
    i = int(rise.nonzero()[0])
    return (
        f"log_snr({float(t[i]):g}) = {float(values[i]):g} and log_snr({float(t[i + 1]):g}) = {float(values[i + 1]):g}"
    )


@dataclass(frozen=True)
class PathSchedule(UnitTime):
    """Any Gaussian path x_t = alpha(t) x0 + beta(t) eps, t in [0, 1]: lecture 003's names, beta for sigma.

    ``alpha`` and ``beta`` are functions of a float64 tensor of times, made of torch operations, each value of its own
    time alone; their derivatives are taken automatically unless ``alpha_slope`` and ``beta_slope`` give them. They may
    hold parameters, in which `noised` and the losses have gradients. Both must be finite and not negative, which is
    checked on a grid at once and at each use. The end with the higher signal-to-noise ratio is the data end: lecture
    003 has alpha_0 = beta_1 = 0 and alpha_1 = beta_0 = 1, noise at 0.

    The log-SNR need not be monotone; its inverse and the diffusion need that and raise ValueError otherwise.
    arXiv 2210.02747, section 4; arXiv 2303.08797; lectures 000, 003.
    """

    alpha_function: Function
    beta_function: Function
    alpha_slope: Function | None = None
    beta_slope: Function | None = None
    name: str = "path"
    default_prediction: Prediction = "velocity"
    time_eps: float = 0.0
    noise_end: float = field(init=False, default=0.0)
    data_end: float = field(init=False, default=1.0)
    _turns: str = field(init=False, default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        for argument, value in (("alpha", self.alpha_function), ("beta", self.beta_function)):
            if not callable(value):
                raise ValueError(f"{argument} must be a function of t, got {value!r}")
        if not 0.0 <= self.time_eps < 1.0:
            raise ValueError(f"time_eps must lie in [0, 1), got {self.time_eps}")
        object.__setattr__(self, "default_prediction", check_prediction(self.default_prediction))
        with neutral():
            self._look()

    def _look(self) -> None:
        """At the grid: that there is a path, and which end is which."""
        grid = _grid()
        alpha, beta = self.alpha(grid), self.sigma(grid)
        none = (alpha == 0) & (beta == 0)
        if bool(none.any()):
            raise ValueError(f"alpha and beta must not both be 0, got both at t = {float(grid[none][0]):g}")
        first, last = (float(self.log_snr(t)) for t in (0.0, 1.0))
        if first == last:
            raise ValueError(f"one end of the path must have more signal than the other, got log_snr {first:g} at both")
        object.__setattr__(self, "noise_end", 0.0 if first < last else 1.0)
        object.__setattr__(self, "data_end", 1.0 if first < last else 0.0)
        object.__setattr__(self, "_turns", _falling(self))

    def _value(self, name: str, function: Function, t: Time) -> Tensor:
        t = self._times(t)
        value = call(name, function, t)
        return _check(name, value, t, (value >= 0) & torch.isfinite(value), "be finite and >= 0")

    def _slope(self, name: str, function: Function, given: Function | None, t: Time) -> Tensor:
        t = self._times(t)
        value = derivative(name, function, t) if given is None else call(name + "_slope", given, t)
        return _check(f"d {name}/dt", value, t, ~value.isnan(), "be a number")

    def alpha(self, t: Time) -> Tensor:
        """The given alpha(t)."""
        return self._value("alpha", self.alpha_function, t)

    def sigma(self, t: Time) -> Tensor:
        """The given beta(t)."""
        return self._value("beta", self.beta_function, t)

    def alpha_dot(self, t: Time) -> Tensor:
        """d alpha/dt."""
        return self._slope("alpha", self.alpha_function, self.alpha_slope, t)

    def sigma_dot(self, t: Time) -> Tensor:
        """d beta/dt."""
        return self._slope("beta", self.beta_function, self.beta_slope, t)

    def diffusion_squared(self, t: Time) -> Tensor:
        """2 direction sigma (alpha sigma_dot - sigma alpha_dot)/alpha; needs a log_snr that falls towards the noise.

        It has no value that can be computed where beta is 0 and its slope infinite: stay inside with ``time_eps``.
        """
        self._need_falling("diffusion")
        value, t = super().diffusion_squared(t), self._times(t)
        return _check("diffusion_squared", value, t, ~value.isnan(), "be a number").clamp(min=0.0)

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """By bisection; needs a monotone log-SNR."""
        self._need_falling("time_of_log_snr")
        return super().time_of_log_snr(log_snr)

    def _need_falling(self, what: str) -> None:
        if self._turns:
            raise ValueError(f"{what} needs a path whose log_snr falls from data to noise, got {self._turns}")


@dataclass(frozen=True)
class LogSNRSchedule(LogSNRDefined):
    """A variance-preserving path from any falling function log_snr(t), finite at both ends, data at t = 0.

    The function is of a float64 tensor of times, made of torch operations, each value of its own time alone; its
    derivative is taken automatically unless ``slope`` gives it (arXiv 2107.00630, section 3).
    """

    function: Function
    slope: Function | None = None
    name: str = "log_snr_path"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(f"log_snr must be a function of t, got {self.function!r}")
        with neutral():
            self.log_snr(_grid())
            turns = _falling(self)
        if turns:
            raise ValueError(f"log_snr must fall from t = 0 (data) to t = 1 (noise), got {turns}")

    def log_snr(self, t: Time) -> Tensor:
        """The given function."""
        t = self._times(t)
        value = call("log_snr", self.function, t)
        return _check("log_snr", value, t, torch.isfinite(value), "be finite")

    def log_snr_dot(self, t: Time) -> Tensor:
        """d log_snr/dt."""
        t = self._times(t)
        return derivative("log_snr", self.function, t) if self.slope is None else call("slope", self.slope, t)

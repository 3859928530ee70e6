"""Ready processes: Brownian motion, Ornstein-Uhlenbeck, the SDE of any schedule, its reverse, its flow, Langevin."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffkern.schedules.base import Schedule, as_float64
from diffkern.simulate._process import ODE, SDE, Field, as_rate, checked, column, shaped, spread

Rate = float | Callable[[Tensor], Tensor]
"""A number, or a function of the time (float64, [] or [B]) that returns one number a time."""
ROOT_TWO = math.sqrt(2.0)


class BrownianMotion(SDE):
    """dx = sigma dw: x_t - x_s is N(0, sigma^2 (t-s) I) (lectures 001, 003)."""

    def __init__(self, sigma: float = 1.0) -> None:
        self.sigma = _not_negative("sigma", sigma)

    def drift_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(x)

    def diffusion_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        """sigma."""
        return x.new_tensor(self.sigma)


class OrnsteinUhlenbeck(SDE):
    """dx = theta (mean - x) dt + sigma dw, theta > 0 (lecture 003: u = -theta x, whose flow is exp(-theta t) x0)."""

    def __init__(self, theta: float = 1.0, sigma: float = 1.0, mean: float = 0.0) -> None:
        if not 0.0 < theta < math.inf:
            raise ValueError(f"theta must be positive, got {theta}")
        if not math.isfinite(mean):
            raise ValueError(f"mean must be finite, got {mean}")
        self.theta, self.sigma, self.mean = theta, _not_negative("sigma", sigma), mean

    def drift_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        """theta (mean - x)."""
        return self.theta * (self.mean - x)

    def diffusion_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        """sigma."""
        return x.new_tensor(self.sigma)

    def moments(self, x0: Tensor, t: float) -> tuple[Tensor, float]:
        """Mean and standard deviation of x_t given x0; in the limit N(mean, sigma^2/(2 theta))."""
        mean = self.mean + math.exp(-self.theta * t) * (x0 - self.mean)
        return mean, self.sigma * math.sqrt(-math.expm1(-2.0 * self.theta * t) / (2.0 * self.theta))


class ForwardSDE(SDE):
    """dx = f x dtau + g dw, the SDE that carries data along a schedule's marginals (arXiv 2011.13456; lecture 001).

    VP, sub-VP and VE are the schedules `vp()`, `sub_vp()`, `ve()`, and any other works. Time is the schedule's own and
    runs from its `data_end` to its `noise_end` (`time_direction`); tau is noising time, see `Schedule`. Of a table
    (`DiscreteSchedule`) times count steps from 0, and a step of 1 is Euler-Maruyama's version of the chain's.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.time_direction = schedule, schedule.direction

    def drift_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        """direction f(t) x: in the schedule's own time."""
        return column(self.time_direction * _finite("drift", self.schedule, self.schedule.drift(t), t), x) * x

    def diffusion_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        """g(t)."""
        return _finite("diffusion", self.schedule, self.schedule.diffusion(t), t)


class ProbabilityFlowODE(ODE):
    """dx = (f x - g^2/2 s) dtau: the deterministic process with the marginals of `ForwardSDE` (lecture 001).

    `score(x, t)` is the score of the marginals, see `from_model` for networks. Runs either way. Lecture 001 prints the
    equation once without the 1/2 and once without the x; its Euler step has both.
    """

    def __init__(self, schedule: Schedule, score: Field) -> None:
        self.schedule, self.score = schedule, checked("score", score)

    def drift_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        """direction (f x - g^2/2 s): in the schedule's own time."""
        f = _finite("drift", self.schedule, self.schedule.drift(t), t)
        g2 = _finite("diffusion", self.schedule, self.schedule.diffusion_squared(t), t)
        direction = self.schedule.direction
        return column(direction * f, x) * x - column(0.5 * direction * g2, x) * shaped("score", self.score(x, t), x)


class ExtendedSDE(SDE):
    """dx = (u + sign(dt) sigma_t^2/2 s) dt + sigma_t dw, any sigma_t >= 0: the marginals of dx = u_t(x) dt.

    Lecture 003: an ODE and Langevin dynamics of its own marginals, whose score is s. `sigma` is a number or a function
    of t. Lecture 001 splits the reverse SDE in the same way, and leaves out the dw of the Langevin part.
    """

    def __init__(self, ode: ODE, score: Field, sigma: Rate, time_direction: float = 1.0) -> None:
        if not isinstance(ode, ODE):
            raise ValueError(f"ode must be an ODE, got {type(ode).__name__}")
        if time_direction not in (1, -1):
            raise ValueError(f"time_direction must be 1 or -1, got {time_direction!r}")
        self.ode, self.score, self.time_direction = ode, checked("score", score), float(time_direction)
        self.sigma = sigma if callable(sigma) else _not_negative("sigma", sigma)

    def drift_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        """u + sign(dt) sigma^2/2 s."""
        pull = spread(0.5 * self.time_direction * as_rate(self.diffusion_coefficient(x, t)).square(), x)
        return self.ode.drift_coefficient(x, t) + pull * shaped("score", self.score(x, t), x)

    def diffusion_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        """sigma_t."""
        if not callable(self.sigma):
            return as_float64(self.sigma)
        value = as_float64(self.sigma(t))
        if value.shape not in (torch.Size(()), x.shape[:1]):
            raise ValueError(f"sigma must return one number a time, shape {list(t.shape)}, got {list(value.shape)}")
        if value.device.type == "cpu" and not bool((value >= 0).all()):
            raise ValueError(f"sigma must be >= 0, got {value.min().item()}")
        return value


class ReverseSDE(ExtendedSDE):
    """dx = (f x - g^2 s) dtau + g dw with dtau < 0: from noise back to data (Anderson 1982; lecture 001).

    Built as what it is, the probability-flow ODE and Langevin dynamics of strength g. `churn`, a number or a function
    of t, replaces that strength: dx = (f x - (g^2 + c^2)/2 s) dtau + c dw has the same marginals for every c >= 0, and
    c = 0 is the probability flow. Time is the schedule's own, from its `noise_end` to its `data_end`.
    """

    def __init__(self, schedule: Schedule, score: Field, churn: Rate | None = None) -> None:
        def g(t: Tensor) -> Tensor:
            return _finite("diffusion", schedule, schedule.diffusion(t), t)

        strength = g if churn is None else churn
        super().__init__(ProbabilityFlowODE(schedule, score), score, strength, -schedule.direction)


class _Still(ODE):
    """dx/dt = 0."""

    def drift_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)


class LangevinSDE(ExtendedSDE):
    """dx = sigma^2/2 s(x) dt + sigma dw: its stationary density is the one whose score is s (lectures 000, 001, 003).

    `score(x)`, or `score(x, at)` if a noise level's time `at` is given. With sigma = sqrt(2), the default, a step of
    Euler-Maruyama is lecture 000's x + h s + sqrt(2 h) z; its algorithm's x + a/2 s + sqrt(a) z is the same with
    a = 2h, or with sigma = 1. Steps are not corrected for their size: the stationary variance of N(0, v) comes out as
    v/(1 - h sigma^2/(4 v)).
    """

    def __init__(self, score: Callable[..., Tensor], sigma: Rate = ROOT_TWO, at: float | None = None) -> None:
        checked("score", score)

        def still(x: Tensor, t: Tensor) -> Tensor:
            if at is None:
                return score(x)
            return score(x, torch.full(x.shape[:1], at, dtype=torch.float64, device=x.device))

        super().__init__(_Still(), still, sigma)


def _not_negative(name: str, value: float) -> float:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    return float(value)


def _finite(name: str, schedule: Schedule, value: Tensor, t: Tensor) -> Tensor:
    """`value`, on the CPU checked: a path whose alpha is 0 at an end has no finite SDE there."""
    if value.device.type == "cpu" and not bool(value.isfinite().all()):
        bad = t.expand(value.shape)[~value.isfinite()].flatten()[0].item()
        raise ValueError(f"the {name} of {schedule.name} is not finite at t = {bad:g}: keep the times inside its range")
    return value

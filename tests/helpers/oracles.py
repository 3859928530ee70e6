"""Answers known in closed form: Gaussian and mixture data, and plan rows run slowly in float64.

For data N(mean, std^2) every exact prediction is linear in x, the probability-flow ODE has a closed-form solution, and
a linear sampler maps Gaussians to Gaussians, so samplers can be checked without a network and without sampling noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkern.plan import Plan
from diffkern.schedules import DiscreteSchedule, Schedule

RowModel = Callable[[Tensor, float], Tensor]


def run_plan(
    plan: Plan,
    model: RowModel,
    x: Tensor,
    noises: Iterable[Tensor] = (),
    rows: range | None = None,
    edit: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The rows of a plan from the state x, straight from the formulas of diffkern.plan (no guidance, no mask); after
    each step the state is ``edit`` of it."""
    rows = rows or range(len(plan.rows))
    draws = iter(noises)
    k = plan.first_k if rows.start == 0 else plan.rows[rows.start - 1].k
    history: dict[int, Tensor] = {}
    for i in rows:
        row = plan.rows[i]
        m = model(k * x, row.time) if row.calls_model else torch.zeros_like(x)
        z = next(draws) if row.draws else torch.zeros_like(x)
        x0 = (row.p * x + row.q * m + row.r * z).clamp(-row.clip, row.clip)
        new = row.a * x + row.b * x0 + row.d * m + row.g * z
        for slot in row.reads:
            new = new + getattr(row, f"e{slot}") * history[slot]
        made = {"x": x, "x0": x0, "s": row.A * x + row.B * x0 + row.D * m}
        history.update({slot: made[source] for slot, source in row.saves})
        x, k = new if edit is None or not row.ends_step else edit(new), row.k
    return x


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2), each element alike."""

    mean: float
    std: float

    def total(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Variance of x = alpha x0 + sigma eps."""
        return alpha**2 * self.std**2 + sigma**2

    def predict(self, schedule: Schedule, prediction: str, x: Tensor, t: float) -> Tensor:
        """E[target given x]: the output of a perfectly trained network, each prediction from its own definition."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        away = (x - alpha * self.mean) / self.total(alpha, sigma)
        x0 = self.mean + alpha * self.std**2 * away
        eps = sigma * away
        if prediction == "eps":
            return eps
        if prediction == "x0":
            return x0
        if prediction == "v":
            return alpha * eps - sigma * x0
        if prediction == "score":
            return -away
        if prediction == "velocity":
            return schedule.alpha_dot(t) * x0 + schedule.sigma_dot(t) * eps
        if prediction == "mu":
            coef_x0, coef_xt, _ = schedule.posterior(t)  # type: ignore[attr-defined]
            return coef_x0 * x0 + coef_xt * x
        assert prediction == "edm"
        c_skip, c_out, _, _ = schedule.preconditioning(t)
        return (x0 - c_skip * x) / c_out

    def model(self, schedule: Schedule, prediction: str) -> RowModel:
        """`predict` as a network: it is given the scaled input and the time of the plan's row."""

        def network(x: Tensor, time: float) -> Tensor:
            if prediction == "edm":  # given c_noise = ln(sigma)/4 and c_in x
                sigma = float(torch.tensor(4.0 * time, dtype=torch.float64).exp())
                return self.predict(schedule, prediction, x / schedule.preconditioning(sigma)[2], sigma)
            t = int(time) if isinstance(schedule, DiscreteSchedule) and time == int(time) else time
            return self.predict(schedule, prediction, x, t)

        return network

    def ode(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """Exact probability-flow solution from one (alpha, sigma) to another: quantiles stay quantiles."""
        (a0, s0), (a1, s1) = start, end
        scale = ((a1**2 * self.std**2 + s1**2) / (a0**2 * self.std**2 + s0**2)) ** 0.5
        return a1 * self.mean + scale * (x - a0 * self.mean)


def moments(plan: Plan, model: RowModel, mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance after a plan without histories, for a model that is affine in x: exact, no draws."""
    probe = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for i, row in enumerate(plan.rows):
        at = run_plan(plan, model, probe, [torch.zeros_like(probe)] * row.draws, range(i, i + 1))
        slope, offset = float(at[1] - at[0]), float(at[0])
        mean, variance = offset + slope * mean, slope**2 * variance + row.g**2
    return mean, variance


@dataclass(frozen=True)
class Mixture:
    """Data sum_k weights_k N(means_k, stds_k^2), each element alike and independent: exact, and not linear in x."""

    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-1.0, 0.8)
    stds: tuple[float, ...] = (0.2, 0.5)

    def _parts(self, alpha: Tensor, sigma: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log of weight times density, x - alpha mean, variance of x, std of x0), each [..., K] for x [...]."""
        weight, mean, std = (torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds))
        alpha, sigma, x = alpha[..., None], sigma[..., None], x[..., None].double()
        gap, total = x - alpha * mean, alpha**2 * std**2 + sigma**2
        return (
            weight.log() - 0.5 * (gap**2 / total + total.log() + math.log(2 * math.pi)),
            gap,
            total,
            std.expand_as(gap),
        )

    def log_density(self, alpha: Tensor, sigma: Tensor, x: Tensor) -> Tensor:
        """ln p of x = alpha x0 + sigma eps, elementwise."""
        return torch.logsumexp(self._parts(alpha, sigma, x)[0], -1)

    def score(self, alpha: Tensor, sigma: Tensor, x: Tensor) -> Tensor:
        """d ln p/dx."""
        log, gap, total, _ = self._parts(alpha, sigma, x)
        return -(torch.softmax(log, -1) * gap / total).sum(-1)

    def x0(self, alpha: Tensor, sigma: Tensor, x: Tensor) -> Tensor:
        """E[x0 given x]."""
        log, gap, total, std = self._parts(alpha, sigma, x)
        mean = torch.tensor(self.means, dtype=torch.float64)
        return (torch.softmax(log, -1) * (mean + alpha[..., None] * std**2 * gap / total)).sum(-1)

    def predict(self, schedule: Schedule, prediction: str, x: Tensor, t: Tensor) -> Tensor:
        """E[target given x], each prediction from its own definition; t [] or [B] for x [B, ...]."""
        shape = (-1, *(1,) * (x.ndim - 1)) if t.ndim else ()
        alpha, sigma = schedule.alpha(t).reshape(shape), schedule.sigma(t).reshape(shape)
        score, x0 = self.score(alpha, sigma, x), self.x0(alpha, sigma, x)
        if prediction == "score":
            return score
        if prediction == "x0":
            return x0
        eps = -sigma * score
        if prediction == "eps":
            return eps
        if prediction == "v":
            return alpha * eps - sigma * x0
        if prediction == "velocity":
            return schedule.alpha_dot(t).reshape(shape) * x0 + schedule.sigma_dot(t).reshape(shape) * eps
        if prediction == "mu":
            coef_x0, coef_xt, _ = schedule.posterior(t)  # type: ignore[attr-defined]
            return coef_x0.reshape(shape) * x0 + coef_xt.reshape(shape) * x
        assert prediction == "edm"
        c_skip, c_out, _, _ = schedule.preconditioning(t)
        return (x0 - c_skip.reshape(shape) * x) / c_out.reshape(shape)

    def mmse(self, alpha: float, sigma: float) -> float:
        """E|x0 - E[x0 given x]|^2 by the trapezoid rule, which for these smooth densities is exact to rounding."""
        a, s = torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
        reach = 12 * max((alpha**2 * std**2 + sigma**2) ** 0.5 for std in self.stds)
        x = torch.linspace(
            alpha * min(self.means) - reach, alpha * max(self.means) + reach, 20_001, dtype=torch.float64
        )
        second = sum(w * (m**2 + d**2) for w, m, d in zip(self.weights, self.means, self.stds, strict=True))
        return second - float(torch.trapezoid(self.log_density(a, s, x).exp() * self.x0(a, s, x) ** 2, x))

    def sample(self, shape: Iterable[int], generator: torch.Generator) -> Tensor:
        """Data in float64."""
        shape = tuple(shape)
        part = torch.multinomial(torch.tensor(self.weights), math.prod(shape), True, generator=generator).reshape(shape)
        noise = torch.randn(shape, dtype=torch.float64, generator=generator)
        mean, std = (torch.tensor(v, dtype=torch.float64)[part] for v in (self.means, self.stds))
        return mean + std * noise

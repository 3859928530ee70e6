"""Answers known in closed form: Gaussian data, and plan rows run slowly in float64.

For data N(mean, std^2) every exact prediction is linear in x, the probability-flow ODE has a closed-form solution, and
a linear sampler maps Gaussians to Gaussians, so samplers can be checked without a network and without sampling noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkern.plan import Plan
from diffkern.schedules import DiscreteSchedule, Schedule

RowModel = Callable[[Tensor, float], Tensor]


def run_plan(
    plan: Plan, model: RowModel, x: Tensor, noises: Iterable[Tensor] = (), rows: range | None = None
) -> Tensor:
    """The rows of a plan from the state x, straight from the formulas of diffkern.plan (no guidance, no mask)."""
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
        x, k = new, row.k
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

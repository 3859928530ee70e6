"""ODE samplers that need the velocity alone: paths whose signal starts with slope 0, and ends of infinite slope."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.oracles import Gaussian, run_plan
from helpers.suites import few
from torch import Tensor

import diffkern
from diffkern import samplers, schedules
from diffkern.schedules import PathSchedule

DATA = Gaussian(0.3, 0.6)
SQUARE = schedules.path(lambda t: t**2, lambda t: 1 - t**2)
HERMITE = schedules.path(lambda t: t**2 * (3 - 2 * t), lambda t: 1 - t**2 * (3 - 2 * t))
CIRCLE = schedules.path(lambda t: t, lambda t: (1 - t**2).sqrt())
PATHS = {"t^2": SQUARE, "hermite": HERMITE, "circle": CIRCLE}
QUICK = ("euler-1", "midpoint-2", "heun-2", "rk4-4", "lms-2")
X = torch.linspace(-2, 2, 9, dtype=torch.float64)


def velocity(schedule: PathSchedule) -> Callable[[Tensor, float], Tensor]:
    """E[dx/dt given x] of the Gaussian data: mean' + (V'/2V) (x - mean), V = alpha^2 s^2 + sigma^2 the variance of x_t.

    V' by the product rule alone, so that it is finite where sigma has an infinite slope.
    """

    def model(x: Tensor, t: float) -> Tensor:
        if schedule is CIRCLE:
            alpha, slope, half = t, 1.0, t * DATA.std**2 - t
            variance = t * t * DATA.std**2 + 1 - t * t
        else:
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
            slope, down = float(schedule.alpha_dot(t)), float(schedule.sigma_dot(t))
            half, variance = alpha * slope * DATA.std**2 + sigma * down, alpha**2 * DATA.std**2 + sigma**2
        return slope * DATA.mean + half / variance * (x - alpha * DATA.mean)

    return model


def errors_of(sampler: str, schedule: PathSchedule, counts: tuple[int, int]) -> list[float]:
    exact = DATA.ode(X, (0.0, 1.0), (1.0, 0.0))
    model = velocity(schedule)
    make = getattr(samplers, sampler)
    return [float((run_plan(make(schedule, n), model, X) - exact).abs().max()) for n in counts]


@pytest.mark.parametrize("path", few(PATHS, "t^2"))
@pytest.mark.parametrize(
    ("sampler", "order"),
    few([("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("rk4_38", 4), ("lms", 2)], *QUICK),
)
def test_they_sample_the_gaussian_at_their_order(sampler, order, path):
    """From N(0, 1) at t = 0 to the data at t = 1: quantiles stay quantiles, so x ends on 0.3 + 0.6 x."""
    exact = DATA.ode(X, (0.0, 1.0), (1.0, 0.0))
    torch.testing.assert_close(exact, 0.3 + 0.6 * X)
    coarse, fine = errors_of(sampler, PATHS[path], (40, 80))
    assert fine < {1: 3e-2, 2: 2e-3, 4: 1e-6}[order]
    assert math.log2(coarse / fine) > order - 0.4


@pytest.mark.parametrize("schedule", [SQUARE, CIRCLE], ids=["t^2", "circle"])
def test_rk45_samples_it_too(schedule):
    model = velocity(schedule)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([model(row, float(time)) for row, time in zip(x, t, strict=True)])

    solved = diffkern.rk45(network, X[None].clone(), schedule, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(solved.x, 0.3 + 0.6 * X[None], rtol=0, atol=1e-5)


def test_inversion_finds_the_noise():
    plan = samplers.ddim_inversion(SQUARE, 400)
    found = run_plan(plan, velocity(SQUARE), 0.3 + 0.6 * X)
    torch.testing.assert_close(found, X, rtol=0, atol=2e-2)


def test_the_first_row_is_x_plus_h_m():
    """Nothing is divided by the signal; there is no x0 to look at where x is noise alone."""
    first, second = samplers.euler(SQUARE, 4).rows[:2]
    assert (first.a, first.b, first.d) == (1.0, 0.0, 0.25)
    assert (first.p, first.q, first.makes_x0) == (0.0, 0.0, False)
    assert second.makes_x0
    seen = []
    x = diffkern.initial(samplers.euler(SQUARE, 4), (2, 3), 0)
    diffkern.sample(lambda x, t: -x, x, samplers.euler(SQUARE, 4), callback=lambda info: seen.append(info["x0"]))
    assert [made is None for made in seen] == [True, False, False, False]


@pytest.mark.parametrize("prediction", ["eps", "score", "x0", "v"])
@pytest.mark.parametrize("sampler", few(["euler", "rk4", "lms"], "euler", "lms"))
def test_other_predictions_need_no_x0_there_either(sampler, prediction):
    """alpha and its slope are 0 at t = 0: x is eps, and dx/dt = sigma_dot eps."""
    plan = getattr(samplers, sampler)(SQUARE, 200, prediction=prediction)
    exact = 0.3 + 0.6 * X
    torch.testing.assert_close(run_plan(plan, DATA.model(SQUARE, prediction), X), exact, rtol=0, atol=3e-2)


@pytest.mark.parametrize("clip", [None, 3.0])
def test_a_clip_that_does_not_bind_changes_nothing_but_rounding(clip):
    model = velocity(SQUARE)
    free, clipped = (run_plan(samplers.heun(SQUARE, 50, clip=c), model, X / 4) for c in (None, clip))
    torch.testing.assert_close(free, clipped, rtol=0, atol=2e-3)


def test_flow_sde_starts_there():
    """At t = 0 the score is -x; with sigma_t = 0 the sampler is Euler's method."""
    plan, euler = samplers.flow_sde(SQUARE, 8, sigma_t=0.0), samplers.euler(SQUARE, 8)
    assert [(r.a, r.b, r.d, r.g) for r in plan.rows] == [(r.a, r.b, r.d, r.g) for r in euler.rows]
    first = samplers.flow_sde(SQUARE, 8, sigma_t=0.5).rows[0]
    assert (first.a, first.d) == (1.0 - 0.5 * 0.25 / 8, 1 / 8)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler_ancestral", "dpmpp_2m", "dpmpp_2s", "unipc", "repaint"])
def test_samplers_that_need_x0_there_say_what_to_do(sampler):
    make = getattr(samplers, sampler)
    message = r"prediction 'velocity' does not determine x0 and eps .*: path, t=0; take a prediction that does, or time"
    with pytest.raises(ValueError, match=message):
        make(SQUARE, 4)
    make(SQUARE, timesteps=[0.1, 0.4, 0.7, 1.0])  # both remedies
    make(SQUARE, 4, prediction="x0")


@pytest.mark.parametrize("sampler", ["rk4", "rk4_38"])
def test_the_last_stage_takes_the_limit_of_an_infinite_slope(sampler):
    """d sigma/dt is -inf at t = 1, where x is the data itself: x0 = x."""
    last = getattr(samplers, sampler)(CIRCLE, 3).rows[-1]
    assert (last.time, last.p, last.q) == (1.0, 1.0, 0.0)
    assert all(math.isfinite(c) for c in last.coefficients() if c != last.clip)

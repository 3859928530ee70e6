"""Spacings and shifts against their formulas, and samplers on them against the exact Gaussian model."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from helpers.oracles import Gaussian, moments, run_plan
from helpers.suites import few
from torch import Tensor

from diffkern import schedules
from diffkern.samplers import ddim, ddpm, euler, heun
from diffkern.schedules import grids

LINEAR = schedules.linear()
EDM = schedules.edm()
FLOW = schedules.flow()
DATA = Gaussian(mean=0.3, std=0.5)
X = torch.tensor([-1.5, -0.2, 0.0, 0.9, 2.0], dtype=torch.float64)
needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="needs scipy")
LEVELS = [pytest.param(name, marks=needs_scipy if name == "beta" else ()) for name in grids.LEVELS]


def close(got: object, want: object, rtol: float = 1e-12, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------------------- formulas


def test_noise_levels_are_their_formulas():
    i = np.arange(7) / 6
    close(grids.karras_sigmas(7, 0.1, 10.0, 5.0)[:-1], (10**0.2 + i * (0.1**0.2 - 10**0.2)) ** 5)
    close(grids.exponential_sigmas(7, 0.1, 10.0)[:-1], np.exp(np.linspace(np.log(10), np.log(0.1), 7)))
    low, high = np.log(0.1), np.log(10)
    close(grids.polyexponential_sigmas(7, 0.1, 10.0, 2.0)[:-1], np.exp((1 - i) ** 2 * (high - low) + low))
    t = np.linspace(1, 1e-3, 7)
    close(grids.vp_sigmas(7)[:-1], np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1), rtol=1e-10)
    for made in (
        grids.karras_sigmas(7, 0.1, 10.0),
        grids.exponential_sigmas(7, 0.1, 10.0),
        grids.polyexponential_sigmas(7, 0.1, 10.0, 0.5),
        grids.vp_sigmas(7),
        grids.flow_sigmas(7),
    ):
        assert made.dtype == torch.float64
        assert made.shape == (8,)
        assert float(made[-1]) == 0
        assert (made[:-1] > made[1:]).all()
    assert [len(f(1, 0.1, 10.0)) for f in (grids.karras_sigmas, grids.exponential_sigmas)] == [2, 2]
    assert grids.exponential_sigmas(1, 0.1, 10.0).tolist() == pytest.approx([10, 0])


def test_vp_levels_are_those_of_the_vp_schedule():
    t = torch.linspace(1, 1e-3, 9, dtype=torch.float64)
    close(grids.vp_sigmas(9)[:-1], schedules.vp().sigma_ve(t), rtol=1e-10)


@needs_scipy
def test_beta_levels_are_quantiles():
    """The share of a Beta(a, b) below the level's place in the range is 1 - i/(n-1), by numerical integration."""
    got = grids.beta_sigmas(6, 0.5, 4.5, 2.0, 3.0)[:-1]
    part = (got - 0.5) / 4.0
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    density = 12 * x * (1 - x) ** 2
    share = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density, x)])
    want = np.interp(part.numpy(), x.numpy(), share.numpy())
    close(want, 1 - np.arange(6) / 5, atol=1e-9)
    symmetric = grids.beta_sigmas(7, 1.0, 2.0)[:-1]
    close(symmetric + symmetric.flip(0), torch.full((7,), 3.0))


def test_beta_levels_without_scipy_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match=r"beta_sigmas needs scipy: pip install 'diffkern\[grids\]'"):
        grids.beta_sigmas(5, 0.1, 1.0)


@pytest.mark.parametrize("schedule", [LINEAR, schedules.vp(), schedules.ve(), EDM, schedules.linear_log_snr()])
def test_log_snr_spacing_is_even_in_log_snr(schedule):
    t = grids.times(schedule, 9, "log_snr")
    steps = schedule.log_snr(t).diff()
    # A table's levels are between its entries, where its time is only interpolated.
    tolerance = 2e-2 if schedule is LINEAR else 1e-9
    close(steps, np.full(8, float(steps.mean())), rtol=tolerance)
    far, near = schedule.time_range if schedule.direction < 0 else schedule.time_range[::-1]
    close(t[[0, -1]], [far, near], rtol=1e-9, atol=1e-7)


def test_levels_take_the_range_of_the_schedule_or_yours():
    close(grids.levels(EDM, 5, "karras"), EDM.sigmas(5))
    assert grids.levels(schedules.edm(rho=3), 5, "karras").tolist() == schedules.edm(rho=3).sigmas(5).tolist()
    close(grids.levels(LINEAR, 4)[[0, 3]], LINEAR.sigma_ve(torch.tensor([999, 0])))
    close(grids.levels(FLOW, 4, "karras", sigma_min=0.1, sigma_max=9.0)[[0, 3]], [9.0, 0.1])
    t = grids.times(FLOW, 4, sigma_min=0.1, sigma_max=9.0)
    assert (t.diff() > 0).all()  # from noise to data
    close(FLOW.sigma_ve(t), grids.exponential_sigmas(4, 0.1, 9.0)[:-1])


def test_whole_times_are_the_nearest_entries_without_repeats():
    wanted = grids.times(LINEAR, 10, "karras")
    got = grids.whole_times(LINEAR, 10, "karras")
    assert got[:-3] == [round(t) for t in wanted.tolist()][:-3]
    for n in (50, 999, 1000):
        got = grids.whole_times(LINEAR, n, "log_snr")
        assert len(got) == n
        assert all(a > b for a, b in itertools.pairwise(got))
        assert (got[0], got[-1]) == (999, 0)
    assert grids.whole_times(LINEAR, 5, "trailing") == grids.spaced_timesteps(1000, 5, "trailing")


def test_whole_times_round_as_numpy_does():
    """Other libraries' times for every number of steps, with the ties that numpy's arithmetic makes or breaks."""
    for steps in range(2, 1001):
        want = np.linspace(0, 999, steps).round()[::-1].astype(int).tolist()
        assert grids.spaced_timesteps(1000, steps, "linspace") == want
        want = (np.arange(1000, 0, -1000 / steps)[:steps].round() - 1).astype(int).tolist()
        assert grids.spaced_timesteps(1000, steps, "trailing") == want


# ---------------------------------------------------------------------------------------------------- flow shifts


def test_shifts():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    s = sigma.numpy()
    close(grids.shifted(sigma, 3.0), 3 * s / (1 + 2 * s))
    close(grids.shifted(grids.shifted(sigma, 3.0), 1 / 3), s, atol=1e-15)
    inside, near = sigma[1:], s[1:]
    close(grids.dynamically_shifted(inside, 0.8), math.exp(0.8) / (math.exp(0.8) + (1 / near - 1)))
    close(grids.dynamically_shifted(inside, 0.8, "linear"), 0.8 / (0.8 + (1 / near - 1)))
    # A shift by s lowers the log-SNR of the flow by 2 ln s at each level.
    t = 1 - sigma[1:-1]
    moved = 1 - grids.shifted(sigma[1:-1], 3.0)
    close(FLOW.log_snr(moved), FLOW.log_snr(t) - 2 * math.log(3), rtol=1e-12, atol=1e-12)
    falling = sigma.flip(0)[:-1]
    end = grids.stretched(falling, 0.02)
    assert (float(end[0]), float(end[-1])) == (1.0, pytest.approx(0.02))
    close(end, 1 - (1 - falling.numpy()) / ((1 - 0.1) / (1 - 0.02)))
    assert grids.resolution_mu(256) == 0.5
    assert grids.resolution_mu(4096) == pytest.approx(1.15)
    assert grids.resolution_mu(1024) == pytest.approx(0.63)


def test_flow_sigmas():
    close(grids.flow_sigmas(4), [1, 0.75, 0.5, 0.25, 0])
    close(grids.flow_sigmas(4, shift=3.0), [1, 0.9, 0.75, 0.5, 0])
    close(grids.flow_sigmas(4, mu=math.log(3.0)), [1, 0.9, 0.75, 0.5, 0])
    close(grids.flow_sigmas(4, mu=3.0, kind="linear"), [1, 0.9, 0.75, 0.5, 0])
    close(grids.flow_sigmas(4, shift=3.0, terminal=0.1), [1, 0.82, 0.55, 0.1, 0])
    close(grids.flow_sigmas(3, sigma_max=0.9, sigma_min=0.1), [0.9, 0.5, 0.1, 0])
    close(grids.flow_sigmas(1), [1, 0])


# ------------------------------------------------------------------------------- samplers on the exact Gaussian model


@pytest.mark.parametrize("spacing", few(LEVELS, "karras"))
@pytest.mark.parametrize("make", [ddim, lambda *a, **k: ddpm(*a, variance="beta", **k)], ids=["ddim", "ddpm"])
def test_ddim_and_ddpm_on_spaced_times_converge_to_the_data(make, spacing):
    """Exact mean and standard deviation of what they sample, whatever the draws."""

    def errors(steps: int) -> tuple[float, float]:
        plan = make(LINEAR, steps, spacing=spacing)
        assert [int(row.time) for row in plan.rows] == grids.whole_times(LINEAR, steps, spacing)
        mean, variance = moments(plan, DATA.model(LINEAR, "eps"), 0.0, 1.0)
        return abs(mean - 0.3), abs(math.sqrt(variance) - 0.5)

    # The levels of "beta" lie far apart where the data are: its error is still 0.1 at 100 steps.
    steps, most = (400, 0.05) if spacing == "beta" else (100, 0.03)
    assert errors(steps)[1] < most
    assert errors(steps)[1] < 0.6 * errors(steps // 4)[1]
    assert errors(steps)[0] < 0.01  # alpha(T-1) = 0.006 of the mean is missing from the prior


@pytest.mark.parametrize("spacing", few(LEVELS, "karras"))
@pytest.mark.parametrize(("name", "schedule", "prediction"), [("table", LINEAR, "eps"), ("edm", EDM, "edm")])
def test_euler_and_heun_on_spaced_levels_converge_to_the_exact_flow(name, schedule, prediction, spacing):
    def error(sampler: object, steps: int) -> float:
        plan = sampler(schedule, steps, spacing=spacing, prediction=prediction)
        levels = grids.levels(schedule, steps, spacing)
        assert plan.init_scale == pytest.approx(float(levels[0]))
        assert [row.known_n for row in plan.rows if row.ends_step] == pytest.approx(levels[1:].tolist())
        x = X * plan.init_scale
        exact = DATA.ode(x, (1.0, plan.init_scale), (1.0, 0.0))
        return float((run_plan(plan, DATA.model(schedule, prediction), x) - exact).abs().max())

    if spacing == "beta":  # hardly a level at low noise: it converges late
        assert error(euler, 160) < error(euler, 40)
        return
    first, second = [error(euler, n) for n in (40, 160)], [error(heun, n) for n in (40, 160)]
    assert first[1] < first[0] / 3
    assert second[1] < second[0] / 6
    assert first[1] < 0.02
    assert second[1] < 2e-3


@pytest.mark.parametrize(
    ("schedule", "prediction"), few([(LINEAR, "eps"), (EDM, "edm")], "edm", name=lambda c: c[0].name)
)
@pytest.mark.parametrize("grid", [grids.vp_sigmas, lambda n: grids.polyexponential_sigmas(n, 0.0105, 150.0, 0.8)])
def test_other_levels_go_through_the_samplers_argument(schedule, prediction, grid):
    def error(sampler: object, n: int) -> float:
        plan = sampler(schedule, sigmas=grid(n), prediction=prediction)
        x = X * plan.init_scale
        exact = DATA.ode(x, (1.0, plan.init_scale), (1.0, 0.0))
        return float((run_plan(plan, DATA.model(schedule, prediction), x) - exact).abs().max())

    assert error(euler, 160) < min(0.03, error(euler, 40) / 3)
    assert error(heun, 160) < min(2e-3, error(heun, 40) / 6)


def test_euler_on_times_of_spaced_levels_is_euler_on_the_levels():
    t = grids.times(LINEAR, 10, "karras").tolist()
    one, two = euler(LINEAR, timesteps=t), euler(LINEAR, 10, spacing="karras")
    assert [row.time for row in one.rows] == pytest.approx([row.time for row in two.rows])
    want = [row.known_n for row in two.rows]
    # The levels at these times, linear between entries, against the levels asked for, logarithmic between them.
    assert [row.known_n for row in one.rows] == pytest.approx(want, rel=0.02)


SHIFTS = [{"shift": 3.0}, {"mu": 0.8}, {"mu": 2.0, "kind": "linear"}, {"shift": 2.0, "terminal": 0.02}]


@pytest.mark.parametrize("options", few(SHIFTS, "{'shift': 3.0}"))
def test_flows_on_shifted_times_converge_to_the_exact_flow(options):
    def error(sampler: object, n: int) -> float:
        plan = sampler(FLOW, timesteps=1 - grids.flow_sigmas(n, **options))
        got = run_plan(plan, DATA.model(FLOW, "velocity"), X)
        return float((got - DATA.ode(X, (0.0, 1.0), (1.0, 0.0))).abs().max())

    assert error(euler, 160) < error(euler, 40) / 2.5
    assert error(heun, 160) < 1e-3
    if "terminal" not in options:  # whose last step is not halved with the others
        assert error(heun, 160) < error(heun, 40) / 8


def test_euler_with_velocities_at_fractional_times_of_a_table():
    """The velocity of a table has a value between its entries now: that of the interpolation."""
    plan = euler(LINEAR, 80, prediction="velocity")
    x = X * plan.init_scale
    got = run_plan(plan, DATA.model(LINEAR, "velocity"), x)
    same = run_plan(euler(LINEAR, 80), DATA.model(LINEAR, "eps"), x)
    close(got, same, rtol=1e-6)


def no_numbers() -> Tensor:
    return torch.tensor([0.5, 1.5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grids.karras_sigmas(0, 0.1, 1), r"n must be an integer of at least 1, got 0"),
        (lambda: grids.exponential_sigmas(3, 0.0, 1.0), r"must be 0 < sigma_min <= sigma_max, got 0\.0 and 1\.0"),
        (lambda: grids.polyexponential_sigmas(3, 0.1, 1.0, 0.0), r"rho must be positive, got 0\.0"),
        (lambda: grids.beta_sigmas(3, 0.1, 1.0, a=0.0), r"a must be positive, got 0\.0"),
        (lambda: grids.beta_sigmas(3, 0.1, 1.0, b=-1.0), r"b must be positive, got -1\.0"),
        (lambda: grids.vp_sigmas(3, eps=1.0), r"eps must lie in \(0, 1\), got 1\.0"),
        (lambda: grids.vp_sigmas(3, beta_min=0.0), r"beta_min must be positive, got 0\.0"),
        (lambda: grids.flow_sigmas(3, shift=2.0, mu=1.0), r"give shift or mu, not both, got shift = 2 and mu = 1"),
        (lambda: grids.flow_sigmas(3, sigma_max=1.5), r"0 < sigma_min <= sigma_max <= 1, got 0\.5 and 1\.5"),
        (lambda: grids.shifted(no_numbers(), 2.0), r"sigmas of a flow must lie in \[0, 1\], got 1\.5"),
        (lambda: grids.shifted(torch.ones(2), 0.0), r"shift must be positive, got 0\.0"),
        (
            lambda: grids.dynamically_shifted(torch.ones(2), 1.0, "cubic"),
            r"kind must be one of exponential, linear, got",
        ),
        (lambda: grids.dynamically_shifted(torch.ones(2), math.nan), r"mu must be finite, got nan"),
        (lambda: grids.dynamically_shifted(torch.ones(2), -1.0, "linear"), r"mu must be positive, got -1\.0"),
        (lambda: grids.stretched(torch.ones(2), 0.1), r"sigmas must be a list that ends below 1, got \[1\.0, 1\.0\]"),
        (lambda: grids.stretched(torch.zeros(2), 1.0), r"terminal must lie in \[0, 1\), got 1\.0"),
        (lambda: grids.resolution_mu(0), r"tokens must be at least 1, got 0"),
        (lambda: grids.resolution_mu(9, 8, 1.0, 8), r"base_tokens and most_tokens must differ, got 8 for both"),
        (
            lambda: grids.levels(LINEAR, 5, "leading"),
            r"spacing must be one of karras, .* for noise levels, got 'leading'",
        ),
        (lambda: grids.levels(FLOW, 5), r"sigma_min must be given for flow, whose own is 0"),
        (lambda: grids.levels(FLOW, 5, sigma_min=0.1), r"sigma_max must be given for flow, whose own is inf"),
        (
            lambda: grids.levels(schedules.zero_terminal_snr(LINEAR), 5),
            r"sigma_max must be given for linear_zero_snr, whose own is inf",
        ),
        (lambda: grids.whole_times(LINEAR, 1001), r"steps must be an integer in 1\.\.1000 \(T = 1000\), got 1001"),
        (lambda: grids.whole_times(LINEAR, 5, "even"), r"spacing must be one of leading, .*, got 'even'"),
        (lambda: ddim(LINEAR, 5, spacing="even"), r"spacing must be one of leading, .*, beta, got 'even'"),
        (lambda: grids.times(LINEAR, 5, sigma_max=1e6), r"sigma must lie in the schedule's range"),
    ],
)
def test_bad_input_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()

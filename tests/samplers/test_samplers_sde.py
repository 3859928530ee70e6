"""Stochastic samplers: exact moments by propagation through the plan, weak orders, identities. All in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.oracles import Gaussian, run_plan
from helpers.suites import few
from torch import Tensor

from diffkern import samplers, schedules
from diffkern.plan import Plan

LINEAR, FLOW, EDM = schedules.linear(), schedules.flow(), schedules.edm()
VP, SUB_VP, VE = schedules.vp(), schedules.sub_vp(), schedules.ve()
DATA = Gaussian(0.4, 0.6)
X = torch.tensor([-1.7, -0.2, 0.0, 0.9, 2.5], dtype=torch.float64)


def law(plan: Plan, schedule: schedules.Schedule, mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance after the plan for data that make its model affine: one run with a unit in each input."""
    draws = sum(row.draws for row in plan.rows)
    probes = torch.eye(draws + 2, dtype=torch.float64)[1:]  # x, then each noise
    out = run_plan(plan, DATA.model(schedule, plan.prediction), probes[0], list(probes[1:]))
    slopes = out[1:] - out[0]
    return float(out[0] + slopes[0] * mean), float(slopes[0] ** 2 * variance + (slopes[1:] ** 2).sum())


def marginal(schedule: schedules.Schedule, alpha: float, sigma: float) -> tuple[float, float]:
    return alpha * DATA.mean, (alpha * DATA.std) ** 2 + sigma**2


def levels(n: int) -> Tensor:
    return 20.0 * 1e-3 ** (torch.arange(n + 1, dtype=torch.float64) / n)


def weak_errors(
    make: Callable[[int], Plan], schedule: schedules.Schedule, start: tuple[float, float], counts: list[int]
) -> tuple[list[float], list[float]]:
    """Errors of mean and variance at the end, started half a sigma beside the marginal of ``start``.

    Under the reverse SDE that distance shrinks by (V' alpha)/(V alpha'), V the variance of the marginal.
    """
    means, variances = [], []
    for n in counts:
        plan = make(n)
        (mean, variance), away = marginal(schedule, *start), 0.5 * start[1]
        got = law(plan, schedule, mean + away, variance)
        end = plan.rows[-1].known_s, plan.rows[-1].known_n
        want, spread = marginal(schedule, *end)
        means.append(abs(got[0] - want - away * spread * start[0] / (variance * end[0])))
        variances.append(abs(got[1] - spread))
    return means, variances


def observed(errors: list[float]) -> float:
    return float(np.mean(np.log2(np.array(errors[:-1]) / np.array(errors[1:]))))


IN_SIGMA: list[tuple[str, dict[str, object], int]] = [
    ("euler_ancestral", {}, 1),
    ("dpmpp_1s", {"eta": 1.0}, 1),
    ("dpmpp_2m_sde", {}, 2),
    ("dpmpp_2m_sde", {"solver": "heun"}, 2),
    ("dpmpp_3m_sde", {}, 2),
    ("dpmpp_sde", {}, 1),
    ("repaint", {"jump_n_sample": 1}, 1),
]


@pytest.mark.parametrize(("name", "given", "order"), few(IN_SIGMA, "euler_ancestral-{}-1", "dpmpp_3m_sde-{}-2"))
def test_weak_order_in_sigma(name, given, order):
    """The variance tends to the data's at its order; the mean of Gaussian data is exact in every one of these."""
    make = lambda n: samplers.get_sampler(name)(EDM, sigmas=levels(n), **given)  # noqa: E731
    means, variances = weak_errors(make, EDM, (1.0, 20.0), [64, 128, 256])
    assert max(means) < 1e-12
    assert observed(variances) == pytest.approx(order, abs=0.2)
    assert variances[-1] < {1: 0.02, 2: 5e-4}[order]


@pytest.mark.full
@pytest.mark.parametrize("sampler", [samplers.dpm_2_ancestral, samplers.dpmpp_2s_ancestral])
def test_weak_order_of_two_stages_and_noise(sampler):
    """Second-order steps to sigma_down, but of order 1 as an SDE: in the mean, away from the marginal's."""
    means, variances = weak_errors(lambda n: sampler(EDM, sigmas=levels(n)), EDM, (1.0, 20.0), [64, 128, 256])
    assert observed(means) == pytest.approx(1, abs=0.2)
    assert observed(variances) == pytest.approx(2, abs=0.2)


WEAK = [(VP, [256, 512, 1024]), (SUB_VP, [128, 256, 512]), (schedules.ve(0.01, 20.0), [256, 512, 1024])]


@pytest.mark.parametrize(("schedule", "counts"), few(WEAK, "sub_vp", name=lambda case: case[0].name))
@pytest.mark.parametrize("prediction", few(["eps", "score"], "score"))
def test_weak_order_of_euler_maruyama(schedule, counts, prediction):
    start = float(schedule.alpha(1.0)), float(schedule.sigma(1.0))
    make = lambda n: samplers.euler_maruyama(schedule, n, prediction=prediction)  # noqa: E731
    means, variances = weak_errors(make, schedule, start, counts)
    assert observed(means) == pytest.approx(1, abs=0.2)
    assert variances[-1] < 2e-3
    assert variances[-1] < 0.65 * variances[-2]


@pytest.mark.parametrize("sigma_t", [1.0, lambda t: 1.5 * (1.0 - t)], ids=["constant", "falling"])
@pytest.mark.parametrize("prediction", few(["velocity", "x0"], "velocity"))
def test_weak_order_of_the_flow_sde(sigma_t, prediction):
    """Any sigma_t keeps the marginals: to sigma = 0.1, where the score is still bounded."""
    schedule, errors = schedules.flow(0.1), []
    for n in (64, 128, 256):
        plan = samplers.flow_sde(schedule, n, sigma_t=sigma_t, prediction=prediction)
        mean, variance = law(plan, schedule, 0.0, 1.0)
        errors.append(abs(variance - marginal(schedule, 1.0, 0.1)[1]))
        assert mean == pytest.approx(DATA.mean, abs=1.0 / n)
    assert observed(errors) == pytest.approx(1, abs=0.2)


def test_flow_sde_without_noise_is_euler():
    for schedule in (FLOW, schedules.flow(0.1)):
        for prediction in ("velocity", "v"):
            one = samplers.flow_sde(schedule, 7, sigma_t=0.0, prediction=prediction)
            two = samplers.euler(schedule, 7, prediction=prediction)
            model = DATA.model(schedule, prediction)
            torch.testing.assert_close(run_plan(one, model, X), run_plan(two, model, X), rtol=1e-12, atol=1e-12)
            assert one.deterministic


def test_euler_maruyama_is_flow_sde_with_the_schedules_diffusion():
    """sigma_t = g turns the flow SDE of a path into its reverse SDE: the drifts are equal, row by row."""
    times = torch.linspace(1.0, 0.05, 9, dtype=torch.float64)
    one = samplers.euler_maruyama(VP, timesteps=times)
    two = samplers.flow_sde(VP, timesteps=times, sigma_t=lambda t: float(VP.diffusion(t)))
    for a, b in zip(one.rows, two.rows, strict=True):
        assert (a.a + a.b * a.p, a.d + a.b * a.q, a.g) == pytest.approx((b.a + b.b * b.p, b.d + b.b * b.q, b.g))


def test_ode_and_langevin_split():
    """A reverse SDE step is a probability-flow step and a Langevin step of size g^2 |dt|/2, both taken from x."""
    t, s = 0.5, 0.45
    both = samplers.euler_maruyama(VP, timesteps=[t, s, 0.4]).rows[0]
    flow = samplers.euler_maruyama(VP, timesteps=[t, s, 0.4], eta=0.0).rows[0]
    shake = samplers.langevin(VP, 1, t=t, step_size=0.5 * float(VP.diffusion_squared(t)) * (t - s)).rows[0]
    assert both.a == pytest.approx(flow.a + shake.a - 1.0)
    assert both.d == pytest.approx(flow.d + shake.d)
    assert both.g == pytest.approx(shake.g)


def test_euler_maruyama_on_a_table_is_the_lectures_step():
    """x + beta/2 x + beta score + sqrt(beta) z, one table entry a step."""
    plan = samplers.euler_maruyama(LINEAR, 1000)
    assert [row.time for row in plan.rows] == list(range(999, -1, -1))
    assert plan.time_dtype == "int64"
    row, beta = plan.rows[400], float(LINEAR.betas[599])
    assert (row.a, row.d, row.g) == pytest.approx(
        (1 + beta / 2, -beta / float(LINEAR.sigma(599)), math.sqrt(beta)), rel=1e-12
    )
    mean, variance = law(plan, LINEAR, 0.0, 1.0)
    assert (mean, math.sqrt(variance)) == pytest.approx((DATA.mean, DATA.std), abs=0.01)


def test_ancestral_is_ddim_with_eta_and_ddpm():
    """Euler ancestral in x0 + sigma eps is DDIM(eta) in its own state, DDIM(1) is DDPM with beta-tilde."""
    times = [900, 600, 345, 20, 0]
    for eta in (0.0, 0.5, 1.0):
        one = samplers.euler_ancestral(LINEAR, timesteps=times, eta=eta)
        two = samplers.ddim(LINEAR, timesteps=times, eta=eta)
        for a, b, t, s in zip(one.rows, two.rows, times, [*times[1:], -1], strict=True):
            # x_ve = x/alpha: weights of x and m scale by the rates of the two levels.
            here, there = float(LINEAR.alpha(t)), float(LINEAR.alpha(s))
            got = a.a + a.b * a.p, a.d + a.b * a.q, a.g
            want = (b.a + b.b * b.p) * here / there, (b.d + b.b * b.q) / there, b.g / there
            assert got == pytest.approx(want, rel=1e-9, abs=1e-9)
    one = samplers.ddim(LINEAR, timesteps=times, eta=1.0)
    two = samplers.ddpm(LINEAR, timesteps=times)
    assert [r.g for r in one.rows] == pytest.approx([r.g for r in two.rows])


def test_sde_forms_without_noise_are_the_deterministic_ones():
    for sde, ode in (("dpmpp_2m_sde", "dpmpp_2m"), ("dpmpp_3m_sde", "dpmpp_3m"), ("dpmpp_sde", "dpmpp_2s")):
        assert samplers.get_sampler(sde)(EDM, 7, eta=0.0).rows == samplers.get_sampler(ode)(EDM, 7).rows
        assert samplers.get_sampler(sde)(EDM, 7) != samplers.get_sampler(ode)(EDM, 7)


# --- Langevin --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [VP, VE, EDM, LINEAR], ids=lambda s: s.name)
def test_langevin_tends_to_the_marginal(schedule):
    """For N(m, V) the chain is AR(1): x - m shrinks by 1 - eps/V, the variance tends to V/(1 - eps/(2V))."""
    t = {VP: 0.3, VE: 0.5, EDM: 0.7, LINEAR: 300}[schedule]
    mean, total = marginal(schedule, float(schedule.alpha(t)), float(schedule.sigma(t)))
    plan = samplers.langevin(schedule, 200, t=t, step_size=0.1 * total)
    got, variance = law(plan, schedule, 3.0, 0.0)
    assert got == pytest.approx(mean + 0.9**200 * (3.0 - mean), rel=1e-9)
    shrink = 0.81**200
    assert variance == pytest.approx(total / (1 - 0.05) * (1 - shrink), rel=1e-9)
    assert {row.draws for row in plan.rows} == {True}
    assert len({row.stream for row in plan.rows}) == 200


def test_annealed_langevin_with_one_level_is_langevin():
    one = samplers.annealed_langevin(VE, timesteps=[0.4], each=6, step_size=0.01)
    assert one.rows == samplers.langevin(VE, 6, t=0.4, step_size=0.01).rows


def test_annealed_langevin_samples_the_data():
    """NCSN on Gaussian data: the last level's marginal, with the bias of its step."""
    schedule = schedules.ve(0.05, 5.0)
    plan = samplers.annealed_langevin(schedule, 8, each=60, step_size=5e-4)
    assert len(plan.rows) == plan.model_calls == 480
    sizes = [row.g**2 / 2 for row in plan.rows[::60]]
    last = float(schedule.sigma(1e-5))
    assert sizes == pytest.approx([5e-4 * (s / last) ** 2 for s in np.geomspace(5.0, last, 8)], rel=1e-9)
    mean, variance = law(plan, schedule, 0.0, 25.0)
    assert mean == pytest.approx(DATA.mean, abs=0.03)
    assert variance == pytest.approx(DATA.std**2 + last**2, rel=0.1)
    clean = samplers.annealed_langevin(schedule, 8, each=60, step_size=5e-4, denoise=True)
    assert clean.rows[:-1] == (*plan.rows[:-1], clean.rows[-2])
    assert (clean.rows[-1].b, clean.rows[-1].a, clean.rows[-1].draws) == (1.0, 0.0, False)


@pytest.mark.full
def test_churn_moments():
    """EDM's sampler with churn keeps the marginals: its variance tends to the data's."""
    for make in (samplers.euler, samplers.heun):
        errors = []
        for n in (40, 80, 160):
            plan = make(EDM, n, churn=0.2 * n)
            variance = law(plan, EDM, DATA.mean, DATA.std**2 + plan.init_scale**2)[1]
            errors.append(abs(variance - DATA.std**2))
        assert errors[-1] < (0.06 if make is samplers.euler else 0.04)
        assert errors[0] > errors[1] > errors[2]

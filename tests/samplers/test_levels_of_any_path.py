"""DDPM and DDIM between the levels of any path, and samplers that start where the signal is 0."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.oracles import Gaussian, moments, run_plan

from diffkern import samplers, schedules
from diffkern.plan import Plan
from diffkern.samplers import ddim, ddpm
from diffkern.schedules import predictions

DATA = Gaussian(0.3, 0.6)
VP, COSINE, EDM, FLOW = schedules.vp(), schedules.cosine_vp(), schedules.edm(), schedules.flow(0.1)
ZERO = schedules.zero_terminal_snr(schedules.linear())
PATHS = {
    "vp": VP,
    "sub_vp": schedules.sub_vp(),
    "ve": schedules.ve(),
    "linear_log_snr": schedules.linear_log_snr(),
    "edm": EDM,
    "flow": FLOW,
}
COLUMNS = ("p", "q", "a", "b", "d", "g", "r0", "r1", "known_s", "known_n")


def gaussian_end(plan: Plan, schedule, prediction: str) -> tuple[float, float]:
    """Mean and deviation after a plan, from the exact marginal of the Gaussian data at its first level."""
    t = schedule.noise_end
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    scale = plan.init_scale / sigma
    start = (alpha * DATA.mean * scale, (alpha**2 * DATA.std**2 + sigma**2) * scale**2)
    mean, variance = moments(plan, DATA.model(schedule, prediction), *start)
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (ddim, {}),
        (ddim, {"eta": 0.7}),
        (ddim, {"eta": 1.0, "eps_from": "model"}),
        (ddpm, {}),
        (ddpm, {"variance": "beta"}),
        (ddpm, {"variance": 0.4}),
        (ddpm, {"variance": "learned"}),
    ],
)
def test_a_path_and_its_table_give_the_same_plan(sampler, options, clip):
    """A table of VP at the times (i + 1)/1000 holds the very levels: the same rows, by other formulas."""
    times = [999, 700, 450, 200, 50, 3]
    table = sampler(schedules.discretise(VP, 1000), timesteps=times, clip=clip, **options)
    path = sampler(VP, timesteps=[(t + 1) / 1000 for t in times], prediction="eps", clip=clip, **options)
    assert path.learned_variance == table.learned_variance
    for a, b in zip(path.rows, table.rows, strict=True):
        assert a.time == (b.time + 1) / 1000
        for name in COLUMNS:
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("name", PATHS)
def test_the_bridge_is_bayes_rule(name):
    """q(x_s given x_t, x0) by precisions: 1/sigma_s^2 of the prior at s and r^2/b of the step s -> t."""
    schedule = PATHS[name]
    t, s = (0.8, 0.3) if schedule.direction > 0 else (0.2, 0.7)
    alpha, sigma, to_alpha, to_sigma = (
        torch.tensor([float(f(u))], dtype=torch.float64) for u in (t, s) for f in (schedule.alpha, schedule.sigma)
    )
    c0, ct, tilde, beta = predictions.bridge(alpha, sigma, to_alpha, to_sigma)
    r = alpha / to_alpha
    b = sigma**2 - r**2 * to_sigma**2
    precision = 1 / to_sigma**2 + r**2 / b
    torch.testing.assert_close(beta, b, rtol=1e-9, atol=0)
    torch.testing.assert_close(tilde, 1 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(ct, r / b / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(c0, to_alpha / to_sigma**2 / precision, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sampler", [ddim, ddpm])
def test_they_sample_the_gaussian_on_every_path(sampler, name):
    """The error of mean and deviation falls with the steps, at least as 1/n."""
    schedule, errors = PATHS[name], []
    prediction = "v" if name == "flow" else schedule.default_prediction
    for n in (50, 200):
        mean, std = gaussian_end(sampler(schedule, n, prediction=prediction), schedule, prediction)
        end = 0.1 if name == "flow" else 0.0  # sigma_min is left
        errors.append(max(abs(mean - DATA.mean), abs(std - math.hypot(DATA.std, end))))
    assert errors[1] < 2e-2
    assert errors[1] < 0.5 * errors[0]


def test_ddim_is_the_first_order_step_of_dpm_solver():
    """(sigma'/sigma) x + (alpha' - sigma' alpha/sigma) x0 on any path, `dpmpp_1s`."""
    for schedule, prediction in ((VP, "x0"), (EDM, "x0"), (FLOW, "x0")):
        one = samplers.dpmpp_1s(schedule, 7, prediction=prediction)
        other = ddim(schedule, 7, prediction=prediction, eps_from="x0")
        for a, b in zip(one.rows, other.rows, strict=True):
            assert (a.time, a.p, a.q, a.k) == (b.time, b.p, b.q, b.k)
            assert b.a == pytest.approx(a.a, rel=1e-12, abs=1e-12)
            assert b.b == pytest.approx(a.b, rel=1e-12, abs=1e-12)
        assert (one.init_scale, one.first_k) == (other.init_scale, other.first_k)


def test_grids_and_defaults():
    assert len(ddim(VP).rows) == 50
    assert ddim(VP).prediction == "eps"
    assert ddpm(EDM, 5).prediction == "edm"
    assert [row.time for row in ddim(VP, 3).rows] == [row.time for row in samplers.euler(VP, 3).rows]
    levels = [10.0, 2.0, 0.3, 0.0]
    for schedule in (VP, EDM, schedules.linear()):
        rows = ddim(schedule, sigmas=levels).rows
        assert [row.known_n / row.known_s for row in rows] == pytest.approx(levels[1:])
        assert rows[-1].b == 1.0
    with pytest.raises(ValueError, match=r"ddpm needs exactly one of steps, sigmas and timesteps, got none"):
        ddpm(VP)
    with pytest.raises(ValueError, match=r"eta must leave .* got eta = 3.* at the step t=1 -> s=0\.667"):
        ddim(VP, 4, eta=3.0)


STARTS = {"cosine_vp": COSINE, "zero terminal SNR": ZERO}
OWN = ("ddim", "ddpm", "dpmpp_1s", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_sde", "unipc")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", OWN)
def test_samplers_in_the_own_state_start_from_pure_noise(name, start):
    """x = eps at the first call, a v says x0 = -v: exact in mean; deviation within the step's error."""
    schedule, make = STARTS[start], getattr(samplers, name)
    spacing = {"spacing": "trailing"} if start != "cosine_vp" and name in ("ddim", "ddpm") else {}
    plan = make(schedule, 100, prediction="v", **spacing)
    first = plan.rows[0]
    assert first.time == schedule.noise_end
    assert (plan.init_scale, plan.first_k, first.p, first.q) == (1.0, 1.0, 0.0, -1.0)
    model = DATA.model(schedule, "v")
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    made = run_plan(plan, model, x, [torch.zeros(3, dtype=torch.float64)] * len(plan.rows))
    assert float(made[1]) == pytest.approx(DATA.mean, abs=2e-2)
    std = float(made[2] - made[0]) / 2
    assert std == pytest.approx(DATA.std, abs=3e-2) if plan.deterministic else std < DATA.std
    make(schedule, 4, prediction="x0", **spacing)
    with pytest.raises(ValueError, match=r"'eps' does not determine x0 .*; take a prediction that does, or times"):
        make(schedule, 4, prediction="eps", **spacing)


def test_inversion_ends_on_pure_noise():
    plan = samplers.ddim_inversion(COSINE, 200, prediction="v")
    made = run_plan(plan, DATA.model(COSINE, "v"), torch.tensor([-0.3, 0.3, 0.9], dtype=torch.float64))
    torch.testing.assert_close(made, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), rtol=0, atol=3e-2)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["euler", "heun", "rk4", "lms", "deis", "dpm_2", "euler_ancestral"])
def test_samplers_in_sigma_say_what_starts_there(name, start):
    message = r"needs a finite sigma > 0 at each model call, got inf at t=.*; ddim, dpmpp_\* and unipc start there"
    with pytest.raises(ValueError, match=message):
        getattr(samplers, name)(STARTS[start], 5, prediction="v")
    getattr(samplers, name)(COSINE, timesteps=[0.99, 0.5, 0.1], prediction="v")  # the other remedy


def test_euler_maruyama_says_so_too():
    message = r"finite drift and diffusion .* at t=1 \(cosine_vp\): give timesteps that begin later, or take ddpm"
    with pytest.raises(ValueError, match=message):
        samplers.euler_maruyama(COSINE, 5, prediction="v")


def test_a_two_stage_step_to_the_end_of_a_flow_asks_the_model_there():
    """dpmpp_2s with r = 1 calls the model at each step's end: of a flow with sigma_min at t = 1 too."""
    plan = samplers.dpmpp_2s(FLOW, 40, r=1.0)
    assert plan.rows[-1].time == 1.0
    exact = DATA.ode(torch.tensor([-1.0, 2.0], dtype=torch.float64), (0.0, 1.0), (1.0, 0.1))
    made = run_plan(plan, DATA.model(FLOW, "velocity"), torch.tensor([-1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(made, exact, rtol=0, atol=1e-2)

"""Sampler plans against closed forms on Gaussian data, identities between them, and published grids. All in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.oracles import run_plan
from helpers.sampler_cases import COSINE, DATA, EDM, FLOW, LINEAR, TABLE_PREDICTIONS, X, run

from diffkern import schedules
from diffkern.samplers import SAMPLERS, ddim, ddpm, euler, get_sampler, heun, spaced_timesteps

# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing", "steps", "want"),
    [
        ("leading", 5, [800, 600, 400, 200, 0]),
        ("trailing", 5, [999, 799, 599, 399, 199]),
        ("linspace", 5, [999, 749, 500, 250, 0]),
        ("leading", 3, [666, 333, 0]),
        ("trailing", 3, [999, 666, 332]),
        ("linspace", 1, [999]),
        ("trailing", 1, [999]),
    ],
)
def test_spacings(spacing, steps, want):
    assert spaced_timesteps(1000, steps, spacing) == want


@pytest.mark.parametrize("steps", [2, 7, 10, 30, 50, 999, 1000])
def test_spacings_are_those_of_numpy(steps):
    assert spaced_timesteps(1000, steps) == (np.arange(steps) * (1000 // steps))[::-1].tolist()
    assert spaced_timesteps(1000, steps, "linspace") == np.linspace(0, 999, steps).round()[::-1].astype(int).tolist()
    trailing = np.round(np.arange(1000, 0, -1000 / steps))[:steps].astype(int) - 1
    assert spaced_timesteps(1000, steps, "trailing") == trailing.tolist()
    assert spaced_timesteps(1000, min(steps, 999), offset=1)[-1] == 1


def test_ddpm_and_ddim_visit_the_times_asked_for():
    assert [row.time for row in ddpm(LINEAR).rows] == list(range(999, -1, -1))
    assert [row.time for row in ddim(LINEAR, 5).rows] == [800, 600, 400, 200, 0]
    assert len(ddim(LINEAR).rows) == 50
    assert [row.time for row in ddim(LINEAR, timesteps=[900, 17, 3]).rows] == [900, 17, 3]
    assert [row.time for row in ddpm(LINEAR, timesteps=torch.tensor([900, 17])).rows] == [900, 17]
    assert ddpm(LINEAR).time_dtype == ddim(LINEAR).time_dtype == "int64"


def test_euler_grid_of_the_linear_table():
    plan = euler(LINEAR, 5)
    assert [row.time for row in plan.rows] == [999, 749.25, 499.5, 249.75, 0]
    levels = [plan.init_scale, *(row.known_n for row in plan.rows)]
    assert levels == pytest.approx([157.4073, 17.2799, 3.4336, 0.9568, 0.0100, 0], abs=6e-5)
    assert plan.time_dtype == "float32"
    scales = [plan.first_k, *(row.k for row in plan.rows)]
    assert scales[:-1] == pytest.approx([1 / math.sqrt(s * s + 1) for s in levels[:-1]])
    assert scales[-1] == 1
    assert euler(LINEAR, 5, spacing="trailing").time_dtype == "int64"
    assert [row.time for row in euler(LINEAR, timesteps=[700.5, 3]).rows] == [700.5, 3]


def test_heun_grid_and_calls():
    plan = heun(schedules.linear(1000, 0.00085, 0.012), 5)
    assert plan.model_calls == len(plan.rows) == 9
    assert len(plan.steps) == 5
    assert [row.time for row in plan.rows] == [999, 749.25, 749.25, 499.5, 499.5, 249.75, 249.75, 0, 0]
    levels = [plan.init_scale, *(row.known_n for row in plan.rows)]
    want = [25.1461, 6.5650, 6.5650, 2.2803, 2.2803, 0.8698, 0.8698, 0.0292, 0.0292, 0]
    assert levels == pytest.approx(want, abs=6e-5)


def test_edm_grid():
    plan = euler(EDM, 5)
    assert [plan.init_scale, *(row.known_n for row in plan.rows)] == pytest.approx(
        [80, 17.5278, 2.5152, 0.1698, 0.002, 0], abs=6e-5
    )
    assert [row.time for row in plan.rows] == pytest.approx([1.0955, 0.7159, 0.2306, -0.4434, -1.5537], abs=6e-5)
    assert plan.first_k == pytest.approx(1 / math.sqrt(80**2 + 0.25))
    assert plan.prediction == "edm"
    denoiser = euler(EDM, 5, prediction="x0")  # a denoiser D(x, sigma) is given x and sigma themselves
    assert {denoiser.first_k, *(row.k for row in denoiser.rows)} == {1.0}
    assert [row.time for row in denoiser.rows] == pytest.approx(EDM.sigmas(5)[:-1].tolist())


def test_karras_sigmas_on_a_table():
    sigmas = schedules.karras_sigmas(6, float(LINEAR.sigma_ve(0)), float(LINEAR.sigma_ve(999)))
    plan = euler(LINEAR, sigmas=sigmas)
    assert [plan.init_scale, *(row.known_n for row in plan.rows)] == pytest.approx(sigmas.tolist())
    assert plan.rows[0].time == pytest.approx(999)
    assert plan.rows[-1].time == pytest.approx(0, abs=1e-6)
    for row, sigma in zip(plan.rows, sigmas.tolist(), strict=False):
        assert (row.p, row.q) == pytest.approx((1, -sigma))
        assert float(LINEAR.sigma_ve(row.time)) == pytest.approx(sigma, rel=1e-3)
    stop_early = euler(LINEAR, sigmas=[10.0, 1.0, 0.5])
    assert stop_early.rows[-1].known_n == 0.5


# --- identities ------------------------------------------------------------------------------------------------------


def effective(row) -> tuple[float, float]:
    """x' as a function of x and m alone, for a row without clip."""
    return row.a + row.b * row.p, row.b * row.q + row.d


@pytest.mark.parametrize("prediction", TABLE_PREDICTIONS)
@pytest.mark.parametrize("steps", [1000, 50, 7])
def test_ddim_with_eta_1_is_ddpm_with_beta_tilde(prediction, steps):
    one = ddim(COSINE, steps, eta=1.0, prediction=prediction)
    two = ddpm(COSINE, steps, prediction=prediction)
    for a, b in zip(one.rows, two.rows, strict=True):
        assert effective(a) == pytest.approx(effective(b), rel=1e-8, abs=1e-9)
        assert a.g == pytest.approx(b.g, rel=1e-10)
        assert (a.stream, a.time, a.known_s, a.known_n) == (b.stream, b.time, b.known_s, b.known_n)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_ddim_is_euler_in_sigma(spacing, prediction):
    """On the same times, with the state of one that of the other over alpha."""
    times = spaced_timesteps(1000, 10, spacing)
    alpha = LINEAR.alpha(times[0])
    one = run(ddim(LINEAR, timesteps=times, prediction=prediction), LINEAR)
    two = run(euler(LINEAR, timesteps=times, prediction=prediction), LINEAR, X / alpha)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eps_from", ["model", "x0"])
@pytest.mark.parametrize("prediction", TABLE_PREDICTIONS)
def test_all_predictions_and_forms_sample_alike(prediction, eps_from):
    want = run(ddim(LINEAR, 10), LINEAR)
    got = run(ddim(LINEAR, 10, prediction=prediction, eps_from=eps_from), LINEAR)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", [euler, heun])
@pytest.mark.parametrize("clip", [None, 1e6])
def test_all_predictions_and_forms_integrate_alike(sampler, clip):
    for schedule, base, others, x in (
        (LINEAR, "eps", ["x0", "v", "score"], 150 * X),
        (EDM, "edm", ["eps", "x0", "v", "score", "velocity"], 80 * X),
    ):
        want = run(sampler(schedule, 12), schedule, x)
        for prediction in [base, *others]:
            got = run(sampler(schedule, 12, prediction=prediction, clip=clip), schedule, x)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    times = torch.linspace(0.01, 1, 13, dtype=torch.float64)
    want = run(sampler(FLOW, timesteps=times), FLOW)
    for prediction in ("eps", "x0", "v", "score", "velocity"):
        got = run(sampler(FLOW, timesteps=times, prediction=prediction, clip=clip), FLOW)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [LINEAR, EDM, FLOW])
def test_heuns_last_step_is_eulers(schedule):
    first, last = euler(schedule, 6).rows[-1], heun(schedule, 6).rows[-1]
    names = ("p", "q", "a", "b", "d", "g", "k", "known_s", "known_n", "time")
    assert [getattr(first, n) for n in names] == [getattr(last, n) for n in names]
    assert heun(schedule, 1).rows == euler(schedule, 1).rows


def test_heun_by_hand():
    """One step of the textbook method against the two rows."""
    plan = heun(FLOW, 4)
    x = run_plan(plan, DATA.model(FLOW, "velocity"), X, rows=plan.steps[0])
    d1 = DATA.predict(FLOW, "velocity", X, 0.0)
    d2 = DATA.predict(FLOW, "velocity", X + 0.25 * d1, 0.25)
    torch.testing.assert_close(x, X + 0.125 * (d1 + d2), rtol=1e-14, atol=1e-14)
    assert plan.rows[0].saves == ((0, "s"),)
    assert plan.rows[1].reads == (0,)


def test_ddpm_row_is_algorithm_2():
    """(x - beta/sqrt(1-abar) eps)/sqrt(alpha) + sigma z (lectures 000, 001, 002)."""
    row = ddpm(LINEAR, variance="beta").rows[499]
    t = int(row.time)
    beta, abar = float(LINEAR.betas[t]), float(LINEAR.abar(t))
    assert effective(row) == pytest.approx((1 / math.sqrt(1 - beta), -beta / math.sqrt((1 - abar) * (1 - beta))))
    assert row.g == pytest.approx(math.sqrt(beta))


def test_ddim_row_uses_the_models_eps_directly():
    row = ddim(LINEAR, 10).rows[3]
    before = LINEAR.abar(ddim(LINEAR, 10).rows[4].time)
    assert (row.a, row.b, row.d) == (0.0, float(before.sqrt()), float((1 - before).sqrt()))
    assert (row.p, row.q) == pytest.approx(
        (1 / float(LINEAR.alpha(row.time)), -float(LINEAR.sigma(row.time) / LINEAR.alpha(row.time)))
    )
    clipped = ddim(LINEAR, 10, clip=1.0)
    assert {row.d for row in clipped.rows} == {0.0}
    assert {row.clip for row in clipped.rows} == {1.0}
    kept = ddim(LINEAR, 10, clip=1.0, eps_from="model")
    assert (kept.rows[3].b, kept.rows[3].d) == (row.b, row.d)


@pytest.mark.parametrize("eps_from", ["model", "x0"])
def test_clipped_ddim_by_hand(eps_from):
    plan = ddim(LINEAR, 10, clip=1.0, eps_from=eps_from)
    x, m = X, torch.linspace(1, -1, 5, dtype=torch.float64)
    got = run_plan(plan, lambda _x, _t: m, x, rows=range(3, 4))
    t, s = plan.rows[3].time, plan.rows[4].time
    x0 = ((x - LINEAR.sigma(t) * m) / LINEAR.alpha(t)).clamp(-1, 1)
    assert bool((x0.abs() == 1).any())
    eps = m if eps_from == "model" else (x - LINEAR.alpha(t) * x0) / LINEAR.sigma(t)
    torch.testing.assert_close(got, LINEAR.alpha(s) * x0 + LINEAR.sigma(s) * eps, rtol=1e-12, atol=1e-12)


def test_clipped_euler_follows_the_clipped_x0():
    plan = euler(EDM, 8, prediction="x0", clip=0.5)
    x = torch.tensor([3.0], dtype=torch.float64)
    got = run_plan(plan, lambda _x, _t: torch.tensor([2.0], dtype=torch.float64), x, rows=range(2, 3))
    here, after = plan.rows[1].known_n, plan.rows[2].known_n
    torch.testing.assert_close(got, x + (after - here) * (x - 0.5) / here)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [
    ddpm(LINEAR), ddpm(COSINE, 10, variance="beta", clip=1.0), ddim(LINEAR, 9, eta=1.0), ddim(COSINE, 3),
    euler(LINEAR, 5), heun(EDM, 5), euler(FLOW, 3), heun(FLOW, 3),
], ids=lambda plan: plan.name)  # fmt: skip
def test_last_rows_end_on_data_without_noise(plan):
    assert plan.rows[-1].g == 0
    assert (plan.rows[-1].known_s, plan.rows[-1].known_n) == (1, 0)
    assert plan.rows[-1].ends_step
    x0 = run_plan(plan, lambda x, _t: 0.1 * x, X, [X] * plan.table[:, 12].count_nonzero())
    assert torch.isfinite(x0).all()


def test_deterministic_samplers_draw_nothing():
    for plan in (ddim(LINEAR, 10), euler(LINEAR, 10), heun(LINEAR, 10), euler(FLOW, 10), heun(EDM, 10)):
        assert {row.g for row in plan.rows} == {0.0}
    assert [row.draws for row in ddpm(LINEAR, 4).rows] == [True, True, True, False]


def test_get_sampler():
    assert get_sampler("heun") is heun
    assert list(SAMPLERS)[:4] == ["ddpm", "ddim", "euler", "heun"]
    assert all(name == function.__name__ for name, function in SAMPLERS.items())
    with pytest.raises(ValueError, match=r"sampler must be one of ddpm, ddim, euler, heun, midpoint, .*, got 'plms'"):
        get_sampler("plms")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ddim(LINEAR, 0), r"steps must be an integer in 1\.\.1000 \(T = 1000\), got 0"),
        (lambda: ddim(LINEAR, 1001), r"steps must be an integer in 1\.\.1000 \(T = 1000\), got 1001"),
        (lambda: ddpm(LINEAR, 2.5), r"steps must be an integer in 1\.\.1000 \(T = 1000\), got 2\.5"),
        (lambda: euler(LINEAR, 0), r"steps must be an integer in 1\.\.1000 \(T = 1000\), got 0"),
        (lambda: heun(FLOW, 0), r"steps must be an integer of at least 1, got 0"),
        (lambda: euler(EDM, -1), r"steps must be an integer of at least 1, got -1"),
        (
            lambda: ddim(LINEAR, 10, spacing="even"),
            r"spacing must be one of leading, trailing, linspace, karras, .*, beta, got 'even'",
        ),
        (
            lambda: euler(LINEAR, 10, spacing="even"),
            r"spacing must be one of leading, trailing, linspace, karras, .*, beta, got 'even'",
        ),
        (
            lambda: spaced_timesteps(1000, 1000, offset=1),
            r"timesteps must be integers in 0\.\.999 \(T = 1000\), got 1000",
        ),
        (lambda: ddim(LINEAR, timesteps=[1000, 3]), r"timesteps must be integers in 0\.\.999 \(T = 1000\), got 1000"),
        (lambda: ddim(LINEAR, timesteps=[3, -1]), r"timesteps must be integers in 0\.\.999 \(T = 1000\), got -1"),
        (lambda: ddim(LINEAR, timesteps=[3.5]), r"timesteps must be integers in 0\.\.999 \(T = 1000\), got 3\.5"),
        (
            lambda: ddim(LINEAR, timesteps=[3, 30]),
            r"timesteps must fall strictly from noise to data, got timesteps\[0\] = 3 and timesteps\[1\] = 30",
        ),
        (lambda: ddpm(LINEAR, timesteps=[3, 3]), r"timesteps must fall strictly"),
        (lambda: ddpm(LINEAR, timesteps=[]), r"timesteps must hold at least 1 value, got 0"),
        (lambda: ddpm(LINEAR, timesteps=[math.nan]), r"timesteps must be finite, got timesteps\[0\] = nan"),
        (lambda: ddim(LINEAR, 5, timesteps=[3]), r"give steps or timesteps, not both, got steps=5 and timesteps"),
        (lambda: ddim(LINEAR, 5, eta=-0.1), r"eta must be a finite number >= 0, got -0\.1"),
        (lambda: ddim(LINEAR, 5, eta=math.nan), r"eta must be a finite number >= 0, got nan"),
        (
            lambda: ddim(LINEAR, 5, eta=3),
            r"eta must leave 1 - abar_s - sd\^2 >= 0, got eta = 3 at the step t=\d+ -> s=\d+",
        ),
        (lambda: ddim(LINEAR, 5, eps_from="x"), r"eps_from must be 'model' or 'x0', got 'x'"),
        (lambda: ddim(LINEAR, 5, clip=-1), r"clip must be positive, or None for no clip, got -1"),
        (lambda: ddpm(LINEAR, 5, clip=math.nan), r"clip must be positive, or None for no clip, got nan"),
        (
            lambda: ddpm(LINEAR, variance="large"),
            r"variance must be 'beta', 'beta_tilde' or a number in \[0, 1\], got 'large'",
        ),
        (lambda: ddpm(LINEAR, variance=-0.5), r"variance must be .*, got -0\.5"),
        (lambda: ddpm(FLOW), r"ddpm needs exactly one of steps, sigmas and timesteps, got none"),
        (lambda: ddim("linear", 5), r"schedule must be a diffkern Schedule, got str"),
        (lambda: ddim(LINEAR, 5, prediction="noise"), r"prediction must be one of .*, got 'noise'"),
        (lambda: euler(LINEAR, 5, prediction="noise"), r"prediction must be one of .*, got 'noise'"),
        (lambda: euler(LINEAR), r"euler needs exactly one of steps, sigmas and timesteps, got none"),
        (
            lambda: heun(LINEAR, 5, sigmas=[1, 0]),
            r"heun needs exactly one of steps, sigmas and timesteps, got steps and sigmas",
        ),
        (lambda: euler("linear", 5), r"schedule must be a diffkern Schedule, got str"),
        (
            lambda: euler(EDM, sigmas=[1.0, 2.0]),
            r"sigmas must fall strictly from noise to data, got sigmas\[0\] = 1 and sigmas\[1\] = 2",
        ),
        (lambda: euler(EDM, sigmas=[1.0]), r"sigmas must hold at least 2 values, got 1"),
        (lambda: euler(EDM, sigmas=[math.inf, 1.0]), r"sigmas must be finite, got sigmas\[0\] = inf"),
        (lambda: euler(EDM, sigmas=[1.0, -1.0, -2.0]), r"sigmas must not be negative, got -2"),
        (lambda: euler(EDM, sigmas=[1.0, -1.0]), r"sigmas must not be negative, got -1"),
        (
            lambda: euler(EDM, timesteps=[3, 1]),
            r"an EDM schedule takes steps or sigmas, its time is sigma, got timesteps",
        ),
        (lambda: euler(FLOW, sigmas=[1, 0]), r"a flow schedule takes steps or timesteps, got sigmas"),
        (lambda: euler(FLOW, timesteps=[1.0, 0.0]), r"timesteps must rise strictly from noise to data"),
        (lambda: euler(FLOW, timesteps=[0.0, 1.5]), r"t must lie in \[0, 1\] \(0 is noise, 1 is data\), got 1\.5"),
        (lambda: euler(FLOW, 5, prediction="eps"), r"'eps' does not determine x0 and eps where .*: flow, t=0"),
        (lambda: euler(LINEAR, timesteps=[1000, 3]), r"timesteps must lie in 0\.\.999 \(T = 1000\), got 1000"),
        (lambda: euler(LINEAR, sigmas=[1e6, 1.0]), r"sigma must lie in the schedule's range"),
    ],
)
def test_bad_input_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""DDIM, DDPM, Euler and Heun on Gaussian data, whose answers are known in closed form: orders, moments, limits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.oracles import Gaussian, moments
from helpers.sampler_cases import COSINE, DATA, EDM, LINEAR, TABLE_PREDICTIONS, X, run
from helpers.suites import few

from diffkern import schedules
from diffkern.samplers import ddim, ddpm, euler, heun

# --- closed forms on Gaussian data -----------------------------------------------------------------------------------


def order(errors: list[float]) -> float:
    return float(np.mean(np.log2(np.array(errors[:-1]) / np.array(errors[1:]))))


@pytest.mark.parametrize(("sampler", "want"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("prediction", few(["edm", "eps", "x0"], "edm"))
def test_order_of_convergence_in_sigma(sampler, want, prediction):
    """Geometric noise levels from 20 to 0.02, against the exact solution."""
    x = 20 * X
    exact = DATA.ode(x, (1, 20.0), (1, 0.02))
    errors = []
    for n in (32, 64, 128, 256):
        sigmas = 20 * (0.02 / 20) ** (torch.arange(n + 1, dtype=torch.float64) / n)
        # heun's last step is Euler's, whose own error is of second order in the step.
        errors.append(float((run(sampler(EDM, sigmas=sigmas, prediction=prediction), EDM, x) - exact).abs().max()))
    assert order(errors[1:]) == pytest.approx(want, abs=0.15)
    assert errors[-1] < (0.03 if want == 1 else 2e-3)


@pytest.mark.parametrize(("sampler", "want"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_order_of_convergence_in_flow_time(sampler, want, sigma_min):
    schedule = schedules.flow(sigma_min)
    exact = DATA.ode(X, (0, 1), (1, sigma_min))
    errors = [float((run(sampler(schedule, n), schedule) - exact).abs().max()) for n in (16, 32, 64, 128)]
    assert order(errors[1:]) == pytest.approx(want, abs=0.15)
    assert errors[-1] < (0.02 if want == 1 else 2e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim_converges_to_the_probability_flow(prediction):
    fine = schedules.cosine(2**14)
    start, end = (float(fine.alpha(fine.T - 1)), float(fine.sigma(fine.T - 1))), (1.0, 0.0)
    exact = DATA.ode(X, start, end)
    errors = []
    for n in (64, 128, 256, 512):
        plan = ddim(fine, n, spacing="trailing", prediction=prediction)
        errors.append(float((run(plan, fine) - exact).abs().max()))
    assert order(errors) == pytest.approx(1, abs=0.15)
    assert errors[-1] < 5e-3


def test_ddpm_with_beta_is_exact_for_unit_normal_data():
    """For N(0, 1) data beta is the exact reverse variance: each state is N(0, 1), and the last one E[x0 given it]."""
    plan = ddpm(LINEAR, variance="beta")
    mean, variance = moments(plan, Gaussian(0, 1).model(LINEAR, "eps"), 0.0, 1.0)
    assert mean == pytest.approx(0, abs=1e-12)
    assert variance == pytest.approx(float(LINEAR.abar(0)), rel=1e-9)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", 0.5])
def test_ddpm_ends_on_a_known_point(variance):
    """For data that is one point, every reverse step knows it."""
    mean, var = moments(ddpm(COSINE, 50, variance=variance), Gaussian(0.7, 0.0).model(COSINE, "eps"), 0.0, 1.0)
    assert mean == pytest.approx(0.7, rel=1e-9)
    assert var == pytest.approx(0, abs=1e-12)


# make test: every prediction and every variance.
DDPM = ("eps-beta", "x0-beta_tilde", "v-0.4", "score-beta", "velocity-beta_tilde", "mu-0.4")


@pytest.mark.parametrize(
    ("prediction", "variance"),
    few(itertools.product(TABLE_PREDICTIONS, ["beta", "beta_tilde", 0.4]), *DDPM),
)
def test_ddpm_reproduces_the_data_distribution(prediction, variance):
    plan = ddpm(LINEAR, variance=variance, prediction=prediction)
    mean, var = moments(plan, DATA.model(LINEAR, prediction), 0.0, 1.0)
    assert mean == pytest.approx(DATA.mean, abs=3e-3)
    assert math.sqrt(var) == pytest.approx(DATA.std, rel=0.02)


def test_variance_orders_the_spread():
    spread = [
        moments(ddpm(COSINE, 20, variance=v), DATA.model(COSINE, "eps"), 0.0, 1.0)[1] for v in (0.0, 0.3, 0.7, 1.0)
    ]
    assert spread == sorted(spread)
    ends = [
        moments(ddpm(COSINE, 20, variance=v), DATA.model(COSINE, "eps"), 0.0, 1.0)[1] for v in ("beta_tilde", "beta")
    ]
    assert [spread[0], spread[-1]] == pytest.approx(ends, rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_with_any_eta_keeps_the_marginals(eta):
    mean, var = moments(ddim(LINEAR, 500, eta=eta), DATA.model(LINEAR, "eps"), 0.0, 1.0)
    assert mean == pytest.approx(DATA.mean, abs=3e-3)
    assert math.sqrt(var) == pytest.approx(DATA.std, rel=0.02)


def test_zero_terminal_snr_samples_with_v():
    """At abar = 0 the first step knows nothing of x but that it is noise; eps cannot start there."""
    table = schedules.from_alphas_cumprod(torch.cat([COSINE.alphas_cumprod[:-1], torch.zeros(1, dtype=torch.float64)]))
    got = run(ddim(table, 100, spacing="trailing", prediction="v"), table)
    torch.testing.assert_close(got, DATA.ode(X, (0, 1), (1, 0)), rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="'eps' does not determine x0 and eps"):
        ddim(table, 100, spacing="trailing")
    with pytest.raises(ValueError, match=r"needs a finite sigma > 0 at each model call, got inf at t=999"):
        euler(table, 10, prediction="v")

"""Discrete schedules as paths: the SDE between levels, the inverse, sub-sequences, zero terminal SNR, new tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffkern import schedules
from diffkern.samplers import ddim, ddpm, euler

LINEAR = schedules.linear()
SHORT = schedules.linear(20, 0.01, 0.3)
COSINE = schedules.cosine()


def close(got: Tensor, want: object, rtol: float = 1e-12, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(got.detach()), np.asarray(want), rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------------------- between the levels


@pytest.mark.parametrize("schedule", [LINEAR, SHORT, COSINE], ids=["linear", "short", "cosine"])
def test_derivatives_at_fractional_times_are_those_of_the_interpolation(schedule):
    t = torch.arange(schedule.T - 1).double() - 1 + torch.linspace(0.1, 0.9, schedule.T - 1, dtype=torch.float64)
    for value, dot in ((schedule.alpha, schedule.alpha_dot), (schedule.sigma, schedule.sigma_dot)):
        leaf = t.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(value(leaf).sum(), leaf)
        close(dot(t), slope, rtol=1e-8)
    close(schedule.diffusion(t) ** 2, -2 * schedule.drift(t))


def test_the_interpolations_sde_gives_the_table_exactly():
    """ln alpha = int f and dv = (2 f v + g^2) dt over each step, by Gauss quadrature, inside the step."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    m, v = 1.0, 0.0
    for t in range(-1, SHORT.T - 1):
        inside = torch.tensor(t + 0.5 * (nodes + 1))
        f = SHORT.drift(inside).numpy()
        decay = float(0.5 * weights @ f)
        m *= math.exp(decay)
        # g^2 = -2 f, so 1 - v decays by e^(2 int f).
        v = 1 - (1 - v) * math.exp(2 * decay)
        assert m == pytest.approx(float(SHORT.alpha(t + 1)), rel=1e-12)
        assert v == pytest.approx(float(SHORT.sigma(t + 1)) ** 2, rel=1e-12)


def test_whole_times_have_the_sde_of_the_ddpm_chain():
    t = torch.arange(LINEAR.T)
    close(LINEAR.drift(t), -0.5 * LINEAR.betas.numpy())
    close(LINEAR.diffusion(t), np.sqrt(LINEAR.betas.numpy()))
    close(LINEAR.drift(t.double()), LINEAR.drift(t))
    close(LINEAR.alpha_dot(t), LINEAR.drift(t) * LINEAR.alpha(t))
    # To the order of the step, the slope of the interpolation on both sides.
    close(LINEAR.drift(t[1:] - 1e-6), LINEAR.drift(t[1:]), rtol=0.35)
    close(LINEAR.drift(t[300:] - 1e-6), LINEAR.drift(t[300:]), rtol=0.02)


@pytest.mark.parametrize("schedule", [LINEAR, SHORT, COSINE], ids=["linear", "short", "cosine"])
def test_time_of_log_snr_is_the_inverse(schedule):
    t = torch.cat([torch.arange(schedule.T).double(), torch.linspace(-0.99, schedule.T - 1, 777, dtype=torch.float64)])
    close(schedule.time_of_log_snr(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-9)
    assert float(schedule.time_of_log_snr(math.inf)) == -1
    assert float(schedule.time_of_log_snr(schedule.log_snr(schedule.T - 1))) == schedule.T - 1
    with pytest.raises(ValueError, match="log_snr must lie in the schedule's range"):
        schedule.time_of_log_snr(-60.0)


def test_time_of_log_snr_of_repeated_levels_and_of_zero_snr():
    arc = schedules.cosine_arc()
    value = arc.log_snr(torch.tensor([0, 500, 999]))
    close(arc.log_snr(arc.time_of_log_snr(value)), value, rtol=1e-9, atol=1e-9)
    ending = schedules.zero_terminal_snr(LINEAR)
    assert float(ending.time_of_log_snr(-math.inf)) == 999
    assert float(ending.time_of_log_snr(ending.log_snr(998))) == pytest.approx(998)
    close(ending.time_of_log_snr(ending.log_snr(torch.arange(999))), np.arange(999), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- new tables


def test_sigmoid_exponential_and_laplace():
    x = np.linspace(-6, 6, 1000)
    close(schedules.sigmoid().betas, 1e-4 + (0.02 - 1e-4) / (1 + np.exp(-x)), rtol=1e-9)
    close(schedules.exponential().alphas_cumprod, np.exp(-12 * np.arange(1, 1001) / 1000))
    close(schedules.exponential(10, 2.0).betas, np.full(10, 1 - math.exp(-0.2)), rtol=1e-12)
    table = schedules.laplace(1000, 0.3, 0.7)
    t = np.arange(1, 1000) / 1000
    log_snr = 0.3 - 0.7 * np.sign(0.5 - t) * np.log(1 - 2 * (1 - 1e-6) * np.abs(0.5 - t))
    close(table.log_snr(torch.arange(999)), log_snr, rtol=1e-9, atol=1e-9)


def test_laplace_has_its_density():
    """For uniform t the log-SNR is Laplace(mu, b): its quantiles at t are the formula's."""
    table = schedules.laplace_vp(0.5, 2.0, 1e-9)
    t = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
    want = torch.distributions.Laplace(torch.tensor(0.5, dtype=torch.float64), 2.0).icdf(1 - t)
    close(table.log_snr(t), want, rtol=1e-6, atol=1e-6)


def test_zero_terminal_snr():
    table = schedules.zero_terminal_snr(LINEAR)
    abar = LINEAR.alphas_cumprod.numpy()
    root = np.sqrt(abar)
    close(table.alpha(torch.arange(1000)), (root - root[-1]) * root[0] / (root[0] - root[-1]), rtol=1e-10, atol=1e-15)
    assert float(table.alphas_cumprod[-1]) == 0
    assert float(table.alphas_cumprod[0]) == pytest.approx(abar[0], rel=1e-14)
    assert table == schedules.zero_terminal_snr(table)
    assert table.name == "linear_zero_snr"
    # Its last level is pure noise: v says what x0 is there, eps does not.
    ddim(table, 10, spacing="trailing", prediction="v")
    with pytest.raises(ValueError, match="prediction 'eps' does not determine x0"):
        ddim(table, 10, spacing="trailing")


# ------------------------------------------------------------------------------------------------- sub-sequences


def test_a_subsequence_is_the_spaced_chain():
    times = [999, 700, 301, 5, 0]
    spaced = LINEAR.subsequence(times)
    abar = LINEAR.alphas_cumprod[times[::-1]].numpy()
    close(spaced.alphas_cumprod, abar, rtol=0)
    close(spaced.betas, 1 - abar / np.concatenate([[1.0], abar[:-1]]), rtol=1e-12)
    assert spaced.kept.tolist() == times[::-1]
    assert spaced == LINEAR.subsequence(torch.tensor(times[::-1]))
    assert spaced != schedules.from_alphas_cumprod(abar)
    assert LINEAR.kept.tolist() == list(range(1000))
    # Marginals and posteriors are those of the full table at the kept times.
    close(spaced.posterior(3, 1)[2], LINEAR.posterior(700, 5)[2], rtol=1e-12)
    assert spaced.subsequence([0, 3]).kept.tolist() == [0, 700]
    assert "5 of 1000" in repr(spaced)


@pytest.mark.parametrize("make", [ddpm, ddim, lambda s, **k: ddim(s, eta=0.7, **k)], ids=["ddpm", "ddim", "eta"])
def test_sampling_a_subsequence_is_sampling_at_its_times(make):
    times = [999, 700, 301, 5, 0]
    one, two = make(LINEAR.subsequence(times), timesteps=range(4, -1, -1)), make(LINEAR, timesteps=times)
    assert [row.time for row in one.rows] == times
    assert one.rows == two.rows


def test_euler_on_a_subsequence_gives_the_network_the_kept_times():
    plan = euler(LINEAR.subsequence([0, 100, 999]), timesteps=[2, 1.5, 0])
    assert [row.time for row in plan.rows] == [999, 549.5, 0]
    assert plan.init_scale == pytest.approx(float(LINEAR.sigma_ve(999)))
    kept = LINEAR.subsequence([0, 100, 999])
    assert kept.model_time("eps", torch.tensor([0, 2])).tolist() == [0, 999]
    assert float(LINEAR.model_time("eps", 3.5)) == 3.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LINEAR.subsequence([0, 1000]), r"times must be integers in 0\.\.999 \(T = 1000\), got 1000"),
        (lambda: LINEAR.subsequence([]), r"times must rise or fall strictly and hold at least one, got \[\]"),
        (lambda: LINEAR.subsequence([3, 3]), r"times must rise or fall strictly .* got \[3, 3\]"),
        (lambda: LINEAR.subsequence([1, 3, 2]), r"times must rise or fall strictly .* got \[1, 3, 2\]"),
        (lambda: LINEAR.subsequence([1.5, 3]), r"times must be integers in 0\.\.999 \(T = 1000\), got 1\.5"),
        (lambda: LINEAR.subsequence([1, 3]).model_time("eps", 2), r"t must be an integer in 0\.\.1 \(T = 2\), got 2"),
        (lambda: LINEAR.subsequence([1, 3]).model_time("eps", 1.5), r"t must lie in \[0, 1\] \(T = 2\), got 1\.5"),
        (lambda: schedules.zero_terminal_snr(schedules.flow()), r"needs a discrete schedule, got FlowSchedule"),
        (lambda: schedules.zero_terminal_snr(LINEAR.subsequence([4])), r"needs a table whose abar falls, got"),
        (
            lambda: schedules.zero_terminal_snr(LINEAR).drift(998.5),
            r"t must lie outside \(998, 999\), as abar ends at 0, got 998\.5",
        ),
        (lambda: LINEAR.drift(1000), r"t must be an integer in 0\.\.999 \(T = 1000\), got 1000"),
        (lambda: LINEAR.sigma_dot(999.5), r"t must lie in \(-1, 999\] \(T = 1000\), got 999\.5"),
        (lambda: schedules.exponential(10, 0.0), r"rate must be positive, got 0\.0"),
        (lambda: schedules.sigmoid(beta_end=1.5), r"beta must lie in \(0, 1\), got betas\["),
        (lambda: schedules.laplace(b=1.0, compat=True), r"compat knows mu = 0, b = 0\.5, eps = 1e-6 only"),
        (lambda: schedules.laplace(0), r"T must be an integer of at least 1, got 0"),
    ],
)
def test_bad_input_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()

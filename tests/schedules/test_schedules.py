"""Schedules against independent formulas and published values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffkern import schedules

TABLES = {
    "linear": schedules.linear(),
    "scaled_linear": schedules.scaled_linear(),
    "cosine": schedules.cosine(),
    "cosine_arc": schedules.cosine_arc(),
    "short": schedules.linear(7, 0.01, 0.3),
}


def close(got: torch.Tensor, want: object, rtol: float = 1e-12, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=rtol, atol=atol)


def test_linear_is_the_ddpm_table():
    betas = np.linspace(1e-4, 0.02, 1000)
    close(TABLES["linear"].betas, betas, rtol=1e-10)
    close(TABLES["linear"].alphas_cumprod, np.cumprod(1 - betas))
    close(TABLES["linear"].alphas, 1 - betas)


def test_linear_of_lecture_000_has_other_ends():
    close(schedules.linear(1000, 1e-4, 0.04).betas, np.linspace(1e-4, 0.04, 1000), rtol=1e-10)


def test_scaled_linear():
    close(TABLES["scaled_linear"].betas, np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, rtol=1e-10)


def test_cosine_with_offset():
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f((i + 1) / 1000) / f(i / 1000), 0.999) for i in range(1000)]
    close(TABLES["cosine"].betas, betas, rtol=1e-9)
    assert float(TABLES["cosine"].betas[-1]) == pytest.approx(0.999)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_cosine_arc_is_the_lectures_formula_kept_inside_bounds(eps):
    arc = schedules.cosine_arc(1000, eps)
    t = np.arange(1, 1001) / 1000
    close(arc.alphas_cumprod, np.clip((np.cos(np.pi * t) + 1) / 2, eps, 1 - eps), rtol=1e-11)
    # Inside the bounds, uniform movement on a quarter circle.
    close(arc.signal_rate(499), math.cos(math.pi / 4))
    close(arc.noise_rate(499), math.sin(math.pi / 4))
    # Steps on a bound add no noise, and nothing of them is NaN.
    assert float(arc.betas[1]) == 0
    assert torch.isfinite(arc.variance(torch.arange(1, 1000), kind=0.5)).all()


def test_float32_tables_of_others_differ_from_ours_as_much_as_measured():
    """peers compute in float32: relative error of abar up to 3.6e-7, of 1 - abar at t = 0 1.7e-4 (linear)."""
    theirs = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32), 0)
    ours = TABLES["linear"]
    wrong = (theirs.double() / ours.alphas_cumprod - 1).abs()
    assert 1e-7 < float(wrong.max()) <= 3.7e-7
    taken = schedules.from_alphas_cumprod(theirs)
    close(taken.alphas_cumprod, theirs.double(), rtol=0)
    assert float((taken.sigma(0) ** 2 / ours.sigma(0) ** 2 - 1).abs()) == pytest.approx(1.7e-4, rel=0.05)


@pytest.mark.parametrize(
    ("name", "t", "sigma"),
    [
        ("linear", 999, 157.4073),
        ("linear", 749.25, 17.2799),
        ("linear", 499.5, 3.4336),
        ("linear", 249.75, 0.9568),
        ("linear", 0, 0.0100),
        ("linear", 799, 25.5285),
        ("linear", 599, 6.1352),
        ("linear", 400, 2.0411),
        ("linear", 200, 0.7236),
    ],
)
def test_sigma_at_fractional_times(name, t, sigma):
    assert float(TABLES[name].sigma_ve(t)) == pytest.approx(sigma, abs=6e-5)


def test_sigma_of_the_unscaled_linear_table_with_stable_diffusion_ends():
    table = schedules.linear(1000, 0.00085, 0.012)
    for t, sigma in ((999, 25.1461), (749.25, 6.5650), (499.5, 2.2803), (249.75, 0.8698)):
        assert float(table.sigma_ve(t)) == pytest.approx(sigma, abs=6e-5)


@pytest.mark.parametrize("name", TABLES)
def test_rates(name):
    s = TABLES[name]
    t = torch.arange(s.T)
    abar = s.alphas_cumprod.numpy()
    close(s.alpha(t), np.sqrt(abar))
    close(s.sigma(t), np.sqrt(1 - abar))
    close(s.alpha(t) ** 2 + s.sigma(t) ** 2, np.ones(s.T))
    close(s.snr(t), abar / (1 - abar), rtol=1e-10)
    close(s.log_snr(t), np.log(abar / (1 - abar)), rtol=1e-10, atol=1e-10)
    close(s.alpha(t.double()), np.sqrt(abar))
    assert float(s.alpha(-1)) == 1
    assert float(s.sigma(-1)) == 0
    assert float(s.snr(-1)) == math.inf
    assert s.alpha(t).dtype == torch.float64
    assert s.alpha(3).shape == ()
    assert s.alpha(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)).shape == (2, 2)


@pytest.mark.parametrize("name", TABLES)
def test_time_of_sigma_inverts_the_table(name):
    s = TABLES[name]
    t = torch.arange(s.T)
    if name == "cosine_arc":  # equal levels at both ends have no single time
        t = t[2:-3]
    close(s.time_of_sigma(s.sigma_ve(t)), t.double(), rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match=r"sigma must lie in the schedule's range \[.*\], got 1e\+06|got 1000000"):
        s.time_of_sigma(1e6)


def test_time_derivatives():
    """Against central differences of a fine table, and the flow's and EDM's own."""
    s = schedules.linear(100_000, 1e-6, 2e-4)
    t = torch.tensor([500, 5000, 50_000, 99_000])
    close(s.alpha_dot(t), (s.alpha(t + 1) - s.alpha(t - 1)) / 2, rtol=1e-3)
    close(s.sigma_dot(t), (s.sigma(t + 1) - s.sigma(t - 1)) / 2, rtol=2e-3)
    close(s.alpha(t) * s.alpha_dot(t) + s.sigma(t) * s.sigma_dot(t), np.zeros(4), atol=1e-18)
    f, e = schedules.flow(0.1), schedules.edm()
    assert (float(f.alpha_dot(0.3)), float(f.sigma_dot(0.3))) == (1.0, -0.9)
    assert (float(e.alpha_dot(2.0)), float(e.sigma_dot(2.0))) == (0.0, 1.0)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("gap", [1, 3])
def test_posterior_is_bayes_rule(name, gap):
    """q(x_s | x_t, x0) from the product of its two Gaussian factors, precision by precision."""
    s_ = TABLES[name]
    t = torch.arange(5, s_.T) if name == "short" else torch.arange(5, s_.T - 5)
    s = t - gap
    abar_t, abar_s = s_.abar(t).numpy(), s_.abar(s).numpy()
    ratio = np.sqrt(
        abar_t / abar_s
    )  # x_t = ratio x_s + noise of variance 1 - ratio^2; x_s ~ N(sqrt(abar_s) x0, 1 - abar_s)
    if name == "cosine_arc":
        keep = ratio < 1
        t, s, abar_t, abar_s, ratio = t[keep], s[keep], abar_t[keep], abar_s[keep], ratio[keep]
    precision = ratio**2 / (1 - ratio**2) + 1 / (1 - abar_s)
    coef_x0, coef_xt, variance = s_.posterior(t, s)
    close(variance, 1 / precision, rtol=1e-8)
    close(coef_xt, ratio / (1 - ratio**2) / precision, rtol=1e-8)
    close(coef_x0, np.sqrt(abar_s) / (1 - abar_s) / precision, rtol=1e-8)
    close(s_.beta(t, s), 1 - ratio**2, rtol=1e-8)


def test_posterior_defaults_to_one_step_and_ends_on_data():
    s = TABLES["linear"]
    t = torch.arange(1, s.T)
    for one, two in zip(s.posterior(t), s.posterior(t, t - 1), strict=True):
        assert torch.equal(one, two)
    close(s.beta(t), s.betas[1:])
    coef_x0, coef_xt, variance = s.posterior(0)
    assert (float(coef_x0), float(coef_xt), float(variance)) == (1.0, 0.0, 0.0)


def test_variance_between_is_the_log_mixture():
    s = TABLES["linear"]
    t = torch.arange(1, s.T)
    beta, tilde = s.variance(t, kind="beta"), s.variance(t)
    close(beta, s.betas[1:])
    close(tilde, s.posterior(t)[2])
    assert (tilde < beta).all()
    close(s.variance(t, kind=0.3), (0.3 * beta.log() + 0.7 * tilde.log()).exp(), rtol=1e-10)
    assert torch.equal(s.variance(t, kind=0.0), tilde)
    assert torch.equal(s.variance(t, kind=1.0), beta)


@pytest.mark.parametrize("name", TABLES)
def test_single_steps_and_jumps_compose_to_the_closed_form(name):
    s = TABLES[name]
    signal, variance = 1.0, 0.0
    for keep, noise, u, v in s.step_table().tolist():
        signal, variance = signal * keep, variance * keep**2 + noise**2
        assert (u, v) == (0, 1)
    assert signal**2 == pytest.approx(float(s.abar(s.T - 1)), rel=1e-9)
    assert variance == pytest.approx(1 - float(s.abar(s.T - 1)), rel=1e-9)
    keep, noise, _, _ = s.renoise_coefficients(1, s.T - 1).tolist()
    assert keep**2 * float(s.abar(1)) == pytest.approx(float(s.abar(s.T - 1)))
    assert keep**2 * (1 - float(s.abar(1))) + noise**2 == pytest.approx(1 - float(s.abar(s.T - 1)))
    close(s.renoise_coefficients(-1, torch.tensor([2, 3]))[:, 0], s.alpha(torch.tensor([2, 3])))


def test_flow():
    s = schedules.flow(0.01)
    t = torch.tensor([0.0, 0.25, 1.0])
    close(s.alpha(t), [0, 0.25, 1])
    close(s.sigma(t), [1, 1 - 0.99 * 0.25, 0.01])
    assert float(s.sigma(1)) == 0.01
    assert float(schedules.flow().sigma(1)) == 0.0
    assert (s.noise_end, s.data_end) == (0.0, 1.0)


def test_python_floats_keep_their_64_bits():
    assert float(schedules.flow().alpha(0.1)) == 0.1
    assert float(schedules.edm().sigma([0.1, 0.2])[1]) == 0.2
    assert float(schedules.edm().sigma(np.float64(0.1))) == 0.1
    assert schedules.as_time(torch.tensor(0.5, dtype=torch.float16)).dtype == torch.float64


def test_edm_levels_and_preconditioning():
    s = schedules.edm()
    close(s.sigmas(5), [80, 17.5278, 2.5152, 0.1698, 0.002, 0], atol=6e-5, rtol=0)
    close(s.model_time("edm", s.sigmas(5)[:-1]), [1.0955, 0.7159, 0.2306, -0.4434, -1.5537], atol=6e-5, rtol=0)
    assert s.sigmas(1).tolist() == [pytest.approx(80), 0]
    c_skip, c_out, c_in, c_noise = s.preconditioning(2.0)
    # Unit variance for the network's input and target when the data have variance sigma_data^2.
    assert float(c_in**2) * (4 + 0.25) == pytest.approx(1)
    assert float(((1 - c_skip) ** 2 * 0.25 + c_skip**2 * 4) / c_out**2) == pytest.approx(1)
    assert float(c_noise) == pytest.approx(math.log(2) / 4)
    assert float(s.input_scale("edm", 2.0)) == float(c_in)
    assert float(s.input_scale("eps", 2.0)) == 1
    assert float(s.model_time("eps", 2.0)) == 2
    assert float(TABLES["linear"].input_scale("eps", 3)) == 1
    assert int(TABLES["linear"].model_time("eps", 3)) == 3
    assert (s.noise_end, s.data_end) == (80.0, 0.0)


def test_table_rows_are_the_noising_coefficients_and_cached():
    s = TABLES["cosine"]
    table = s.table("v")
    assert table.shape == (1000, 4)
    assert table.dtype == torch.float64
    assert s.table("v", "cpu") is table
    alpha, sigma = s.alpha(17), s.sigma(17)
    close(table[17], torch.stack([alpha, sigma, -sigma, alpha]))
    close(s.coefficients("v", torch.tensor([17, 3])), table[[17, 3]])
    close(schedules.flow().coefficients("velocity", torch.tensor([0.25])), [[0.25, 0.75, 1.0, -1.0]])


def test_zero_terminal_snr_is_a_schedule():
    s = schedules.from_alphas_cumprod([0.9, 0.5, 0.0])
    assert float(s.alpha(2)) == 0
    assert float(s.betas[-1]) == 1
    assert float(s.snr(2)) == 0
    assert s.table("v")[2].tolist() == [0, 1, -1, 0]


def test_schedules_compare_print_and_do_not_change():
    s = schedules.linear(10)
    assert s == schedules.linear(10)
    assert hash(s) == hash(schedules.linear(10))
    assert s != schedules.linear(11)
    assert schedules.flow() == schedules.flow(0.0)
    assert schedules.edm() != schedules.edm(rho=5)
    assert "linear" in repr(s)
    assert "T=10" in repr(s)
    s.betas.zero_()
    s.alphas_cumprod.zero_()
    assert s == schedules.linear(10)


def test_times_outside_a_schedule_give_nan_where_looking_would_stall_the_device():
    """The same code path, run on the meta device: no value is looked at."""
    t = torch.full((2,), 5000, device="meta")
    assert schedules.linear().alpha(t).shape == (2,)
    assert schedules.flow().alpha(torch.full((2,), 5.0, device="meta")).shape == (2,)


def test_rates_are_no_view_of_the_times():
    """Where alpha or sigma is the time itself, what is done to it leaves the times of the caller as they were."""
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    schedules.flow().alpha(t).zero_()
    schedules.edm().sigma(t).zero_()
    schedules.flow().alpha(t.numpy()).zero_()
    assert t.tolist() == [0.25, 0.5]


def test_no_times_give_no_rates():
    assert schedules.flow().alpha(torch.empty(0)).shape == (0,)
    assert schedules.edm().coefficients("edm", torch.empty(0)).shape == (0, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.from_betas([0.1, 1.2]), r"beta must lie in \(0, 1\), got betas\[1\] = 1\.2"),
        (lambda: schedules.from_betas([0.0, 0.2]), r"beta must lie in \(0, 1\), got betas\[0\] = 0\.0"),
        (lambda: schedules.from_betas([0.1, math.nan]), r"betas must be finite, got betas\[1\] = nan"),
        (lambda: schedules.from_betas([]), r"betas must be a non-empty list of numbers, got shape \[0\]"),
        (
            lambda: schedules.from_betas(torch.ones(2, 2)),
            r"betas must be a non-empty list of numbers, got shape \[2, 2\]",
        ),
        (lambda: schedules.linear(beta_end=1.5), r"beta must lie in \(0, 1\), got beta_end = 1\.5"),
        (lambda: schedules.scaled_linear(beta_start=-0.1), r"beta must lie in \(0, 1\), got beta_start = -0\.1"),
        (
            lambda: schedules.from_alphas_cumprod([0.5, 0.6]),
            r"must not increase with t, got alphas_cumprod\[0\] = 0\.5 and alphas_cumprod\[1\] = 0\.6",
        ),
        (
            lambda: schedules.from_alphas_cumprod([1.0, 0.6]),
            r"must lie in \(0, 1\), or be 0 at the last t, got alphas_cumprod\[0\] = 1\.0",
        ),
        (lambda: schedules.from_alphas_cumprod([0.5, 0.0, 0.0]), r"got alphas_cumprod\[1\] = 0\.0"),
        (
            lambda: schedules.from_alphas_cumprod([0.5, math.inf]),
            r"alphas_cumprod must be finite, got alphas_cumprod\[1\] = inf",
        ),
        (lambda: schedules.linear(0), r"T must be an integer of at least 1, got 0"),
        (lambda: schedules.cosine(2.5), r"T must be an integer of at least 1, got 2\.5"),
        (lambda: schedules.cosine(s=-1), r"s must be >= 0, got -1"),
        (lambda: schedules.cosine_arc(eps=0.5), r"eps must lie in \(0, 0\.5\), got 0\.5"),
        (lambda: schedules.flow(1.0), r"sigma_min must lie in \[0, 1\), got 1\.0"),
        (lambda: schedules.edm(sigma_min=3, sigma_max=2), r"must be 0 < sigma_min < sigma_max, got 3 and 2"),
        (lambda: schedules.edm(rho=0), r"rho must be positive, got 0"),
        (lambda: schedules.edm().sigmas(0), r"n must be an integer of at least 1, got 0"),
        (lambda: schedules.linear().alpha(1000), r"t must be an integer in -1\.\.999 \(T = 1000\), got 1000"),
        (
            lambda: schedules.linear().alpha(torch.tensor([3, -2])),
            r"t must be an integer in -1\.\.999 \(T = 1000\), got -2",
        ),
        (lambda: schedules.linear().alpha(999.5), r"t must lie in \[-1, 999\] \(T = 1000\), got 999\.5"),
        (lambda: schedules.linear().alpha_dot(-1), r"t must be an integer in 0\.\.999 \(T = 1000\), got -1"),
        (lambda: schedules.linear().alpha_dot(-1.0), r"t must lie in \(-1, 999\] \(T = 1000\), got -1\.0"),
        (
            lambda: schedules.linear().alpha(torch.tensor(True)),
            r"t must be a number or a tensor of numbers, got dtype torch\.bool",
        ),
        (lambda: schedules.linear().posterior(3, 3), r"s must be less than t, got s=3 and t=3"),
        (
            lambda: schedules.linear().variance(3, kind="large"),
            r"variance must be 'beta', 'beta_tilde' or a number in \[0, 1\], got 'large'",
        ),
        (lambda: schedules.linear().variance(3, kind=1.5), r"number in \[0, 1\], got 1\.5"),
        (lambda: schedules.cosine(max_beta=2**70), r"max_beta must lie in \(0, 1\), got 1\.18"),
        (lambda: schedules.cosine(max_beta=10**400), r"max_beta must be a number that float64 holds, got 1000"),
        (lambda: schedules.cosine(max_beta=[1]), r"max_beta must be a number that float64 holds, got \[1\]"),
        (lambda: schedules.cosine(s=2**70), r"s must leave a positive beta at each of the 1000 steps, got 1\.18"),
        (lambda: schedules.cosine(s="a"), r"s must be a number that float64 holds, got 'a'"),
        (lambda: schedules.linear(beta_start=2**70), r"beta must lie in \(0, 1\), got beta_start = 1\.18"),
        (lambda: schedules.scaled_linear(beta_end=10**400), r"beta_end must be a number that float64 holds, got 1000"),
        (lambda: schedules.sigmoid(beta_end=2**70), r"beta must lie in \(0, 1\), got betas"),
        (lambda: schedules.laplace(mu=10**400), r"mu must be a number that float64 holds, got 1000"),
        (lambda: schedules.flow().alpha(1.5), r"t must lie in \[0, 1\] \(0 is noise, 1 is data\), got 1\.5"),
        (
            lambda: schedules.vp().sigma(torch.tensor([0.5, math.nan, 2.0])),
            r"t must lie in \[0, 1\] \(0 is data, 1 is noise\), got nan",
        ),
        (lambda: schedules.edm().sigma(torch.tensor([1.0, math.inf, -1.0])), r"t must be a finite sigma >= 0, got inf"),
        (lambda: schedules.edm().alpha(-1.0), r"t must be a finite sigma >= 0, got -1\.0"),
        (lambda: schedules.linear().coefficients("noise", 3), r"prediction must be one of eps, x0, .*, got 'noise'"),
        (lambda: schedules.flow().coefficients("edm", 0.5), r"prediction 'edm' needs an EDM schedule, got flow"),
        (lambda: schedules.edm().coefficients("mu", 0.5), r"prediction 'mu' needs a discrete schedule, got edm"),
    ],
)
def test_bad_input_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()

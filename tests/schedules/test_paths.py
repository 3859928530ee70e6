"""Every schedule's interface against closed forms, autograd, and the moment equations of its SDE."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.path_cases import PATHS, close
from torch import Tensor

from diffkern import schedules
from diffkern.schedules import predictions
from diffkern.schedules.base import Schedule

FUNCTIONS = {
    # The definitions once more, with numpy: (alpha, sigma).
    "vp": (
        lambda t: np.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1),
        lambda t: np.sqrt(1 - np.exp(2 * (-0.25 * t**2 * 19.9 - 0.5 * t * 0.1))),
    ),
    "sub_vp": (
        lambda t: np.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1),
        lambda t: 1 - np.exp(2 * (-0.25 * t**2 * 19.9 - 0.5 * t * 0.1)),
    ),
    "cosine_vp": (lambda t: np.cos(np.pi * t / 2), lambda t: np.sin(np.pi * t / 2)),
    "cosine_vp offset": (
        lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2),
        lambda t: np.sqrt(1 - (np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2),
    ),
    "linear_log_snr": (
        lambda t: np.sqrt(1 / (1 + np.exp(-(13.3 - 18.3 * t)))),
        lambda t: np.sqrt(1 / (1 + np.exp(13.3 - 18.3 * t))),
    ),
    "ve": (np.ones_like, lambda t: 0.01 * 5000**t),
    "ve_exponential": (np.ones_like, lambda t: np.sqrt((np.exp(2 * t) - 1) / 2)),
    "ve_exponential 25": (np.ones_like, lambda t: np.sqrt((25 ** (2 * t) - 1) / (2 * np.log(25)))),
    "flow sigma_min": (lambda t: t, lambda t: 1 - 0.9 * t),
    "path cubic": (lambda t: t**3, lambda t: 1 - t**3),
    "log_snr_path": (
        lambda t: np.sqrt(1 / (1 + np.exp(-(8 - 16 * t + 2 * np.sin(6 * t))))),
        lambda t: np.sqrt(1 / (1 + np.exp(8 - 16 * t + 2 * np.sin(6 * t)))),
    ),
}


def inner(schedule: Schedule, n: int = 40) -> Tensor:
    """Times strictly inside the schedule, from near its data end to near its noise end."""
    part = torch.linspace(0.01, 0.99, n, dtype=torch.float64)
    return schedule.data_end + part * (schedule.noise_end - schedule.data_end)


def slope(function: object, t: Tensor) -> Tensor:
    leaf = t.clone().requires_grad_(True)
    (out,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return out


@pytest.mark.parametrize("name", FUNCTIONS)
def test_alpha_and_sigma_are_the_formulas(name):
    alpha, sigma = FUNCTIONS[name]
    t = inner(PATHS[name])
    close(PATHS[name].alpha(t), alpha(t.numpy()))
    close(PATHS[name].sigma(t), sigma(t.numpy()), rtol=1e-11)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_those_of_autograd(name):
    s, t = PATHS[name], inner(PATHS[name])
    close(s.sigma_dot(t), slope(s.sigma, t), rtol=1e-9)
    close(s.log_snr_dot(t), slope(s.log_snr, t), rtol=1e-9)
    if (s.alpha(t) == 1).all():
        assert not s.alpha_dot(t).any()
    else:
        close(s.alpha_dot(t), slope(s.alpha, t), rtol=1e-9)
    # Under inference, too, where autograd is off.
    with torch.inference_mode():
        close(s.sigma_dot(t), slope_like(s, t), rtol=1e-12)


def slope_like(s: Schedule, t: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return s.sigma_dot(t.clone())


@pytest.mark.parametrize("name", PATHS)
def test_ratios(name):
    s, t = PATHS[name], inner(PATHS[name])
    ratio = s.alpha(t) / s.sigma(t)
    close(s.snr(t), ratio**2)
    close(s.log_snr(t), 2 * ratio.log(), rtol=1e-10, atol=1e-12)
    close(s.sigma_ve(t), 1 / ratio)
    close(s.marginal_std(t), s.sigma(t))
    close(s.marginal_std(t, 0.5), (0.25 * s.alpha(t) ** 2 + s.sigma(t) ** 2).sqrt())
    assert s.alpha(0.5).shape == ()
    assert s.sigma(t.reshape(1, -1).float()).dtype == torch.float64


@pytest.mark.parametrize("name", PATHS)
def test_time_of_log_snr_is_the_inverse(name):
    s, t = PATHS[name], inner(PATHS[name])
    values = s.log_snr(t)
    assert (values[:-1] > values[1:]).all()
    close(s.time_of_log_snr(values), t, rtol=1e-9, atol=1e-12)
    close(s.time_of_log_snr(values), Schedule.time_of_log_snr(s, values), rtol=1e-9, atol=1e-12)
    close(s.log_snr(s.time_of_log_snr(values)), values, rtol=1e-9, atol=1e-9)
    close(s.time_of_sigma(s.sigma_ve(t)), t, rtol=1e-9, atol=1e-12)
    for end in (s.data_end, s.noise_end):
        assert float(s.time_of_log_snr(s.log_snr(end))) == pytest.approx(end, abs=1e-12)
    assert s.time_of_log_snr(values.reshape(1, -1)).shape == (1, len(values))


@pytest.mark.parametrize("name", ["vp", "sub_vp", "cosine_vp", "cosine_vp offset", "ve_exponential", "flow", "edm"])
def test_the_inverse_keeps_its_digits_next_to_data(name):
    """Where 1 - alpha^2 and 1 - abar cancel, formulas that are not written for it lose all digits."""
    s = PATHS[name]
    value = torch.tensor([20.0, 40.0, 60.0], dtype=torch.float64)
    t = s.time_of_log_snr(value)
    # What rounding t itself can do: a flow's data end is 1, with 16 digits after the point.
    allowed = 4e-16 * s.log_snr_dot(t).abs().numpy() * float(s.data_end == 1) + 1e-9
    assert (np.abs((s.log_snr(t) - value).numpy()) <= allowed).all()


def moments(s: Schedule, start: float, end: float, n: int = 4000) -> tuple[float, float]:
    """dm = f m dtau, dv = (2 f v + g^2) dtau by Runge-Kutta in noising time from the marginal at `start`."""
    tau = torch.linspace(start, end, 2 * n + 1, dtype=torch.float64)  # with the points half way
    f, g2 = s.drift(tau).tolist(), s.diffusion_squared(tau).tolist()
    h = abs(end - start) / n
    m, v = float(s.alpha(start)), float(s.sigma(start)) ** 2
    for i in range(0, 2 * n, 2):

        def rate(k: int, m: float, v: float, i: int = i) -> tuple[float, float]:
            return f[i + k] * m, 2 * f[i + k] * v + g2[i + k]

        a = rate(0, m, v)
        b = rate(1, m + h / 2 * a[0], v + h / 2 * a[1])
        c = rate(1, m + h / 2 * b[0], v + h / 2 * b[1])
        d = rate(2, m + h * c[0], v + h * c[1])
        m += h / 6 * (a[0] + 2 * b[0] + 2 * c[0] + d[0])
        v += h / 6 * (a[1] + 2 * b[1] + 2 * c[1] + d[1])
    return m, v


@pytest.mark.parametrize("name", PATHS)
def test_the_sde_generates_the_path(name):
    s = PATHS[name]
    whole = name in (
        "vp",
        "vp constant",
        "sub_vp",
        "linear_log_snr",
        "ve",
        "ve_exponential",
        "ve_exponential 25",
        "edm",
    )
    ends = (s.data_end, s.noise_end) if whole else (float(inner(s)[0]), float(inner(s)[-1]))
    m, v = moments(s, *ends)
    tolerance = 1e-6 if name.startswith("laplace") else 1e-8  # a kink at t = 1/2
    assert m == pytest.approx(float(s.alpha(ends[1])), rel=tolerance)
    assert v == pytest.approx(float(s.sigma(ends[1])) ** 2, rel=tolerance)
    t = inner(s)
    close(s.diffusion(t), s.diffusion_squared(t).sqrt())
    # The same two numbers from their definitions, which cancel near the ends.
    f = s.direction * s.alpha_dot(t) / s.alpha(t)
    close(s.drift(t), f, rtol=1e-10, atol=1e-15)
    close(s.diffusion_squared(t), s.direction * 2 * s.sigma(t) * s.sigma_dot(t) - 2 * f * s.sigma(t) ** 2, rtol=1e-8)
    close(s.diffusion_squared(t), -s.direction * s.sigma(t) ** 2 * s.log_snr_dot(t), rtol=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_the_velocity_is_the_probability_flow(name):
    """dx/dt = direction (f x - g^2/2 score) is the velocity: the sign convention, for both directions of time."""
    s, t = PATHS[name], inner(PATHS[name])
    x0, eps = 0.7, -1.3
    u, v = predictions.target_coefficients(s, "velocity", t)
    x = s.alpha(t) * x0 + s.sigma(t) * eps
    score = -eps / s.sigma(t)
    close(s.direction * (s.drift(t) * x - 0.5 * s.diffusion_squared(t) * score), u * x0 + v * eps, rtol=1e-8, atol=1e-9)


def test_lecture_003s_conditional_field():
    """u(x|z) = (alpha' - beta'/beta alpha) z + beta'/beta x, with lecture 003's path and any other."""
    for s in (PATHS["flow"], PATHS["path cubic"], PATHS["flow sigma_min"]):
        t = inner(s)
        z, x = 0.4, 1.7
        eps = (x - s.alpha(t) * z) / s.sigma(t)
        field = (s.alpha_dot(t) - s.sigma_dot(t) / s.sigma(t) * s.alpha(t)) * z + s.sigma_dot(t) / s.sigma(t) * x
        close(s.alpha_dot(t) * z + s.sigma_dot(t) * eps, field, rtol=1e-10, atol=1e-12)


def test_ends_are_exact_and_nothing_is_nan():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    values = {
        "vp": ([1, 0.0065713], [0, 0.9999784], [-0.05, -10.0], [0.1, 20.0]),
        "sub_vp": ([1, 0.0065713], [0, 0.9999568], [-0.05, -10.0], [0.0, 20.0]),
        "cosine_vp": ([1, 0], [0, 1], [0, -math.inf], [0, math.inf]),
        "ve": ([1, 1], [0.01, 50], [0, 0], [0.0017034, 42585.97]),
        "ve_exponential": ([1, 1], [0, 1.7873], [0, 0], [1, 7.389056]),
        "flow": ([0, 1], [1, 0], [-math.inf, -1], [math.inf, 0]),
        "path cubic": ([0, 1], [1, 0], [-math.inf, -3], [math.inf, 0]),
        "path to noise": ([1, 0], [0, 1], [0, -math.inf], [0, math.inf]),
    }
    for name, (alpha, sigma, f, g2) in values.items():
        s = PATHS[name]
        close(s.alpha(ends), alpha, rtol=1e-4, atol=1e-15)
        close(s.sigma(ends), sigma, rtol=1e-4, atol=1e-15)
        if name != "path to noise":  # torch.cos(pi/2) is 6e-17
            close(s.drift(ends), f, rtol=1e-4)
            close(s.diffusion_squared(ends), g2, rtol=1e-4, atol=1e-15)
            assert not s.log_snr_dot(ends).isnan().any(), name
        assert not s.log_snr(ends).isnan().any(), name
    assert math.isinf(float(PATHS["vp"].sigma_dot(0)))
    assert float(PATHS["sub_vp"].sigma_dot(0)) == pytest.approx(0.1)


def test_directions_ranges_and_priors():
    assert {name: s.direction for name, s in PATHS.items() if s.direction < 0} == dict.fromkeys(
        ["flow", "flow sigma_min", "path cubic", "path vp", "path given slopes"], -1.0
    )
    assert PATHS["vp"].time_range == (1e-3, 1.0)
    assert PATHS["ve"].time_range == (1e-5, 1.0)
    assert PATHS["flow"].time_range == (0.0, 1.0)
    assert PATHS["path vp"].time_range == (0.0, 0.999)
    assert PATHS["edm"].time_range == (0.002, 80.0)
    assert schedules.linear(10).time_range == (0.0, 9.0)
    priors = {"vp": 1.0, "sub_vp": 1.0, "ve": 50.0, "edm": 80.0, "flow": 1.0, "cosine_vp": 1.0}
    assert {name: PATHS[name].prior_std for name in priors} == priors
    assert schedules.linear().prior_std == 1.0
    x = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    want = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 50.0).log_prob(x.double()).sum((1, 2))
    close(PATHS["ve"].prior_log_density(x), want)


# ------------------------------------------------------------------------------------------------ identities


def test_the_vp_sde_is_the_limit_of_the_discrete_schedule():
    """linear(N, 0.1/N, 20/N) tends to the VP SDE as 1/N, and discretise(vp()) is the SDE at the times of the table."""
    worst = []
    for n in (1000, 10_000):
        table = schedules.linear(n, 0.1 / n, 20 / n)
        t = torch.arange(n)
        worst.append(float((table.alpha(t) - PATHS["vp"].alpha((t + 1).double() / n)).abs().max()))
        # Its drift in steps is the SDE's, where both read the same beta.
        close(n * table.drift(t), PATHS["vp"].drift(t.double() / (n - 1)), rtol=1e-9)
        close(n * table.diffusion_squared(t), PATHS["vp"].beta(t.double() / (n - 1)), rtol=1e-9)
    assert worst[0] < 3e-3
    assert worst[1] == pytest.approx(worst[0] / 10, rel=0.05)
    table = schedules.discretise(PATHS["vp"], 1000)
    close(table.alpha(torch.arange(1000)), PATHS["vp"].alpha((torch.arange(1000) + 1).double() / 1000), rtol=1e-12)
    assert float(schedules.discretise(PATHS["flow"], 10).alphas_cumprod[-1]) == 0
    close(schedules.discretise(PATHS["flow"], 10).snr(4), PATHS["flow"].snr(0.5))


def test_the_cosine_table_is_the_continuous_cosine_but_for_its_bound_on_beta():
    table = schedules.discretise(schedules.cosine_vp(0.008), 1000)
    close(table.alphas_cumprod[:-1], schedules.cosine().alphas_cumprod[:-1], rtol=1e-9)
    assert float(table.betas[-1]) == 1.0
    assert float(schedules.cosine().betas[-1]) == pytest.approx(0.999)


def test_vp_discretisation_of_score_sde():
    """Song et al.'s discrete betas of the VP SDE, linspace(0.1/N, 20/N, N), are the DDPM table for N = 1000."""
    close(schedules.linear(1000, 0.1 / 1000, 20 / 1000).alphas_cumprod, schedules.linear().alphas_cumprod, rtol=1e-10)


def test_rectified_flow_is_the_ot_path_without_sigma_min_and_a_user_path():
    t = inner(PATHS["flow"])
    assert schedules.rectified_flow() == schedules.flow(0.0)
    own = schedules.path(lambda t: t, lambda t: 1 - t)
    for method in ("alpha", "sigma", "alpha_dot", "sigma_dot", "log_snr", "drift", "diffusion", "log_snr_dot"):
        close(getattr(own, method)(t), getattr(PATHS["flow"], method)(t))
    limit = schedules.flow(1e-9)
    close(limit.diffusion(t), PATHS["flow"].diffusion(t), rtol=1e-7)


def test_time_reversed_and_numbers_as_functions():
    forward = schedules.path(lambda t: 1.0, lambda t: 0.01 * 5000**t)
    assert (forward.data_end, forward.noise_end) == (0.0, 1.0)
    t = inner(forward)
    close(forward.diffusion(t), PATHS["ve"].diffusion(t))
    close(forward.alpha_dot(t), torch.zeros(len(t)))


def test_a_path_without_a_monotone_ratio_has_a_velocity_but_no_sde():
    bridge = schedules.path(lambda t: t, lambda t: 0.1 + (t * (1 - t)).clamp(min=0) ** 2)
    close(bridge.alpha_dot(0.3), 1.0)
    turning = schedules.path(lambda t: 0.5 + t * 0, lambda t: 1 + 0.2 * torch.sin(7 * t))
    close(turning.sigma_dot(0.3), 1.4 * math.cos(2.1))
    with pytest.raises(
        ValueError, match=r"diffusion needs a path whose log_snr falls from data to noise, got log_snr\("
    ):
        turning.diffusion(0.3)
    with pytest.raises(ValueError, match=r"time_of_log_snr needs a path whose log_snr falls from data to noise"):
        turning.time_of_log_snr(-1.0)


def test_schedules_are_values():
    for name, s in PATHS.items():
        assert {s: name}[s] == name
        with pytest.raises(AttributeError):
            s.name = "other"
    assert schedules.vp() == schedules.vp(0.1, 20.0) != schedules.vp(0.1, 19.0)
    assert {s().name for s in schedules.SCHEDULES.values()} == {*schedules.SCHEDULES}

"""Every conversion between predictions, on every schedule."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.oracles import Gaussian

from diffkern import schedules
from diffkern.schedules import predictions

SCHEDULES = {
    "linear": (schedules.linear(), [0, 1, 250, 998, 999]),
    "scaled_linear": (schedules.scaled_linear(), [0, 500, 999]),
    "cosine": (schedules.cosine(), [0, 500, 990]),
    "cosine_arc": (schedules.cosine_arc(), [2, 500, 990]),
    "flow": (schedules.flow(), [0.01, 0.3, 0.97]),
    "flow_sigma_min": (schedules.flow(0.05), [0.01, 0.3, 1.0]),
    "edm": (schedules.edm(), [0.002, 0.5, 80.0]),
}


def predictions_of(name: str) -> list[str]:
    kept = ["eps", "x0", "v", "score", "velocity"]
    if name.startswith("edm"):
        kept.append("edm")
    elif not name.startswith("flow"):
        kept.append("mu")
    return kept


PAIRS = [
    (name, source, target) for name in SCHEDULES for source, target in itertools.product(predictions_of(name), repeat=2)
]


@pytest.mark.parametrize(("name", "source", "target"), PAIRS)
def test_conversions_give_the_exact_prediction_and_back(name, source, target):
    """Each side from its own definition on Gaussian data (see oracles), then there and back again."""
    schedule, times = SCHEDULES[name]
    data = Gaussian(0.3, 0.5)
    for t in times:
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        x = alpha * 0.3 + (alpha**2 * 0.25 + sigma**2) ** 0.5 * torch.tensor(
            [[-1.3, 0.0], [0.4, 2.0]], dtype=torch.float64
        )
        m = data.predict(schedule, source, x, t)
        want = data.predict(schedule, target, x, t)
        got = predictions.convert(m, x, t, schedule, source, target)
        # The condition of the 2x2 system, at worst about 1/sigma or 1/alpha of the table's ends, scales the rounding.
        scale = 1 + float(want.abs().max()) + float(x.abs().max()) * (1 / sigma + 1 / max(alpha, 1e-3))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 * scale)
        back = predictions.convert(got, x, t, schedule, target, source)
        scale = 1 + float(m.abs().max()) * (1 / sigma + 1 / max(alpha, 1e-3)) ** 2
        torch.testing.assert_close(back, m, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("name", SCHEDULES)
def test_target_is_recovered_from_x0_and_eps(name):
    schedule, times = SCHEDULES[name]
    x0, eps = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.1, dtype=torch.float64)
    for prediction, t in itertools.product(predictions_of(name), times):
        s, n, u, v = schedule.coefficients(prediction, t)
        x, m = s * x0 + n * eps, u * x0 + v * eps
        p, q, P, Q = predictions.to_x0_eps(schedule, prediction, t)
        assert float(p * x + q * m) == pytest.approx(0.7, rel=1e-6, abs=1e-6)
        assert float(P * x + Q * m) == pytest.approx(-1.1, rel=1e-6, abs=1e-6)


def test_coefficients_by_hand():
    s = schedules.from_alphas_cumprod([0.64, 0.36])
    flow, edm = schedules.flow(0.1), schedules.edm()
    for schedule, prediction, t, want in (
        (s, "eps", 1, (0, 1)),
        (s, "x0", 1, (1, 0)),
        (s, "v", 1, (-0.8, 0.6)),
        (s, "score", 1, (0, -1.25)),
        (flow, "velocity", 0.3, (1, -0.9)),
        (edm, "velocity", 2.0, (0, 1)),
    ):
        u, v = predictions.target_coefficients(schedule, prediction, t)
        assert (float(u), float(v)) == pytest.approx(want)
    p, q, P, Q = predictions.to_x0_eps(s, "v", 1)  # x0 = alpha x - sigma v, eps = sigma x + alpha v
    assert (float(p), float(q), float(P), float(Q)) == pytest.approx((0.6, -0.8, 0.8, 0.6))


def test_the_flow_velocity_is_that_of_the_lecture():
    """(x1 - (1 - sigma_min) x) / (1 - (1 - sigma_min) t) on the path x = t x1 + (1 - (1 - sigma_min) t) x_noise."""
    s, t, x1, noise = schedules.flow(0.1), 0.4, 1.7, -0.6
    x = t * x1 + (1 - 0.9 * t) * noise
    velocity = (x1 - 0.9 * x) / (1 - 0.9 * t)
    assert velocity == pytest.approx(x1 - 0.9 * noise)
    u, v = predictions.target_coefficients(s, "velocity", t)
    assert float(u * x1 + v * noise) == pytest.approx(velocity)


def test_the_velocity_of_a_table_is_its_probability_flow():
    """dx/dt = -beta/2 (x + score) (lecture 001)."""
    s, t = schedules.linear(), 300
    x, score = torch.tensor([0.7], dtype=torch.float64), torch.tensor([-0.9], dtype=torch.float64)
    got = predictions.convert(score, x, t, s, "score", "velocity")
    torch.testing.assert_close(got, -0.5 * s.betas[t] * (x + score), rtol=1e-12, atol=0)


def test_one_time_a_sample():
    s = schedules.cosine()
    generator = torch.Generator().manual_seed(1)
    m, x = torch.randn(2, 3, 2, 4, 5, generator=generator, dtype=torch.float64)
    t = torch.tensor([3, 900, 40])
    got = predictions.convert(m, x, t, s, "eps", "v")
    for b in range(3):
        assert torch.equal(got[b], predictions.convert(m[b], x[b], int(t[b]), s, "eps", "v"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_of_the_result_and_arithmetic_in_float32(dtype):
    s = schedules.linear()
    generator = torch.Generator().manual_seed(1)
    m, x = torch.randn(2, 4, 8, generator=generator).to(dtype)
    got = predictions.convert(m, x, 300, s, "v", "x0")
    assert got.dtype == dtype
    exact = predictions.convert(m.double(), x.double(), 300, s, "v", "x0")
    torch.testing.assert_close(got.double(), exact, rtol=1.01 * torch.finfo(dtype).eps, atol=2e-7)
    assert predictions.convert(m, x, 300, s, "v", "v") is m


def test_posterior_mean_and_variance():
    s = schedules.linear()
    generator = torch.Generator().manual_seed(1)
    x0, x = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor([5, 700])
    mean, variance = predictions.posterior(x0, x, t, s)
    beta, abar, before = s.betas[t], s.abar(t), s.abar(t - 1)
    want = (before.sqrt() * beta / (1 - abar))[:, None] * x0
    want = want + ((1 - beta).sqrt() * (1 - before) / (1 - abar))[:, None] * x
    torch.testing.assert_close(mean, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(variance, (1 - before) / (1 - abar) * beta, rtol=1e-10, atol=0)
    # In eps (lecture 001): (x - beta/sqrt(1-abar) eps)/sqrt(alpha), and the prediction "mu" is this mean.
    eps = predictions.convert(x0, x, t, s, "x0", "eps")
    in_eps = (x - (beta / (1 - abar).sqrt())[:, None] * eps) / (1 - beta).sqrt()[:, None]
    torch.testing.assert_close(mean, in_eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(predictions.convert(eps, x, t, s, "eps", "mu"), mean, rtol=1e-9, atol=1e-9)
    mean, _ = predictions.posterior(x0, x, 700, s, -1)
    torch.testing.assert_close(mean, x0)


def test_eps_and_score_convert_even_where_x0_is_unknown():
    flow = schedules.flow()
    m = torch.tensor([0.5, -1.0])
    torch.testing.assert_close(predictions.convert(m, m, 0.0, flow, "eps", "score"), -m)
    torch.testing.assert_close(predictions.convert(m, m, 0.0, flow, "score", "eps"), -m)


X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: predictions.to_x0_eps(schedules.flow(), "eps", 0.0),
            r"'eps' does not determine x0 and eps where .* is 0: flow, t=0\.0",
        ),
        (
            lambda: predictions.to_x0_eps(schedules.linear(), "x0", -1),
            r"'x0' does not determine x0 and eps where .* linear, t=-1",
        ),
        (
            lambda: predictions.to_x0_eps(schedules.from_alphas_cumprod([0.5, 0.0]), "eps", torch.tensor([0, 1])),
            r": from_alphas_cumprod, t=1; take a prediction that does, or times without this one",
        ),
        (lambda: predictions.convert(X, X, 0.0, schedules.flow(), "eps", "v"), r"'eps' does not determine x0 and eps"),
        (
            lambda: predictions.target_coefficients(schedules.edm(), "score", 0.0),
            r"'score' is -eps/sigma and has no value where sigma is 0: edm, t=0\.0",
        ),
        (
            lambda: predictions.convert(X, X, 3, schedules.linear(), "eps", "noise"),
            r"prediction must be one of eps, x0, v, score, velocity, mu, edm, got 'noise'",
        ),
        (
            lambda: predictions.convert(X, X, 3, schedules.linear(), "flow", "eps"),
            r"prediction must be one of .*, got 'flow'",
        ),
        (
            lambda: predictions.convert(X, X[:2], 3, schedules.linear(), "eps", "v"),
            r"m and x must have one shape, got \(3, 2\) and \(2, 2\)",
        ),
        (
            lambda: predictions.convert(X, X, torch.tensor([1, 2]), schedules.linear(), "eps", "v"),
            r"t must be a number or one time a sample, shape \[3\], got shape \[2\]",
        ),
        (
            lambda: predictions.convert(X, X, 1000, schedules.linear(), "eps", "v"),
            r"t must be an integer in -1\.\.999 \(T = 1000\), got 1000",
        ),
        (lambda: predictions.posterior(X, X[:1], 3, schedules.linear()), r"x0 and x must have one shape"),
    ],
)
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()

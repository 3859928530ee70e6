"""The processes of the schedules: forward and reverse SDE, probability flow, Langevin, the extension of a flow."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.oracles import Gaussian
from helpers.simulate_cases import DATA, N, mixture_score, seeds, slope, spaced
from helpers.suites import few

from diffkern import ops, schedules
from diffkern.simulate import (
    EulerMaruyamaSimulator,
    ExtendedSDE,
    ForwardSDE,
    HeunSimulator,
    LangevinSDE,
    ProbabilityFlowODE,
    ReverseSDE,
    VectorField,
    from_model,
)

MEAN = sum(w * m for w, m in zip(DATA.weights, DATA.means, strict=True))
VARIANCE = sum(w * (m**2 + s**2) for w, m, s in zip(DATA.weights, DATA.means, DATA.stds, strict=True)) - MEAN**2


# ------------------------------------------------------------------------------------------ processes of the schedules


FORWARD = ("vp", "sub_vp", "ve", "ve_exponential", "cosine_vp", "linear", "flow", "edm")


@pytest.mark.parametrize("name", few(FORWARD, "vp", "linear", "flow"))
def test_the_forward_sde_has_the_moments_of_the_path(name):
    """By impulses, exact: mean alpha x0 and variance sigma^2 from a start at (alpha, sigma) of the data side."""
    schedule = schedules.SCHEDULES[name]()
    process, n = ForwardSDE(schedule), 1500
    if name == "linear":
        ts = torch.arange(0, 1000, dtype=torch.float64)
    elif name == "edm":
        ts = spaced(math.log(0.01), math.log(80.0), n).exp()
    else:
        margin = 0.05 * (schedule.noise_end - schedule.data_end)
        ts = spaced(schedule.data_end + schedule.direction * schedule.time_eps, schedule.noise_end - margin, n)
    a0, a1 = schedule.alpha(ts[[0, -1]])
    s0, s1 = schedule.sigma(ts[[0, -1]])
    mean, variance = torch.tensor([1.0]).double(), float(s0**2)
    for t, after in itertools.pairwise(ts):
        h = float(after - t)
        factor = 1.0 + h * float(process.drift_coefficient(torch.ones(1).double(), t))
        variance = factor**2 * variance + abs(h) * float(process.diffusion_coefficient(mean, t)) ** 2
        mean = EulerMaruyamaSimulator(process, noise=torch.zeros(1, 1)).step(mean, t, h)
    assert float(mean) == pytest.approx(float(a1 / a0), rel=0.03, abs=2e-3)
    # Noise of variance s0^2 at the start shrinks by (a1/a0)^2; with what the steps add it is s1^2.
    assert variance == pytest.approx(float(s1**2), rel=0.02)


def test_the_discrete_table_walks_like_its_chain():
    """A step of 1 from t is x - beta_t/2 x + sqrt(beta_t) z: the chain's, to first order in beta."""
    schedule = schedules.linear()
    x, z = torch.randn(3, 2).double(), torch.randn(1, 3, 2).double()
    out = EulerMaruyamaSimulator(ForwardSDE(schedule), noise=z).step(x, 400, 1)
    beta = schedule.betas[400]
    torch.testing.assert_close(out, (1 - beta / 2) * x + beta.sqrt() * z[0])


@pytest.mark.parametrize("name", few(["vp", "sub_vp", "ve", "cosine_vp", "flow"], "vp", "flow"))
def test_probability_flow_of_gaussian_data_is_its_exact_map(name):
    schedule, data = schedules.SCHEDULES[name](), Gaussian(0.4, 0.6)
    low, high = schedule.time_range
    margin = 0.02 * (high - low)
    start, end = (high - margin, low + margin) if schedule.direction > 0 else (low + margin, high - margin)
    ode = ProbabilityFlowODE(schedule, lambda x, t: data.predict(schedule, "score", x, t))
    x = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    rates = [(float(schedule.alpha(t)), float(schedule.sigma(t))) for t in (start, end)]
    want = data.ode(x, *rates)
    steps = [100, 200, 400]
    errors = [float((HeunSimulator(ode).simulate(x, spaced(start, end, n)) - want).abs().max()) for n in steps]
    assert errors[-1] < 5e-3
    assert slope(steps, errors) > 1.8
    # The same ODE is the velocity of the path, and of any other prediction.
    for prediction in ("eps", "x0", "v", "velocity"):
        model = from_model(lambda x, t, p=prediction: data.predict(schedule, p, x, t), schedule, prediction, "velocity")
        t = torch.tensor(0.5 * (start + end), dtype=torch.float64)
        torch.testing.assert_close(model(x, t), ode.drift_coefficient(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", few(["vp", "sub_vp", "flow"], "vp", "flow"))
@pytest.mark.parametrize("churn", few([None, 0.5], "0.5"))
def test_reverse_sde_of_a_mixture_gives_its_moments(name, churn):
    """4.5 standard errors of the mean and the variance of 4000 samples, and what 150 steps of order 1 leave."""
    schedule = schedules.SCHEDULES[name]()
    score = mixture_score(schedule)
    low, high = (0.001, 1.0) if schedule.direction > 0 else (0.02, 0.999)
    ends = (high, low) if schedule.direction > 0 else (low, high)
    x = DATA.sample((N,), torch.Generator().manual_seed(0))
    first = torch.tensor(ends[0], dtype=torch.float64)
    x = schedule.alpha(first) * x + schedule.sigma(first) * ops.randn((N, 1), seeds(), dtype=torch.float64)[:, 0]
    ts = spaced(*ends, 150)
    out = EulerMaruyamaSimulator(ReverseSDE(schedule, score, churn), seeds=seeds()).simulate(x, ts)
    fourth = float((out - out.mean()).pow(4).mean())
    assert float(out.mean()) == pytest.approx(MEAN, abs=4.5 * math.sqrt(VARIANCE / N) + 0.01)
    assert float(out.var()) == pytest.approx(VARIANCE, abs=4.5 * math.sqrt((fourth - VARIANCE**2) / N) + 0.02)
    # More than moments: the mixture's own distribution function at three points.
    for at in (-1.0, -0.3, 0.8):
        cdf = sum(
            w * 0.5 * math.erfc((m - at) / (s * 2**0.5))
            for w, m, s in zip(DATA.weights, DATA.means, DATA.stds, strict=True)
        )
        assert float((out < at).double().mean()) == pytest.approx(cdf, abs=4.5 * 0.5 / math.sqrt(N) + 0.01)


def test_ode_plus_langevin_is_the_reverse_sde():
    """-beta/2 (x + s) dt - beta/2 s dt + sqrt(beta) dw = [f x - g^2 s] dt + g dw (lecture 001, which drops the dw)."""
    for name in ("vp", "sub_vp", "ve", "flow"):
        schedule = schedules.SCHEDULES[name]()
        score, x, t = mixture_score(schedule), torch.randn(5, 2).double(), torch.tensor([0.2, 0.3, 0.5, 0.7, 0.9])
        t = t.double()
        g = schedule.diffusion(t)[:, None]
        reverse, ode = ReverseSDE(schedule, score), ProbabilityFlowODE(schedule, score)
        langevin = LangevinSDE(lambda x, s=score, t=t: s(x, t), sigma=schedule.diffusion)
        whole = schedule.direction * (schedule.drift(t)[:, None] * x - g**2 * score(x, t))
        torch.testing.assert_close(reverse.drift_coefficient(x, t), whole, rtol=1e-12, atol=1e-12)
        # Langevin dynamics run forward in their own time, against the sign of the reverse SDE's dt.
        split = ode.drift_coefficient(x, t) - schedule.direction * langevin.drift_coefficient(x, t)
        torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)
        assert torch.equal(reverse.diffusion_coefficient(x, t), langevin.diffusion_coefficient(x, t))
        # No churn: the ODE itself.
        still = ReverseSDE(schedule, score, churn=0.0)
        assert torch.equal(still.drift_coefficient(x, t), ode.drift_coefficient(x, t))
        assert float(still.diffusion_coefficient(x, t)) == 0.0


def test_langevin_has_the_density_of_its_score():
    """Stationary variance v/(1 - h sigma^2/(4 v)) for N(0, v), exactly; and the mixture's moments."""
    v, h = 0.6, 0.2
    for sigma in (1.0, math.sqrt(2.0)):
        simulator = EulerMaruyamaSimulator(LangevinSDE(lambda x: -x / v, sigma), noise=[torch.ones(1).double()])
        zero, one = (float(simulator.step(torch.tensor([x]).double(), 0.0, h)) for x in (0.0, 1.0))
        assert zero**2 / (1 - (one - zero) ** 2) == pytest.approx(v / (1 - h * sigma**2 / (4 * v)), rel=1e-12)
    vp, at = schedules.vp(), torch.tensor(0.15, dtype=torch.float64)
    score = mixture_score(vp)
    alpha, sigma = float(vp.alpha(at)), float(vp.sigma(at))
    start = torch.zeros(N, dtype=torch.float64)
    out = EulerMaruyamaSimulator(LangevinSDE(score, at=0.15), seeds=seeds()).simulate(start, spaced(0, 6, 150))
    assert float(out.mean()) == pytest.approx(alpha * MEAN, abs=0.05)
    assert float(out.var()) == pytest.approx(alpha**2 * VARIANCE + sigma**2, abs=0.06)


def test_the_extension_of_a_flow_keeps_its_marginals():
    """Lecture 003: u + sigma_t^2/2 s with any sigma_t; here with noise at 0 and data at 1 and a sigma that changes."""
    flow, data = schedules.flow(), Gaussian(0.5, 0.4)
    velocity = VectorField(lambda x, t: data.predict(flow, "velocity", x, t))

    def score(x, t):
        return data.predict(flow, "score", x, t)

    process = ExtendedSDE(velocity, score, lambda t: 1.2 * (1 - t))
    x, variance = torch.zeros(1).double(), 1.0  # affine in x and z: moments by recursion
    for k in range(2000):
        t, h = k / 2000, 1 / 2000
        ends = process.drift_coefficient(torch.tensor([0.0, 1.0]).double(), torch.tensor(t).double())
        variance *= (1 + h * float(ends[1] - ends[0])) ** 2
        variance += h * float(process.diffusion_coefficient(x, torch.tensor(t).double())) ** 2
        x = x + h * process.drift_coefficient(x, torch.tensor(t).double())
    assert float(x) == pytest.approx(0.5, abs=2e-3)
    assert variance == pytest.approx(0.16, abs=2e-3)

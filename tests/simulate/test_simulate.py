"""Simulators and processes against closed forms: orders of convergence, moments, reverse processes, Langevin."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.oracles import Gaussian, Mixture
from helpers.suites import few
from torch import Tensor

import diffkern
from diffkern import ops, schedules, streams
from diffkern.simulate import (
    ODE,
    SDE,
    BrownianMotion,
    EulerMaruyamaSimulator,
    EulerSimulator,
    ExtendedSDE,
    ForwardSDE,
    HeunSimulator,
    LangevinSDE,
    OrnsteinUhlenbeck,
    ProbabilityFlowODE,
    ReverseSDE,
    Simulator,
    VectorField,
    from_model,
)

DATA = Mixture()
MEAN = sum(w * m for w, m in zip(DATA.weights, DATA.means, strict=True))
VARIANCE = sum(w * (m**2 + s**2) for w, m, s in zip(DATA.weights, DATA.means, DATA.stds, strict=True)) - MEAN**2
N = 4_000


def mixture_score(schedule: schedules.Schedule):
    return lambda x, t: DATA.predict(schedule, "score", x, t).to(x.dtype)


def spaced(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n + 1, dtype=torch.float64)


def slope(steps: list[int], errors: list[float]) -> float:
    """Observed order: - d ln error/d ln steps by least squares."""
    x, y = torch.tensor(steps).double().log(), torch.tensor(errors).double().log()
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def seeds(n: int = N) -> Tensor:
    return ops.seeds(7, n)


# ------------------------------------------------------------------------------------------------ orders of convergence


@pytest.mark.parametrize(("simulator", "order"), [(EulerSimulator, 1), (HeunSimulator, 2)])
def test_order_of_the_ode_simulators(simulator, order):
    """dx/dt = -theta x, whose flow is x0 exp(-theta t) (lecture 003), and a field that depends on the time."""
    x0 = torch.tensor([1.0, -2.0], dtype=torch.float64)
    steps = [64, 128, 256, 512]
    for field, exact in (
        (lambda x, t: -1.5 * x, x0 * math.exp(-1.5)),
        (lambda x, t: x * torch.cos(3 * t), x0 * math.exp(math.sin(3.0) / 3)),
    ):
        errors = [
            float((simulator(VectorField(field)).simulate(x0, spaced(0, 1, n)) - exact).abs().max()) for n in steps
        ]
        assert slope(steps, errors) == pytest.approx(order, abs=0.2)


def test_heun_of_a_field_that_does_not_change_is_euler():
    field, x = VectorField(lambda x, t: torch.full_like(x, 0.7)), torch.randn(3, 2, dtype=torch.float64)
    left, right = (s(field).simulate(x, spaced(0, 1, 5)) for s in (EulerSimulator, HeunSimulator))
    torch.testing.assert_close(left, right, rtol=1e-14, atol=1e-14)


def test_strong_and_weak_order_of_euler_maruyama_on_ornstein_uhlenbeck():
    """Additive noise: strong order 1. Against a path on a fine grid whose increments the coarse ones sum.

    The weak order from the exact moments of the Euler-Maruyama recursion, which the simulator must have.
    """
    process, paths, fine = OrnsteinUhlenbeck(1.5, 0.8, 0.3), 500, 1024
    dw = torch.randn(fine, paths, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / fine**0.5
    x0 = torch.full((paths, 1), 2.0, dtype=torch.float64)
    # The exact solution from the same Brownian path, the stochastic integral by its midpoint sums.
    left = (torch.arange(fine, dtype=torch.float64) + 0.5) / fine
    decay = torch.exp(-1.5 * (1 - left))[:, None, None]
    exact = 0.3 + math.exp(-1.5) * (x0 - 0.3) + 0.8 * (decay * dw).sum(0)
    steps, errors = [8, 16, 32, 64], []
    for n in steps:
        noise = dw.reshape(n, fine // n, paths, 1).sum(1) * n**0.5
        out = EulerMaruyamaSimulator(process, noise=noise).simulate(x0, spaced(0, 1, n))
        errors.append(float((out - exact).abs().mean()))
    assert slope(steps, errors) == pytest.approx(1.0, abs=0.2)


def test_weak_order_and_moments_of_ornstein_uhlenbeck():
    """The simulator is affine in (x, z): its moments are exact by impulses, without a draw."""
    process, steps = OrnsteinUhlenbeck(1.5, 0.8, 0.3), [16, 32, 64, 128]
    mean, std = process.moments(torch.tensor(2.0, dtype=torch.float64), 1.0)
    errors = []
    for n in steps:
        # Row 0: no noise; row 1 + k: a unit impulse in step k.
        noise = torch.cat([torch.zeros(n, 1), torch.eye(n)], 1).double()
        out = EulerMaruyamaSimulator(process, noise=noise).simulate(torch.full((n + 1,), 2.0).double(), spaced(0, 1, n))
        variance = float((out[1:] - out[0]).square().sum())
        errors.append((abs(float(out[0] - mean)), abs(variance - std**2)))
    for error in zip(*errors, strict=True):
        assert slope(steps, list(error)) == pytest.approx(1.0, abs=0.2)


def test_multiplicative_noise_has_strong_order_one_half():
    """Geometric Brownian motion, dx = 0.1 x dt + 0.9 x dw: the diffusion coefficient depends on the state."""

    class Geometric(SDE):
        def drift_coefficient(self, x, t):
            return 0.1 * x

        def diffusion_coefficient(self, x, t):
            return 0.9 * x

    paths, fine = 2000, 1024
    dw = torch.randn(fine, paths, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / fine**0.5
    exact = torch.exp(0.1 - 0.405 + 0.9 * dw.sum(0))
    steps, errors = [8, 16, 32, 64, 128], []
    for n in steps:
        noise = dw.reshape(n, fine // n, paths).sum(1) * n**0.5
        out = EulerMaruyamaSimulator(Geometric(), noise=noise).simulate(torch.ones(paths).double(), spaced(0, 1, n))
        errors.append(float((out - exact).abs().mean()))
    assert slope(steps, errors) == pytest.approx(0.5, abs=0.2)


def test_brownian_motion_is_the_sum_of_its_noise():
    x, n = torch.zeros(4, 2, 3), 10
    out = EulerMaruyamaSimulator(BrownianMotion(2.0), seeds=seeds(4)).simulate(x, spaced(0, 5, n))
    z = sum(ops.randn(x.shape, seeds(4), streams.STEP + k) for k in range(n))
    torch.testing.assert_close(out, 2.0 * math.sqrt(0.5) * z)


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


# ---------------------------------------------------------------------------------------------- states, times and noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 5, 5)])
def test_a_sample_alone_is_the_sample_in_a_batch(dtype, shape):
    """Bit for bit, whatever the shape; with one time a sample as with the same times for all."""
    vp = schedules.vp()
    x, s = ops.randn(shape, ops.seeds(1, 6), dtype=dtype), ops.seeds(2, 6)
    score, ts = mixture_score(vp), spaced(1, 0.01, 8)
    processes = {
        "sde": lambda seeds: EulerMaruyamaSimulator(ReverseSDE(vp, score), seeds=seeds),
        "euler": lambda seeds: EulerSimulator(ProbabilityFlowODE(vp, score)),
        "heun": lambda seeds: HeunSimulator(ProbabilityFlowODE(vp, score)),
    }
    for make in processes.values():
        whole = make(s).simulate(x, ts)
        assert whole.dtype == dtype
        assert whole.shape == x.shape
        for b in (0, 3, 5):
            assert torch.equal(make(s[b : b + 1]).simulate(x[b : b + 1], ts)[0], whole[b])
        assert torch.equal(make(s).simulate(x, ts.expand(6, 9)), whole)
        rows = torch.stack([spaced(1, 0.01 + 0.1 * b, 8) for b in range(6)])
        each = make(s).simulate(x, rows)
        assert torch.equal(make(s[2:3]).simulate(x[2:3], rows[2])[0], each[2])


def test_trajectory_records_the_start_every_kth_step_and_the_end():
    x, ts = torch.randn(2, 3), spaced(0, 1, 7)
    simulator = EulerMaruyamaSimulator(OrnsteinUhlenbeck(), seeds=seeds(2))
    every = simulator.simulate_trajectory(x, ts)
    assert every.shape == (8, 2, 3)
    assert torch.equal(every[0], x)
    assert torch.equal(every[-1], simulator.simulate(x, ts))
    assert torch.equal(every[3], simulator.simulate(x, ts[:4]))
    assert torch.equal(simulator.simulate_trajectory(x, ts, every=3), every[[0, 3, 6, 7]])
    assert torch.equal(simulator.simulate(x, ts[:1]), x)


def test_noise_from_a_generator_and_given():
    """One torch.randn like x a step: the draws of other code with the same generator."""
    x, ts, process = torch.randn(4, 2), spaced(0, 1, 3), OrnsteinUhlenbeck()
    out = EulerMaruyamaSimulator(process, generator=torch.Generator().manual_seed(3)).simulate(x, ts)
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(4, 2, generator=generator) for _ in range(3)]
    assert torch.equal(out, EulerMaruyamaSimulator(process, noise=noise).simulate(x, ts))
    torch.manual_seed(3)
    assert torch.equal(out, EulerMaruyamaSimulator(process).simulate(x, ts))


def test_a_step_is_differentiable_and_a_simulation_records_nothing():
    theta = torch.tensor(0.7, requires_grad=True)
    field = VectorField(lambda x, t: -theta * x)
    out = EulerSimulator(field).step(torch.ones(2), 0.0, 0.1)
    out.sum().backward()
    assert float(theta.grad) == pytest.approx(-0.2)
    assert not EulerSimulator(field).simulate(torch.ones(2), spaced(0, 1, 2)).requires_grad


def test_the_interfaces_are_abstract():
    for interface in (ODE, SDE, Simulator):
        with pytest.raises(TypeError, match="abstract"):
            interface()


VP = schedules.vp()
STATE = torch.zeros(2, 3)
BAD = [
    (lambda: EulerSimulator(BrownianMotion()), "EulerSimulator needs an ODE, got BrownianMotion: an SDE is simulated"),
    (
        lambda: EulerMaruyamaSimulator(VectorField(lambda x, t: x)),
        "EulerMaruyamaSimulator needs an SDE, got VectorField: an ODE is simulated by EulerSimulator",
    ),
    (
        lambda: EulerMaruyamaSimulator(BrownianMotion(), seeds=seeds(2), noise=[STATE]),
        "give one of seeds, noise and generator, got seeds and noise",
    ),
    (lambda: BrownianMotion(-1.0), "sigma must be a finite number >= 0, got -1.0"),
    (lambda: OrnsteinUhlenbeck(theta=0.0), "theta must be positive, got 0.0"),
    (lambda: OrnsteinUhlenbeck(mean=math.inf), "mean must be finite, got inf"),
    (lambda: VectorField(3), r"field must be a function of \(x, t\), got 3"),
    (lambda: ExtendedSDE(BrownianMotion(), lambda x, t: x, 1.0), "ode must be an ODE, got BrownianMotion"),
    (
        lambda: ExtendedSDE(VectorField(lambda x, t: x), lambda x, t: x, 1.0, 0.5),
        "time_direction must be 1 or -1, got 0.5",
    ),
    (
        lambda: EulerMaruyamaSimulator(
            ExtendedSDE(VectorField(lambda x, t: x), lambda x, t: x, lambda t: t - 1), seeds=seeds(2)
        ).step(STATE, 0.25, 0.1),
        "sigma must be >= 0, got -0.75",
    ),
    (
        lambda: EulerMaruyamaSimulator(ForwardSDE(VP), seeds=seeds(2)).simulate(STATE, [0.5, 0.4]),
        "h must be >= 0: time rises in ForwardSDE, got h = -0.1",
    ),
    (
        lambda: EulerMaruyamaSimulator(ReverseSDE(VP, lambda x, t: x), seeds=seeds(2)).simulate(STATE, [0.4, 0.5]),
        "h must be <= 0: time falls in ReverseSDE, got h = 0.1",
    ),
    (
        lambda: EulerMaruyamaSimulator(ForwardSDE(schedules.flow()), seeds=seeds(2)).simulate(STATE, [0.1, 0.0, 0.0]),
        "the drift of flow is not finite at t = 0: keep the times inside its range",
    ),
    (
        lambda: EulerMaruyamaSimulator(BrownianMotion(), seeds=seeds(3)).simulate(STATE, [0, 1]),
        r"seeds must have shape \[2\] \(one a sample\), got \[3\]",
    ),
    (
        lambda: EulerMaruyamaSimulator(BrownianMotion(), noise=[STATE]).simulate(STATE, [0, 1, 2]),
        "noise must hold one tensor a step, got 1 for step 1",
    ),
    (
        lambda: EulerMaruyamaSimulator(BrownianMotion(), noise=[STATE[0]]).simulate(STATE, [0, 1]),
        r"noise must return the shape of x, \[2, 3\], got \[3\]",
    ),
    (
        lambda: EulerSimulator(VectorField(lambda x, t: x)).simulate(STATE.half(), [0, 1]),
        "x must be a float32 or float64 state",
    ),
    (
        lambda: EulerSimulator(VectorField(lambda x, t: x)).simulate(STATE, torch.zeros(3, 4)),
        r"ts must hold at least one time, shape \[N\+1\] or \[2, N\+1\], got shape \[3, 4\]",
    ),
    (lambda: EulerSimulator(VectorField(lambda x, t: x)).simulate(STATE, [0, math.nan]), "ts must be finite, got nan"),
    (
        lambda: EulerSimulator(VectorField(lambda x, t: x)).simulate_trajectory(STATE, [0, 1], every=0),
        "every must be an integer of at least 1, got 0",
    ),
    (
        lambda: EulerSimulator(VectorField(lambda x, t: x)).step(STATE, torch.zeros(3), 0.1),
        r"t must have shape \[\] or \[2\] \(one a sample\), got \[3\]",
    ),
    (
        lambda: EulerSimulator(VectorField(lambda x, t: x[:, 0])).step(STATE, 0.0, 0.1),
        r"field must return the shape of x, \[2, 3\], got \[2\]",
    ),
    (lambda: from_model(lambda x, t: x, VP, "noise"), "prediction must be one of eps"),
    (lambda: from_model(None, VP, "eps"), r"model must be a function of \(x, t\), got None"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_one_sentence(case):
    call, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_network_without_a_gradient_is_an_error_where_one_is_wanted():
    field = from_model(torch.no_grad()(lambda x, t: 0.1 * x), VP, "eps")
    assert field(STATE, torch.tensor(0.5)).shape == STATE.shape
    with pytest.raises(ValueError, match="model must be differentiable in x"):
        field(STATE.clone().requires_grad_(), torch.tensor(0.5))


def test_exported():
    assert diffkern.simulate.EulerSimulator is EulerSimulator

"""Simulators and processes against closed forms: orders of convergence, moments, reverse processes, Langevin."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.simulate_cases import mixture_score, seeds, slope, spaced

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
    OrnsteinUhlenbeck,
    ProbabilityFlowODE,
    ReverseSDE,
    Simulator,
    VectorField,
    from_model,
)

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
        r"seeds must be an integer or int64 \[2\], got torch.int64 of shape \[3\]",
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

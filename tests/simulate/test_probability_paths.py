"""Conditional and marginal probability paths (lecture 003): fields and scores against derivatives and simulations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffkern import ops, schedules, streams
from diffkern.objectives import losses
from diffkern.objectives.flow_matching import log_joint, marginal_prediction
from diffkern.simulate import DataMarginal, EulerMaruyamaSimulator, GaussianPath, HeunSimulator, ReverseSDE, VectorField

NAMES = ("flow", "vp", "sub_vp", "ve", "cosine_vp")
POINTS = torch.tensor([[1.0, 0.5], [-1.0, 0.2], [0.1, -1.2]], dtype=torch.float64)
WEIGHTS = torch.tensor([2.0, 1.0, 1.0])
X = torch.tensor([[0.3, 0.2], [-0.7, 1.0], [0.0, 0.0], [2.0, -1.0]], dtype=torch.float64)
T = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)


def gradient(density, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(density(x).sum(), x)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_conditional_fields_are_the_lectures(name):
    schedule = schedules.SCHEDULES[name]()
    path, z = GaussianPath(schedule), POINTS[[0, 1, 2, 0]]
    alpha, sigma, a_dot, s_dot = (
        getattr(schedule, rate)(T)[:, None] for rate in ("alpha", "sigma", "alpha_dot", "sigma_dot")
    )
    torch.testing.assert_close(path.vector_field(X, z, T), (a_dot - s_dot / sigma * alpha) * z + s_dot / sigma * X)
    torch.testing.assert_close(path.score(X, z, T), -(X - alpha * z) / sigma**2)
    torch.testing.assert_close(path.score(X, z, T), gradient(lambda x: path.log_density(x, z, T), X))
    normal = torch.distributions.Normal(alpha * z, sigma.expand_as(z))
    torch.testing.assert_close(path.log_density(X, z, T), normal.log_prob(X).sum(1))
    assert path.score(X.float(), z.float(), 0.5).dtype == torch.float32


@pytest.mark.parametrize("name", ["flow", "vp"])
def test_the_conditional_ode_carries_eps_along_the_path(name):
    """x_t = alpha_t z + sigma_t eps is its solution."""
    schedule = schedules.SCHEDULES[name]()
    path, z = GaussianPath(schedule), POINTS[[0, 1, 2, 0]]
    t0, t1 = (0.05, 0.95) if name == "flow" else (0.95, 0.05)
    eps = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start, end = (path.sample(z, t, noise=eps) for t in (t0, t1))
    ode = VectorField(lambda x, t: path.vector_field(x, z, t))
    out = HeunSimulator(ode).simulate(start, torch.linspace(t0, t1, 201, dtype=torch.float64))
    torch.testing.assert_close(out, end, rtol=0, atol=2e-3)


def test_samples_come_from_their_address():
    flow, seeds = schedules.flow(), ops.seeds(0, 4)
    path, z = GaussianPath(flow), POINTS[[0, 1, 2, 0]]
    x = path.sample(z, T, seeds=seeds)
    assert torch.equal(x, losses.noised(z, T, flow, seeds=seeds))
    eps = ops.randn(z.shape, seeds, streams.TRAINING, dtype=torch.float64)
    torch.testing.assert_close(x, T[:, None] * z + (1 - T[:, None]) * eps)
    drawn = path.sample(z, 0.5, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, 0.5 * z + 0.5 * noise)


@pytest.mark.parametrize("name", NAMES)
def test_marginal_score_and_field_are_the_derivatives_of_the_density(name):
    """The score by autograd; the field by d ln p/dt = -div u - u.score (lecture 003)."""
    marginal = DataMarginal(schedules.SCHEDULES[name](), POINTS, WEIGHTS)
    torch.testing.assert_close(marginal.score(X, T), gradient(lambda x: marginal.log_density(x, T), X))
    step = 1e-5
    slope = (marginal.log_density(X, T + step) - marginal.log_density(X, T - step)) / (2 * step)
    jacobian = torch.autograd.functional.jacobian(lambda x: marginal.vector_field(x, T).sum(0), X)
    divergence = jacobian[0, :, 0] + jacobian[1, :, 1]
    transport = (marginal.vector_field(X, T) * marginal.score(X, T)).sum(1)
    torch.testing.assert_close(slope, -divergence - transport, rtol=1e-5, atol=1e-5)


def test_the_density_integrates_to_one_and_weights_have_no_scale():
    flow, t = schedules.flow(), 0.7
    marginal = DataMarginal(flow, POINTS[:, :1], WEIGHTS)
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:, None]
    assert float(torch.trapezoid(marginal.log_density(x, t).exp(), x[:, 0])) == pytest.approx(1.0, abs=1e-9)
    scaled = DataMarginal(flow, POINTS[:, :1], 10 * WEIGHTS)
    assert torch.equal(marginal.log_density(x, t), scaled.log_density(x, t))
    joint = log_joint(POINTS[:, :1], x, torch.tensor(t, dtype=torch.float64), flow, WEIGHTS)
    assert torch.equal(torch.logsumexp(joint, 1), marginal.log_density(x, t))


def test_far_from_all_data_the_nearest_point_counts_alone():
    """Every density underflows there; the posterior does not."""
    flow = schedules.flow()
    marginal, far = DataMarginal(flow, POINTS), torch.tensor([[80.0, 40.0]], dtype=torch.float64)
    path = GaussianPath(flow)
    assert float(marginal.log_density(far, 0.99)) < -1e6
    torch.testing.assert_close(marginal.score(far, 0.99), path.score(far, POINTS[:1], 0.99))
    torch.testing.assert_close(marginal.vector_field(far, 0.99), path.vector_field(far, POINTS[:1], 0.99))
    assert torch.equal(
        marginal.vector_field(X, T),
        marginal_prediction(POINTS, X, T, flow, "velocity", torch.ones(3, dtype=torch.float64)),
    )


@pytest.mark.parametrize("kind", ["flow ODE", "reverse SDE"])
def test_the_marginal_processes_end_on_the_data(kind):
    """Each point by its weight, within 4.5 standard errors."""
    n, seeds = 2000, ops.seeds(5, 2000)
    noise = ops.randn((n, 2), seeds, dtype=torch.float64)
    if kind == "flow ODE":
        marginal = DataMarginal(schedules.flow(), POINTS, WEIGHTS)
        ts = torch.linspace(0, 0.995, 100, dtype=torch.float64)
        out = HeunSimulator(VectorField(marginal.vector_field)).simulate(noise, ts)
    else:
        marginal = DataMarginal(schedules.vp(), POINTS, WEIGHTS)
        ts = torch.linspace(1, 1e-3, 200, dtype=torch.float64)
        out = EulerMaruyamaSimulator(ReverseSDE(marginal.schedule, marginal.score), seeds=seeds).simulate(noise, ts)
    gaps = torch.cdist(out, POINTS)
    assert float(gaps.min(1).values.median()) < 0.05
    share = torch.bincount(gaps.argmin(1), minlength=3) / n
    for got, want in zip(share.tolist(), (0.5, 0.25, 0.25), strict=True):
        assert got == pytest.approx(want, abs=4.5 * math.sqrt(want * (1 - want) / n) + 0.01)


def test_draws_follow_the_weights_and_their_address():
    marginal, n = DataMarginal(schedules.flow(), POINTS, WEIGHTS), 4000
    seeds = ops.seeds(1, n)
    z = marginal.draw(n, seeds=seeds)
    for k, want in enumerate((0.5, 0.25, 0.25)):
        got = float((z == POINTS[k]).all(1).double().mean())
        assert got == pytest.approx(want, abs=4.5 * math.sqrt(want * (1 - want) / n))
    assert torch.equal(marginal.draw(5, seeds=seeds[7:12]), z[7:12])
    x = marginal.sample(5, 0.3, seeds=seeds[7:12])
    assert torch.equal(x, marginal.path.sample(z[7:12], 0.3, seeds=seeds[7:12]))
    again = [marginal.sample(5, 0.3, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*again)


FLOW = schedules.flow()
BAD = [
    (
        lambda: GaussianPath(FLOW).score(X, POINTS, 0.5),
        r"x and z must have one shape \[B, ...\], got \[4, 2\] and \[3, 2\]",
    ),
    (lambda: GaussianPath(FLOW).score(X, X, 1.0), "sigma must be positive for a density or a field, got 0.0"),
    (
        lambda: GaussianPath(FLOW).score(X, X, T[:2]),
        r"t must be a number or one time a sample, shape \[4\], got shape \[2\]",
    ),
    (
        lambda: GaussianPath(FLOW).sample(X, 0.5, noise=X, seeds=ops.seeds(0, 4)),
        "give one of seeds, noise and generator, got several",
    ),
    (
        lambda: DataMarginal(FLOW, POINTS[:0]),
        r"data must be floating-point points \[N, ...\], got torch.float64 \[0, 2\]",
    ),
    (lambda: DataMarginal(FLOW, POINTS, torch.tensor([1.0, -1.0, 1.0])), "weights must be 3 numbers >= 0"),
    (lambda: DataMarginal(FLOW, POINTS, torch.zeros(3)), "weights must be 3 numbers >= 0 with a positive sum"),
    (lambda: DataMarginal(FLOW, POINTS).score(X, 1.0), "sigma must be positive for a marginal prediction, got 0.0"),
    (
        lambda: DataMarginal(FLOW, POINTS).draw(4, seeds=ops.seeds(0, 3)),
        r"seeds must be an integer or int64 \[4\], got torch.int64 of shape \[3\]",
    ),
    (
        lambda: DataMarginal(FLOW, POINTS).draw(4, seeds=ops.seeds(0, 4), generator=torch.Generator()),
        "give seeds or generator, not both",
    ),
    (
        lambda: DataMarginal(FLOW, POINTS).score(X[:, :1], 0.5),
        r"must have one sample shape, got \[3, 2\] and \[4, 1\]",
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_one_sentence(case):
    call, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        call()

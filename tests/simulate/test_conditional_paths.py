"""Conditional paths by functions of the data point: fields, scores, densities and the loss, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import diffkern
from diffkern.objectives.flow_matching import flow_matching_loss
from diffkern.simulate import GaussianPath, HeunSimulator, VectorField, conditional_path

SIGMA_MIN = 0.01
Z = torch.tensor(
    [[[0.5, -1.0], [2.0, 0.1]], [[-0.3, 0.7], [1.2, -2.0]], [[0.0, 0.4], [-0.9, 1.5]]], dtype=torch.float64
)
X = torch.tensor(
    [[[0.2, 0.3], [-1.0, 0.5]], [[1.1, -0.4], [0.6, 0.0]], [[-0.7, 2.0], [0.8, -0.2]]], dtype=torch.float64
)
T = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
SEEDS = torch.tensor([3, 4, 5])
TRANSPORT = conditional_path(lambda z, t: t * z, lambda z, t: 1 - (1 - SIGMA_MIN) * t)
CURVED = conditional_path(
    lambda z, t: torch.sin(math.pi / 2 * t) * z, lambda z, t: torch.cos(math.pi / 2 * t), mu_slope=None
)
COSINE = diffkern.path(lambda t: torch.sin(math.pi / 2 * t), lambda t: torch.cos(math.pi / 2 * t))


def own_width(z: Tensor, t: Tensor) -> Tensor:
    """A width for each sample: wider for larger data."""
    size = z.flatten(1).square().mean(1).reshape(-1, 1, 1)
    return 1 - t + 0.1 * t * (1 + size)


def bent(z: Tensor, t: Tensor) -> Tensor:
    """A mean that is no multiple of z: it leaves 0 along tanh(z) and arrives at z."""
    return t * (1 - t) * torch.tanh(z) + t**2 * z


@pytest.mark.parametrize(
    ("path", "schedule"), [(TRANSPORT, diffkern.flow(SIGMA_MIN)), (CURVED, COSINE)], ids=["flow", "cosine"]
)
@pytest.mark.parametrize("t", [T, 0.3], ids=["each", "one"])
def test_the_known_paths_come_out(path, schedule, t):
    known = GaussianPath(schedule)
    for name in ("vector_field", "score", "log_density"):
        got, want = getattr(path, name)(X, Z, t), getattr(known, name)(X, Z, t)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        path.sample(Z, t, seeds=SEEDS),
        known.sample(Z, torch.as_tensor(t, dtype=torch.float64).expand(3), seeds=SEEDS),
        rtol=1e-12,
        atol=0,
    )


def test_lecture_000s_field_of_the_optimal_transport_path():
    """(x1 - (1 - sigma_min) x)/(1 - (1 - sigma_min) t)."""
    t = T.reshape(-1, 1, 1)
    want = (Z - (1 - SIGMA_MIN) * X) / (1 - (1 - SIGMA_MIN) * t)
    torch.testing.assert_close(TRANSPORT.vector_field(X, Z, T), want, rtol=1e-12, atol=1e-12)


def test_mean_and_width_may_depend_on_the_data():
    """The derivatives worked out by hand, and the score as the gradient of the log-density."""
    path, t = conditional_path(bent, own_width), T.reshape(-1, 1, 1)
    size = Z.square().mean((1, 2)).reshape(-1, 1, 1)
    mu_dot = (1 - 2 * t) * torch.tanh(Z) + 2 * t * Z
    sigma, sigma_dot = own_width(Z, t), -1 + 0.1 * (1 + size)
    want = sigma_dot / sigma * (X - bent(Z, t)) + mu_dot
    torch.testing.assert_close(path.vector_field(X, Z, T), want, rtol=1e-12, atol=1e-12)
    x = X.clone().requires_grad_()
    (score,) = torch.autograd.grad(path.log_density(x, Z, T).sum(), x)
    torch.testing.assert_close(path.score(X, Z, T), score, rtol=1e-10, atol=1e-10)
    density = torch.distributions.Normal(bent(Z, t), sigma.expand_as(Z)).log_prob(X).sum((1, 2))
    torch.testing.assert_close(path.log_density(X, Z, T), density, rtol=1e-12, atol=1e-12)


def test_the_flow_of_the_field_is_the_path():
    """phi_t(x) = sigma_t x + mu_t solves dx/dt = u_t: integrated from 0 to 0.8, Heun's error falls as h^2."""
    path, eps = conditional_path(bent, own_width), X
    field = VectorField(lambda x, t: path.vector_field(x, Z, t))
    want = path.mean(Z, 0.8) + path.width(Z, 0.8) * eps
    errors = []
    for n in (40, 80):
        got = HeunSimulator(field).simulate(path.mean(Z, 0.0) + path.width(Z, 0.0) * eps, torch.linspace(0, 0.8, n + 1))
        errors.append(float((got - want).abs().max()))
    assert errors[1] < 1e-4
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_given_slopes_are_used():
    path = conditional_path(bent, own_width, mu_slope=lambda z, t: 7.0 * z, sigma_slope=lambda z, t: -2.0)
    _, _, mu_dot, sigma_dot = path.moments(Z, T)
    assert torch.equal(mu_dot, 7.0 * Z)
    assert torch.equal(sigma_dot, torch.full_like(Z, -2.0))


def test_a_width_may_be_a_number_one_a_sample_or_one_an_element():
    for width, want in (
        (lambda z, t: 0.5, 0.5),
        (lambda z, t: (1 - t).flatten(), (1 - T).reshape(-1, 1, 1)),
        (lambda z, t: 1 - t * z.abs() / 4, 1 - T.reshape(-1, 1, 1) * Z.abs() / 4),
    ):
        path = conditional_path(bent, width)
        assert torch.equal(path.width(Z, T), torch.as_tensor(want, dtype=torch.float64).expand(Z.shape))
        eps = (path.sample(Z, T, noise=X) - bent(Z, T.reshape(-1, 1, 1))) / want
        torch.testing.assert_close(eps, X, rtol=1e-12, atol=1e-12)


def test_the_loss_is_conditional_flow_matching():
    """That of `flow_matching_loss` on the same path, noise and times; drawn by address with the seeds alone."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x + t.reshape(-1, 1, 1)

    schedule = diffkern.flow(SIGMA_MIN)
    for reduction in ("none", "mean", "sum"):
        for z, tolerance in ((Z, 1e-6), (Z.float(), 1e-5)):
            got = TRANSPORT.loss(model, z, T, seeds=SEEDS, reduction=reduction)
            want = flow_matching_loss(model, z, T, schedule, seeds=SEEDS, reduction=reduction)
            torch.testing.assert_close(got, want.to(got.dtype), rtol=tolerance, atol=0)
    drawn = TRANSPORT.loss(model, Z, seeds=SEEDS)
    assert torch.equal(drawn, TRANSPORT.loss(model, Z, seeds=SEEDS))
    assert drawn != TRANSPORT.loss(model, Z, seeds=SEEDS + 1)


def test_the_losses_minimiser_is_the_field():
    """With one data point the field given z is the marginal one: a model that returns it has no error."""
    path = conditional_path(bent, own_width)
    assert path.loss(lambda x, t: path.vector_field(x, Z, t), Z, T, seeds=SEEDS) < 1e-24


def test_a_learned_path_gets_its_gradient():
    """mu = t z + a t (1 - t): at eps = 0 the loss of the model 0 is mean (z + a (1 - 2t))^2."""
    a = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    path = conditional_path(lambda z, t: t * z + a * t * (1 - t), lambda z, t: 1 - t)
    loss = path.loss(lambda x, t: torch.zeros_like(x), Z, T, noise=torch.zeros_like(Z))
    (got,) = torch.autograd.grad(loss, a)
    turn = 1 - 2 * T.reshape(-1, 1, 1)
    torch.testing.assert_close(got, (2 * (Z + 0.4 * turn) * turn).mean())


def test_sixteen_bits_are_worked_on_in_float32():
    z, x = Z.bfloat16(), X.bfloat16()
    got = TRANSPORT.vector_field(x, z, T)
    want = TRANSPORT.vector_field(x.float(), z.float(), T)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conditional_path(0.5, own_width), r"mu must be a function of \(z, t\), got 0\.5"),
        (lambda: conditional_path(bent, own_width, mu_slope=3), r"mu_slope must be a function of \(z, t\), got 3"),
        (
            lambda: conditional_path(lambda z, t: z[:1], own_width).mean(Z, T),
            r"mu must return the shape of z, \[3, 2, 2\], got \[1, 2, 2\]",
        ),
        (
            lambda: conditional_path(bent, lambda z, t: torch.ones(4)).width(Z, T),
            r"sigma must return a number, .* \[3, 2, 2\], got \[4\]",
        ),
        (
            lambda: conditional_path(bent, lambda z, t: 1 - t).score(X, Z, 1.0),
            r"sigma must be positive for a density or a field, got 0",
        ),
        (
            lambda: TRANSPORT.mean(Z, torch.zeros(2)),
            r"t must be a number or one time a sample, shape \[3\], got .*\[2\]",
        ),
        (lambda: TRANSPORT.mean(Z.long(), T), r"z must be floating-point data \[B, \.\.\.\], got torch.int64"),
        (lambda: TRANSPORT.score(X[:2], Z, T), r"x and z must have one shape"),
        (lambda: TRANSPORT.loss(lambda x, t: x, Z, reduction="max"), r"reduction must be one of none, mean, sum"),
        (lambda: TRANSPORT.loss(lambda x, t: x[0], Z), r"model must return the shape of x, \[3, 2, 2\], got \[2, 2\]"),
        (lambda: TRANSPORT.sample(Z, T, noise=X[0]), r"noise must have the shape of z"),
        (lambda: TRANSPORT.sample(Z, T, noise=X, seeds=SEEDS), r"give one of seeds, noise and generator"),
    ],
)
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()

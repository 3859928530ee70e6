"""Processes that a user writes after lecture 003: numbers for coefficients, networks for drifts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from diffkern.simulate import ODE, SDE, EulerMaruyamaSimulator, EulerSimulator, ExtendedSDE, HeunSimulator, VectorField

X = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
TIMES = torch.linspace(0, 1, 5)


class Coloured(SDE):
    """dx = -x dt + g dw with a g of the user's kind."""

    def __init__(self, g) -> None:
        self.g = g

    def drift_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        return -x

    def diffusion_coefficient(self, x: Tensor, t: Tensor):
        return self.g(x, t)


@pytest.mark.parametrize(
    "g",
    [
        lambda x, t: 0.3,
        lambda x, t: torch.tensor(0.3, dtype=torch.float64),
        lambda x, t: x.new_full(x.shape[:1], 0.3),
        lambda x, t: x.new_full((len(x), 1), 0.3),
        lambda x, t: torch.full_like(x, 0.3),
    ],
    ids=["float", "tensor", "one a sample", "column", "one an element"],
)
def test_a_diffusion_coefficient_may_be_a_number(g):
    """x + h (-x) + 0.3 sqrt(h) z, whatever shape the 0.3 has."""
    z = torch.tensor([[0.2, -0.1], [1.0, 0.4]], dtype=torch.float64)
    got = EulerMaruyamaSimulator(Coloured(g), noise=[z]).step(X, 0.0, 0.25)
    torch.testing.assert_close(got, 0.75 * X + 0.3 * 0.5 * z, rtol=1e-15, atol=0)


def test_an_integer_is_a_number():
    z = torch.ones_like(X)
    assert torch.equal(EulerMaruyamaSimulator(Coloured(lambda x, t: 2), noise=[z]).step(X, 0.0, 0.25), 0.75 * X + 1.0)


def test_an_extended_sde_whose_subclass_returns_a_number():
    """dx = (u + sigma^2/2 s) dt + sigma dw with sigma = 0.3 as a float: pull 0.045 s."""

    class Steady(ExtendedSDE):
        def diffusion_coefficient(self, x: Tensor, t: Tensor):
            return 0.3

    sde = Steady(VectorField(lambda x, t: 2 * x), lambda x, t: -x, 1.0)
    torch.testing.assert_close(sde.drift_coefficient(X, torch.tensor(0.0)), 2 * X - 0.045 * X, rtol=1e-15, atol=0)


class Network(ODE):
    """A drift that is a network of (x, t): lecture 003's u_t^theta."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.layer = nn.Linear(3, 2, dtype=dtype)
        self.seen: set[torch.dtype] = set()

    def drift_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.add(t.dtype)
        return self.layer(torch.cat([x, t.expand(len(x))[:, None]], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("simulator", [EulerSimulator, HeunSimulator])
def test_a_network_gets_times_of_its_own_dtype(dtype, simulator):
    """No cast in the user's code, and the result is Euler's by hand."""
    torch.manual_seed(0)
    ode, x = Network(dtype), X.to(dtype)
    got = simulator(ode).simulate(x, TIMES)
    assert ode.seen == {dtype}
    assert got.dtype == dtype
    if simulator is EulerSimulator:
        for t in TIMES[:-1]:
            x = x + 0.25 * ode.layer(torch.cat([x, t.to(dtype).expand(2)[:, None]], 1))
        torch.testing.assert_close(got, x.detach(), rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=0)


def test_fields_and_stochastic_processes_get_it_too():
    seen = set()

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.add(t.dtype)
        return -x

    def rate(t: Tensor) -> Tensor:
        seen.add(t.dtype)
        return 0.1 * t

    sde = ExtendedSDE(VectorField(field), field, rate)
    EulerMaruyamaSimulator(sde, seeds=torch.tensor([1, 2])).simulate(X.float(), TIMES)
    assert seen == {torch.float32}


def test_times_keep_their_precision_between_steps():
    """A thousand float32 steps of dx = 1 dt: t is counted in float64, and rounded for the process alone."""
    last = []

    def one(x: Tensor, t: Tensor) -> Tensor:
        last.append(float(t))
        return torch.ones_like(x)

    ts = torch.linspace(0, 1, 1001, dtype=torch.float64)
    EulerSimulator(VectorField(one)).simulate(X.float(), ts)
    assert last == [float(t) for t in ts[:-1].float()]


def test_a_number_for_a_drift_says_what_is_wanted():
    with pytest.raises(ValueError, match=r"field must return a tensor.*, got"):
        EulerSimulator(VectorField(lambda x, t: math.pi)).step(X, 0.0, 0.1)

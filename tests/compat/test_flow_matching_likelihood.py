"""compat.flow_matching.ODESolver.compute_likelihood beside the installed flow_matching, with the same seeds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.flow_matching_oracle import Reference, Velocity, apart, gaussian_velocity, peer, solver, start
from helpers.op_counter import EveryOp
from helpers.suites import few
from torch import Tensor

from diffkern.compat.flow_matching.solver import ODESolver

METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "dopri5", "bosh3")
GRIDS = [(1.0, 0.0), (1.0, 0.62, 0.5, 0.0)]


def log_normal(x: Tensor) -> Tensor:
    return (-0.5 * x.square() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    """flow_matching draws its probe in torch's default dtype, so that float64 data need it to be float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(cls: Any, model: Any, x: Tensor, step_size: Any = 0.1, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(states, log-likelihoods, what the generator gives next)."""
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*step_size")
        states, log_p = cls(model).compute_likelihood(x, log_normal, step_size, **options)
    return states, log_p, torch.rand(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", few(METHODS, "midpoint", "rk4", "dopri5"))
def test_network(method: str, grid: tuple[float, ...], exact: bool, dtype: torch.dtype) -> None:
    with default(dtype):
        for step_size in (None, 0.3) if method != "bosh3" else (None,):
            for every in (False, True):
                options = {
                    "method": method,
                    "time_grid": torch.tensor(grid),
                    "exact_divergence": exact,
                    "return_intermediates": every,
                }
                found, want = (
                    run(cls, Velocity(dtype), start(dtype), step_size, **options) for cls in (ODESolver, solver())
                )
                assert torch.equal(found[2], want[2]), "the generator is not where the original leaves it"
                for a, b in zip(found[:2], want[:2], strict=True):
                    assert a.shape == b.shape
                    assert a.dtype == b.dtype == dtype
                    if dtype == torch.float64:
                        assert apart(a, b) <= 1e-12
                    else:  # 20 calls at most; in float32 dopri5 stays within its tolerance
                        assert apart(a, b) <= (5e-5 if method == "dopri5" else 20 * 2e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_reference(exact: bool) -> None:
    """What stands in for flow_matching where only torchdiffeq is installed gives its values."""
    for method in ("rk4", "dopri5"):
        options = {"method": method, "exact_divergence": exact, "return_intermediates": True}
        found, want = (
            run(c, Velocity(torch.float32), start(torch.float32), **options) for c in (Reference, peer().ODESolver)
        )
        assert torch.equal(found[2], want[2])
        for a, b in zip(found[:2], want[:2], strict=True):
            assert apart(a, b) <= 1e-6


def test_float64_needs_no_default_dtype() -> None:
    """flow_matching fails on float64 data with Hutchinson's estimate; the probe is the same draw."""
    with pytest.raises(RuntimeError, match="Double"):
        run(solver(), Velocity(), start())
    with default(torch.float64):
        want = run(solver(), Velocity(), start())
    found = run(ODESolver, Velocity(), start())
    assert apart(found[0], want[0]) <= 1e-12
    assert apart(found[1], want[1]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_integrated_in_float32(dtype: torch.dtype) -> None:
    for exact in (False, True):
        seen: list[Any] = []

        def model(x: Tensor, t: Tensor, seen: list[Any] = seen) -> Tensor:
            seen.append((x.dtype, t.dtype))
            return gaussian_velocity(x, t)

        found, want = (run(c, model, start(dtype), exact_divergence=exact) for c in (ODESolver, solver()))
        assert set(seen) == {(torch.float32, torch.float32)}
        assert torch.equal(found[2], want[2])
        for a, b in zip(found[:2], want[:2], strict=True):
            assert a.dtype == b.dtype == torch.float32
            assert apart(a, b) <= 2e-5


def test_narrow_velocities() -> None:
    """A network under autocast; flow_matching fails where it returns 16 bits."""
    network = torch.nn.Linear(4, 4).requires_grad_(False)

    def narrow(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = network(x)
        return out

    with pytest.raises(RuntimeError, match="BFloat16"):
        run(peer().ODESolver, narrow, start(torch.float32))
    for exact in (False, True):
        found = run(ODESolver, narrow, start(torch.float32), exact_divergence=exact, method="rk4")
        want = run(ODESolver, lambda x, t: network(x), start(torch.float32), exact_divergence=exact, method="rk4")
        assert found[0].dtype == found[1].dtype == torch.float32
        assert apart(found[1], want[1]) <= 0.02


def test_gaussian_density() -> None:
    """The exact log-density of N(1, 0.25 I), by a trace that Hutchinson's estimate gives exactly too."""
    x = start()
    exact = log_normal((x - 1.0) / 0.5) - x.shape[1] * math.log(0.5)
    grid = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for options in ({"exact_divergence": True}, {"exact_divergence": False}):
        x_0, log_p, _ = run(ODESolver, gaussian_velocity, x, 0.01, method="rk4", time_grid=grid, **options)
        assert apart(log_p, exact) <= 1e-8
        assert apart(x_0, (x - 1.0) / 0.5) <= 1e-8


def test_exact_divergence_of_images() -> None:
    """Over all elements; flow_matching raises IndexError, or leaves elements out, for more than two dimensions."""
    x = start(shape=(3, 2, 2))
    with pytest.raises(IndexError):
        run(solver(), Velocity(), x, exact_divergence=True, method="rk4")
    found = run(ODESolver, Velocity(), x, exact_divergence=True, method="rk4")
    want = run(ODESolver, Velocity(), x.flatten(1), exact_divergence=True, method="rk4")
    assert apart(found[0], want[0].reshape(x.shape)) <= 1e-14
    assert apart(found[1], want[1]) <= 1e-14


@pytest.mark.parametrize("exact", [False, True])
def test_gradients(exact: bool) -> None:
    """Through state and divergence, beside finite differences; flow_matching leaves both out."""
    grid = torch.tensor([1.0, 0.0], dtype=torch.float64)

    x = start(shape=(2, 4)).requires_grad_()
    network = Velocity()

    def of_x(x: Tensor) -> Tensor:
        torch.manual_seed(4)
        options = {"method": "midpoint", "exact_divergence": exact, "enable_grad": True, "time_grid": grid}
        return ODESolver(network).compute_likelihood(x, log_normal, 0.5, **options)[1]

    assert torch.autograd.gradcheck(of_x, (x,), atol=1e-6)
    (slope,) = torch.autograd.grad(of_x(x).sum(), network.a)
    direction = torch.randn(slope.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            network.a += sign * 1e-5 * direction
            values.append(float(of_x(x).sum()))
            network.a -= sign * 1e-5 * direction
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float((slope * direction).sum()), rel=1e-5)
    assert apart(
        of_x(x), run(ODESolver, network, x, 0.5, method="midpoint", exact_divergence=exact, time_grid=grid)[1]
    ) <= (1e-12)


def test_grad_modes() -> None:
    """What the model and the prior see, and that nothing asks for gradients of what is not asked for."""
    for x in (start(torch.float32), start(torch.float32).requires_grad_()):
        for cls in (ODESolver, solver()):
            seen, priors = [], []

            def model(x: Tensor, t: Tensor, seen: list[Any] = seen) -> Tensor:
                seen.append((torch.is_grad_enabled(), x.requires_grad, t.requires_grad))
                return -x * t

            def prior(x: Tensor, priors: list[Any] = priors) -> Tensor:
                priors.append((torch.is_grad_enabled(), x.requires_grad))
                return log_normal(x)

            for every in (True, False):
                seen.clear()
                priors.clear()
                x_0, log_p = cls(model).compute_likelihood(x, prior, 0.5, return_intermediates=every)
                assert (x_0.requires_grad, log_p.requires_grad) == (False, False)
                assert seen == [(True, True, False)] * 2
                assert priors == [(True, False)]
    with torch.no_grad():
        assert ODESolver(lambda x, t: -x).compute_likelihood(x, log_normal, 0.5)[1].isfinite().all()
    assert x.grad is None


def test_values_are_those_without_gradients() -> None:
    for exact in (False, True):
        x = start(torch.float32).requires_grad_()
        options = {"exact_divergence": exact, "enable_grad": True, "method": "rk4"}
        found, want = (run(c, Velocity(torch.float32), x, **options) for c in (ODESolver, solver()))
        assert apart(found[0], want[0]) <= 2e-6
        assert apart(found[1], want[1]) <= 2e-6


def test_extras_reach_the_model() -> None:
    found, want = (run(c, Velocity(), start(), exact_divergence=True, shift=0.4) for c in (ODESolver, solver()))
    assert apart(found[1], want[1]) <= 1e-12


@pytest.mark.parametrize(("method", "stages"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_ops(method: str, stages: int) -> None:
    """An op a model call on the samples and one a step on the integral; the grid is read before the loop."""
    x, reads = start(torch.float32), []
    for steps in (5, 10):
        run(ODESolver, lambda x, t: x * t, x, 1 / steps, method=method)  # makes the grid
        with EveryOp() as counted:
            run(ODESolver, lambda x, t: x * t, x, 1 / steps, method=method)
        assert counted.counts["diffkern.step"] == steps * (stages + 1)
        reads.append(counted.counts["aten._local_scalar_dense"])
    assert reads[0] == reads[1]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"time_grid": torch.tensor([0.0, 1.0])}, AssertionError, r"must run from 1 to 0, got \[0.0, 1.0\]"),
    ({"time_grid": torch.tensor([1.0, 0.1])}, AssertionError, "must run from 1 to 0"),
    ({"time_grid": torch.tensor([1.0])}, AssertionError, "must run from 1 to 0"),
    ({"time_grid": torch.tensor([1.0, 0.5, 0.6, 0.0])}, AssertionError, "strictly"),
    ({"time_grid": torch.tensor([1, 0])}, TypeError, "floating point"),
    ({"method": "foo"}, ValueError, "method must be one of"),
    ({"step_size": -1.0}, IndexError, r"step_size must be a positive, finite number, got -1\.0"),
    ({"model": lambda x, t: torch.ones_like(x)}, RuntimeError, "does not require grad"),
    ({"x": torch.ones(3)}, IndexError, "Dimension out of range"),
]


@pytest.mark.parametrize(("wrong", "error", "text"), BAD)
def test_bad_input(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    for cls, match in ((ODESolver, text), (solver(), "")):
        options = {"x": start(torch.float32), "step_size": 0.5, "model": lambda x, t: -x, **wrong}
        with pytest.raises(error, match=match or None):
            run(cls, options.pop("model"), options.pop("x"), **options)


def test_bad_data() -> None:
    with pytest.raises(ValueError, match="x_1 must be floating point"):
        run(ODESolver, lambda x, t: -x, torch.ones(3, 2, dtype=torch.int64))

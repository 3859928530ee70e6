"""compat.flow_matching.ODESolver.sample beside the installed flow_matching: whole trajectories, all methods."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.flow_matching_oracle import Reference, Velocity, apart, gaussian_velocity, peer, solver, start
from helpers.op_counter import EveryOp
from helpers.suites import few
from torch import Tensor

from diffkern.compat.flow_matching.solver import ODESolver
from diffkern.compat.flow_matching.solver._fixed import adams_bashforth
from diffkern.compat.flow_matching.utils import ModelWrapper

FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
"""Model calls a step."""
OURS = (*FIXED, "explicit_adams", "dopri5")
DELEGATED = ("dopri8", "bosh3", "fehlberg2", "adaptive_heun", "implicit_adams", "fixed_adams", "scipy_solver")
GRIDS = [(0.0, 1.0), (1.0, 0.0), (0.0, 0.33, 0.5, 0.9, 1.0), (0.8, 0.1, -0.5), (0.1, 0.85), (0.3,)]
STEPS = [None, 0.1, 0.3, 0.07, 5.0]
LIMITS = {torch.float32: 2e-6, torch.float64: 1e-12}
"""A step."""


def run(cls: Any, model: Any, x: Tensor, step_size: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*step_size")
        return cls(model).sample(x, step_size, **options)


def compare(method: str, grid: Tensor, step_size: Any, dtype: torch.dtype, field: Callable[..., Tensor]) -> None:
    """Last states and all states, and the times that the model is given, to the bit."""
    theirs = solver()
    for every in (False, True):
        results, times = [], []
        for cls in (ODESolver, theirs):
            seen: list[Tensor] = []

            def model(x: Tensor, t: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(t)
                return field(x, t)

            results.append(
                run(cls, model, start(dtype), step_size, method=method, time_grid=grid, return_intermediates=every)
            )
            times.append(seen)
        found, want = results
        assert found.shape == want.shape
        assert found.dtype == want.dtype == dtype
        if method == "explicit_adams" and dtype == torch.float32:
            # Its weights alternate and add up to some hundred: compared with how far the original is from float64.
            wide = copy.deepcopy(field).double() if isinstance(field, Velocity) else field
            options = {"method": method, "time_grid": grid, "return_intermediates": every}
            exact = run(theirs, wide, start(dtype).double(), step_size, **options)
            assert apart(found, exact) <= 2 * apart(want, exact) + LIMITS[dtype]
        elif method == "dopri5" and dtype == torch.float32:
            # Steps follow from the rounding of an error that is small: within the tolerance, not step for step.
            assert apart(found, want) <= 5e-5
            continue
        else:
            assert apart(found, want) <= LIMITS[dtype] * max(1, len(times[1]))
        if len(grid) == 1:
            continue  # theirs asks for slopes that it does not use
        assert len(times[0]) == len(times[1])
        for a, b in zip(*times, strict=True):
            assert a.shape == b.shape == ()
            assert a.dtype == b.dtype == dtype
            # The adaptive steps follow from norms, whose last bits differ.
            assert torch.equal(a, b) if method != "dopri5" else abs(float(a - b)) <= 1e-8


@pytest.mark.parametrize("step_size", few(STEPS, "None", "0.1", "5.0"))
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", OURS)
def test_network(method: str, grid: tuple[float, ...], step_size: float | None) -> None:
    for dtype in LIMITS:
        compare(method, torch.tensor(grid), step_size, dtype, Velocity(dtype))


@pytest.mark.parametrize("method", OURS)
def test_gaussian(method: str) -> None:
    for grid in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.4, 1.0)):
        for dtype in LIMITS:
            compare(method, torch.tensor(grid, dtype=dtype), 0.05, dtype, gaussian_velocity)


@pytest.mark.parametrize("method", [*OURS, "bosh3"])
def test_reference(method: str) -> None:
    """What stands in for flow_matching where only torchdiffeq is installed gives its bits."""
    for grid in GRIDS[:3]:
        options: dict[str, Any] = {"method": method, "time_grid": torch.tensor(grid), "return_intermediates": True}
        found, want = (run(cls, Velocity(), start(), 0.3, **options) for cls in (Reference, peer().ODESolver))
        assert torch.equal(found, want)


def test_grid_dtype_is_its_own() -> None:
    """float32 times under a float64 state, and the other way."""
    compare("rk4", torch.tensor([0.0, 1.0]), 0.3, torch.float64, Velocity())
    compare("rk4", torch.tensor([0.0, 1.0], dtype=torch.float64), 0.3, torch.float32, Velocity(torch.float32))
    compare("heun2", torch.tensor([0.0, 1.0]), torch.tensor(0.25), torch.float32, Velocity(torch.float32))


@pytest.mark.parametrize("method", FIXED)
def test_order(method: str) -> None:
    """Of the exact end of a Gaussian flow: 1 + std x_0."""
    exact = 1.0 + 0.5 * start()
    errors = []
    for steps in (64, 128):
        found = ODESolver(gaussian_velocity).sample(
            start(), 1 / steps, method=method, time_grid=torch.tensor([0.0, 1.0], dtype=torch.float64)
        )
        errors.append(apart(found, exact))
    order = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}[method]
    assert errors[0] / errors[1] >= 2 ** (order - 0.35)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-9])
def test_tolerances(tolerance: float) -> None:
    calls = []
    for cls in (ODESolver, solver()):
        network = Velocity()
        found = cls(network).sample(start(), None, method="dopri5", atol=tolerance, rtol=0.1 * tolerance)
        calls.append((len(network.times), found))
    assert calls[0][0] == calls[1][0]
    assert apart(calls[0][1], calls[1][1]) <= 1e-10


@pytest.mark.parametrize("method", DELEGATED)
def test_delegated(method: str) -> None:
    """The other methods are torchdiffeq's own: the same bits."""
    for every in (False, True):
        options = {"method": method, "return_intermediates": every, "time_grid": torch.tensor([0.0, 0.4, 1.0])}
        found, want = (run(cls, Velocity(), start(), 0.2, **options) for cls in (ODESolver, solver()))
        assert torch.equal(found, want)


@pytest.mark.parametrize("method", OURS)
def test_gradients(method: str) -> None:
    results = []
    for cls in (ODESolver, solver()):
        network, x = Velocity(), start().requires_grad_()
        states = cls(network).sample(
            x,
            None if method == "dopri5" else 0.3,
            method=method,
            enable_grad=True,
            return_intermediates=True,
            time_grid=torch.tensor([0.0, 0.35, 1.0]),
        )
        results.append(torch.autograd.grad(states.sin().sum(), [x, network.a, network.b]))
    for found, want in zip(*results, strict=True):
        # dopri5: torchdiffeq differentiates its step sizes as well, whose effect is below the tolerance.
        assert apart(found, want) <= (1e-4 if method == "dopri5" else 1e-11)


def test_gradients_by_the_times() -> None:
    """Left to torchdiffeq."""
    results = []
    for cls in (ODESolver, solver()):
        grid = torch.tensor([0.0, 0.9], requires_grad=True)
        end = cls(Velocity()).sample(start(), 0.3, time_grid=grid, enable_grad=True, method="midpoint")
        results.append(torch.autograd.grad(end.sum(), grid)[0])
    assert torch.equal(*results)


def test_grad_modes() -> None:
    """The modes that the model sees and the result has."""
    x = start().requires_grad_()
    for enable in (False, True):
        for cls in (ODESolver, solver()):
            seen = []

            def model(x: Tensor, t: Tensor, seen: list[Any] = seen) -> Tensor:
                seen.append((torch.is_grad_enabled(), x.requires_grad, t.requires_grad))
                return -x

            with torch.no_grad():
                assert cls(model).sample(x, 0.5, enable_grad=enable).requires_grad == enable
            assert seen == [(enable, True, False), (enable, enable, False)]


def test_under_inference_mode() -> None:
    """The grid that is kept for later runs is an ordinary one."""
    options: dict[str, Any] = {"time_grid": torch.tensor([0.0, 0.77]), "method": "heun2"}
    with torch.inference_mode():
        ODESolver(lambda x, t: -x * t).sample(start(), 0.11, **options)
    x = start().requires_grad_()
    ODESolver(lambda x, t: -x * t).sample(x, 0.11, enable_grad=True, **options).sum().backward()
    assert x.grad is not None


def test_extras_and_wrappers() -> None:
    class Shifted(ModelWrapper):
        def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
            return super().forward(x, t, **extras) + 1.0

    for shift in (0.0, 0.7):
        found = ODESolver(Shifted(Velocity())).sample(start(), 0.2, shift=shift)
        want = solver()(lambda x, t, s=shift: Velocity()(x, t) + s + 1.0).sample(start(), 0.2)
        assert apart(found, want) <= 1e-14
    ours = ODESolver(Velocity())
    assert len(list(ours.parameters())) == 2
    assert isinstance(ours, torch.nn.Module)


@pytest.mark.parametrize("method", OURS)
def test_half_precision(method: str) -> None:
    """At least as close to float64 as the original, in dtypes of 16 bits."""
    for dtype in (torch.float16, torch.bfloat16):
        options: dict[str, Any] = {"method": method, "time_grid": torch.tensor([0.0, 1.0])}
        if method == "dopri5":
            options |= {"atol": 1e-2, "rtol": 1e-2}
        x = start(dtype, (64, 4))

        def field(x: Tensor, t: Tensor) -> Tensor:
            return gaussian_velocity(x.double(), t.double()).to(x.dtype)

        exact = 1.0 + 0.5 * x.double()
        if method != "dopri5":
            exact = ODESolver(gaussian_velocity).sample(x.double(), 0.1, **options)
        found, want = (run(cls, field, x, 0.1, **options) for cls in (ODESolver, solver()))
        assert found.dtype == want.dtype == dtype
        ours, theirs = ((r.double() - exact).square().mean().sqrt() for r in (found, want))
        assert ours <= (0.02 if method == "dopri5" else 1.05 * theirs)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize(
    ("state", "slope"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float64), (torch.bfloat16, torch.float32)],
)
def test_mixed_dtypes(method: str, state: torch.dtype, slope: torch.dtype) -> None:
    """A model that returns another dtype: the dtypes that it is called with, and the result."""
    results, seen = [], []
    for cls in (ODESolver, solver()):
        calls: list[Any] = []

        def model(x: Tensor, t: Tensor, calls: list[Any] = calls) -> Tensor:
            calls.append((x.dtype, t.dtype))
            return (-x * 0.5).to(slope)

        results.append(run(cls, model, start(state), 0.25, method=method, atol=1e-2, rtol=1e-2))
        seen.append(calls)
    if method != "dopri5":  # its steps are not the same in narrow dtypes
        assert seen[0] == seen[1]
    assert results[0].dtype == results[1].dtype == state
    limit = max(torch.finfo(dtype).eps for dtype in (state, slope, torch.float32))
    assert apart(*results) <= (1e-2 if method == "dopri5" else 4 * limit)


def test_shapes_that_broadcast() -> None:
    for shape in ((4,), (1, 4), ()):

        def model(x: Tensor, t: Tensor, shape: tuple[int, ...] = shape) -> Tensor:
            return torch.ones(shape, dtype=torch.float64) * t

        for method in ("euler", "rk4"):
            found, want = (run(cls, model, start(), 0.3, method=method) for cls in (ODESolver, solver()))
            assert apart(found, want) <= 1e-14


def test_other_layouts() -> None:
    """No samples, a vector of samples, and memory that is not contiguous."""
    for x in (start(shape=(0, 3)), start(shape=(5,)), start(shape=(2, 3, 4, 4)).transpose(1, 3)):
        for method in ("euler", "rk4", "explicit_adams"):
            found, want = (run(cls, lambda x, t: -x * t, x, 0.3, method=method) for cls in (ODESolver, solver()))
            assert found.shape == want.shape
            assert apart(found, want) <= 1e-13


@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams", "dopri5"])
def test_results_are_contiguous(method: str) -> None:
    """As torchdiffeq's are: a caller may view them in another shape whatever the layout of x_init."""
    for x in (start(shape=(2, 3, 4, 4)).contiguous(memory_format=torch.channels_last), start(shape=(3, 4)).T):
        for every in (False, True):
            for grid in ((0.0, 1.0), (0.3,)):
                options = {"method": method, "return_intermediates": every, "time_grid": torch.tensor(grid)}
                found, want = (run(cls, lambda x, t: -x, x, 0.3, **options) for cls in (ODESolver, solver()))
                assert found.is_contiguous()
                assert found.stride() == want.stride()


def test_the_state_is_the_callers() -> None:
    """Neither x_init nor a state that the model kept is written to; one time gives a copy."""
    x, kept = start(), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        kept.append((x, x.clone()))
        return -x

    ODESolver(model).sample(x, 0.2, method="rk4")
    assert all(torch.equal(a, b) for a, b in kept)
    assert kept[0][0] is not x  # the model may write into it

    def scaling(x: Tensor, t: Tensor) -> Tensor:
        t *= 1000.0
        return -x * t / 1000.0

    for _ in range(2):  # the second run takes the grid of the first
        assert apart(ODESolver(scaling).sample(x, 0.2), ODESolver(lambda x, t: -x * t).sample(x, 0.2)) <= 1e-6
    alone = ODESolver(model).sample(x, 0.2, time_grid=torch.tensor([0.4]))
    assert torch.equal(alone, x)
    assert alone is not x


@pytest.mark.parametrize("method", FIXED)
def test_one_op_a_call(method: str) -> None:
    m = start(torch.float32)
    solver = ODESolver(lambda x, t: m)
    counts = []
    for steps in (10, 20):
        solver.sample(m, 1 / steps, method=method)
        with EveryOp() as counted:
            solver.sample(m, 1 / steps, method=method)
        assert counted.counts["diffkern.step"] == steps * FIXED[method]
        counts.append(counted.counts - counted.counts.__class__({"diffkern.step": steps * FIXED[method]}))
        assert not [op for op in counted.counts if "item" in op]
    # What else is dispatched does not grow with the steps: the grid's points are read on the CPU before the loop.
    assert counts[0] == counts[1]


def test_slopes_of_another_dtype_cost_no_op() -> None:
    """A network of 16 bits under a float32 state: the slopes that later stages read are made by the step."""
    m = start(torch.bfloat16)
    ours = ODESolver(lambda x, t: m)
    ours.sample(start(torch.float32), 0.1, method="rk4")
    with EveryOp() as counted:
        ours.sample(start(torch.float32), 0.1, method="rk4")
    assert counted.counts["diffkern.step"] == 40
    assert counted.counts["aten._to_copy"] <= 2


def test_adams_bashforth() -> None:
    assert adams_bashforth(2) == (1.5, -0.5)
    assert adams_bashforth(4) == pytest.approx((55 / 24, -59 / 24, 37 / 24, -9 / 24), rel=1e-15)
    for order in range(1, 12):
        weights = adams_bashforth(order)
        for power in range(order):  # exact for polynomials of lower degree
            value = sum(w * float(-i) ** power if power else w for i, w in enumerate(weights))
            assert value == pytest.approx(1 / (power + 1), rel=1e-5)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"method": "rk5"}, ValueError, "method must be one of dopri8, .*, got 'rk5'"),
    ({"time_grid": torch.tensor([0.0, 0.5, 0.5, 1.0])}, AssertionError, "strictly increasing or decreasing, got"),
    ({"time_grid": torch.tensor([0.0, 0.6, 0.4])}, AssertionError, "strictly increasing or decreasing"),
    ({"time_grid": torch.tensor([0, 1])}, TypeError, "floating point, got torch.int64"),
    ({"time_grid": torch.tensor([[0.0, 1.0]])}, AssertionError, r"one dimension, got shape \[1, 2\]"),
    ({"time_grid": torch.tensor([])}, IndexError, "at least one time, got none"),
    ({"time_grid": [0.0, 1.0]}, AttributeError, "list"),
    ({"step_size": -0.1}, RuntimeError, r"step_size must be a positive, finite number, got -0\.1$"),
    ({"step_size": 0.0}, RuntimeError, r"step_size must be a positive, finite number, got 0\.0$"),
    ({"step_size": 0}, RuntimeError, "step_size must be a positive, finite number, got 0$"),
    ({"step_size": torch.tensor(0.0)}, RuntimeError, r"step_size must be a positive, finite number, got 0\.0$"),
    ({"step_size": float("nan")}, RuntimeError, "step_size must be a positive, finite number, got nan$"),
    ({"step_size": "a"}, TypeError, "step_size must be a positive, finite number, got 'a'$"),
    ({"x_init": 3.0}, AttributeError, ""),
    ({"model": lambda x, t: None}, TypeError, ""),
    ({"model": lambda x, t: torch.ones(4, 3, 2)}, RuntimeError, ""),
    ({"model": lambda x, t: x[:, :2]}, RuntimeError, ""),
    ({"model": 3}, TypeError, ""),
    ({"model": lambda x, t: x * float("nan"), "method": "dopri5"}, AssertionError, "shrink to nothing"),
    ({"model": lambda x, t: x**3 * 1e5 + 1e5, "method": "dopri5"}, AssertionError, ""),
    ({"atol": 0.0, "rtol": 0.0, "method": "dopri5"}, AssertionError, ""),
]


@pytest.mark.parametrize(("wrong", "error", "text"), BAD)
def test_bad_input(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    """The exceptions of the original."""
    for cls, match in ((ODESolver, text), (solver(), "")):
        options = {"x_init": start(torch.float32), "step_size": 0.3, "model": lambda x, t: -x, **wrong}
        with pytest.raises(error, match=match or None):
            run(cls, options.pop("model"), options.pop("x_init"), options.pop("step_size"), **options)


def test_bad_input_that_the_original_takes() -> None:
    for x in (torch.arange(6).reshape(2, 3), torch.tensor(3.0)):
        with pytest.raises(ValueError, match=r"x_init must be floating point of shape \[B, ...\], got torch\."):
            ODESolver(lambda x, t: -x).sample(x, 0.1)
    with pytest.raises(AssertionError, match="must be finite, got"):
        ODESolver(lambda x, t: -x).sample(start(), None, time_grid=torch.tensor([0.0, float("inf")]))
    with pytest.warns(UserWarning, match=r"step_size is not used by dopri5, got 0\.3"):
        ODESolver(lambda x, t: -x).sample(start(), 0.3, method="dopri5")

"""compat.flow_matching's schedulers, paths and helpers beside the installed flow_matching."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.flow_matching_cases import LIMITS, OURS, SCHEDULERS
from helpers.flow_matching_oracle import PARTS, apart, peer, start
from helpers.op_counter import CountOps
from torch import Tensor

import diffkern

OUT_OF_SCOPE = {
    *("MixtureDiscreteProbPath", "GeodesicProbPath", "DiscretePathSample", "categorical"),
    *("MixtureDiscreteEulerSolver", "RiemannianODESolver"),
}
RATES = ("alpha_t", "sigma_t", "d_alpha_t", "d_sigma_t")


def test_names_and_signatures() -> None:
    """Everything that flow_matching exports is here, but for what is out of scope, with its argument names."""
    theirs, ours = vars(peer()), vars(OURS)
    assert set(theirs) - set(ours) == OUT_OF_SCOPE
    assert not set(ours) - set(theirs)
    for name, cls in ours.items():
        functions = {name: cls} if inspect.isfunction(cls) else {"__init__": cls.__init__}
        others = {name: theirs[name]} if inspect.isfunction(cls) else {"__init__": theirs[name].__init__}
        if inspect.isclass(cls):
            for method in (n for n in vars(theirs[name]) if callable(vars(theirs[name])[n]) and not n.startswith("__")):
                functions[method], others[method] = getattr(cls, method), getattr(theirs[name], method)
        for method, function in functions.items():
            found, want = (
                [(p.name, p.kind, str(p.default)) for p in inspect.signature(f).parameters.values()]
                for f in (function, others[method])
            )
            if name != "Solver":
                assert found == want, f"{name}.{method}"


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, dtype: torch.dtype) -> None:
    ours, theirs = getattr(OURS, name)(*SCHEDULERS[name]), getattr(peer(), name)(*SCHEDULERS[name])
    t = torch.linspace(0, 1, 41).to(dtype).reshape(1, 41)
    found, want = ours(t), theirs(t)
    for rate in RATES:
        assert getattr(found, rate).dtype == dtype
        torch.testing.assert_close(getattr(found, rate), getattr(want, rate), rtol=LIMITS[dtype], atol=LIMITS[dtype])
    snr = torch.logspace(-2, 2, 21).to(dtype)
    torch.testing.assert_close(ours.snr_inverse(snr), theirs.snr_inverse(snr), rtol=LIMITS[dtype], atol=1e-6)
    inside = t[0, 1:-1].double()
    rates = ours(inside)
    torch.testing.assert_close(ours.snr_inverse(rates.alpha_t / rates.sigma_t), inside, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_derivatives(name: str) -> None:
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64, requires_grad=True)
    found = getattr(OURS, name)(*SCHEDULERS[name])(t)
    for rate, derivative in ((found.alpha_t, found.d_alpha_t), (found.sigma_t, found.d_sigma_t)):
        (slope,) = torch.autograd.grad(rate.sum(), t, retain_graph=True)
        torch.testing.assert_close(slope, derivative.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [0, -1, "a", None])
def test_bad_power(n: Any) -> None:
    for package in (OURS, peer()):
        with pytest.raises(AssertionError, match="must be"):
            package.PolynomialConvexScheduler(n)


def test_abstract_schedulers() -> None:
    for cls in (OURS.Scheduler, OURS.ConvexScheduler, OURS.ProbPath, OURS.Solver):
        with pytest.raises(TypeError, match="abstract"):
            cls()


def test_schedule_transform() -> None:
    """The transformed velocity beside flow_matching's, for both its own wrapper and ours; its two ops."""
    theirs = peer()
    for one, two in (("CondOTScheduler", "CosineScheduler"), ("VPScheduler", "CondOTScheduler")):
        for t in (torch.tensor(0.35, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)[:, None]):
            results = []
            for package in (OURS, theirs):

                class Wrapped(package.ModelWrapper):  # type: ignore[name-defined, misc]
                    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
                        return torch.tanh(x) * t + extras["shift"]

                model = package.ScheduleTransformedModel(
                    Wrapped(torch.nn.Identity()), getattr(package, one)(), getattr(package, two)()
                )
                with CountOps((3, 4)) as counted:
                    results.append(model(x=start(), t=t, shift=0.5))
                if package is OURS:
                    assert counted.fused.total() == 2
            assert apart(*results) <= 1e-12


def test_helpers() -> None:
    theirs = peer()
    x, source = start(), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for package in (OURS, theirs):
        assert torch.equal(package.expand_tensor_like(source, x), source[:, None].expand(3, 4))
        assert package.unsqueeze_to_match(source, x[None]).shape == (3, 1, 1)
        assert package.unsqueeze_to_match(source, x[None], how="prefix").shape == (1, 1, 3)
        assert package.unsqueeze_to_match(x, source).shape == (3, 4)
        for bad in (source[:2], source[:, None], source[0]):
            with pytest.raises(AssertionError):
                package.expand_tensor_like(bad, x)
        with pytest.raises(AssertionError, match="prefix"):
            package.unsqueeze_to_match(source, x, how="middle")
        leaf = start().requires_grad_()
        slope = package.gradient(leaf**2, leaf, create_graph=True)
        assert torch.equal(slope, 2 * leaf)
        assert torch.equal(package.gradient(slope, leaf, grad_outputs=x), 2 * x)
        with pytest.raises(RuntimeError, match="does not require grad"):
            package.gradient(x, leaf)


def test_without_flow_matching() -> None:
    """flow_matching and torchdiffeq cannot be imported: all but what is left to torchdiffeq works."""
    code = f"""
import sys
for name in ("flow_matching", "torchdiffeq", "scipy", "torchvision"):
    sys.modules[name] = None  # an import of it fails
import importlib, torch
for part in {PARTS!r}:
    importlib.import_module(f"diffkern.compat.flow_matching.{{part}}")
from diffkern.compat.flow_matching.path import CondOTProbPath
from diffkern.compat.flow_matching.path.scheduler import CondOTScheduler
from diffkern.compat.flow_matching.solver import ODESolver
x, t = torch.ones(2, 3), torch.rand(2)
assert CondOTProbPath().sample(x_0=x, x_1=x, t=t).x_t.isfinite().all()
solver = ODESolver(lambda x, t: -x * t)
for method in ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "dopri5"):
    assert solver.sample(x, None, method=method).isfinite().all()
    assert solver.compute_likelihood(x, lambda x: x.sum(1), None, method=method)[1].isfinite().all()
times = torch.tensor([0.0, 1.0], requires_grad=True)
for call in (
    lambda: solver.sample(x, None, method="bosh3"),
    lambda: solver.sample(x, None, time_grid=times, enable_grad=True),
    lambda: torch.func.jvp(lambda x: solver.sample(x, None), (x,), (x,)),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(diffkern.__file__).parent.parent)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    whys = "method 'bosh3'", "a gradient by time_grid", "a forward-mode derivative, torch.func or vmap of the solver"
    for why, line in zip(whys, done.stdout.strip().splitlines(), strict=True):
        assert line == f"{why} needs the package torchdiffeq, which is not installed: pip install torchdiffeq"

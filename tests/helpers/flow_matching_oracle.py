"""The installed flow_matching (CC BY-NC: it is called, never read), and what its tests beside ours share."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

NEEDED = ("flow_matching", "torchdiffeq")
UP, DOWN = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
PARTS = ("path", "path.scheduler", "solver", "utils")


def missing() -> list[str]:
    """What is not installed of it."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def peer() -> Any:
    """Its exports by name; the test is skipped where it is not installed."""
    if missing():
        import pytest

        pytest.skip(f"needs {', '.join(missing())}")
    return exports("flow_matching")


def solver() -> Any:
    """Its ODESolver; where only torchdiffeq is installed, `Reference`."""
    if not missing():
        return peer().ODESolver
    if importlib.util.find_spec("torchdiffeq") is None:
        import pytest

        pytest.skip("needs torchdiffeq")
    return Reference


class Reference:
    """What ODESolver is documented to do (arXiv 2412.06264), on torchdiffeq: our own, compared with it where it is."""

    def __init__(self, velocity_model: Any) -> None:
        self.velocity_model = velocity_model

    def sample(
        self, x_init: Tensor, step_size: Any, method: str = "euler", atol: float = 1e-5, rtol: float = 1e-5,
        time_grid: Tensor = UP, return_intermediates: bool = False, enable_grad: bool = False, **extras: Any,
    ) -> Tensor:  # fmt: skip
        from torchdiffeq import odeint

        options = {} if step_size is None else {"step_size": step_size}
        with torch.set_grad_enabled(enable_grad):
            states: Tensor = odeint(
                lambda t, x: self.velocity_model(x=x, t=t, **extras), x_init, time_grid.to(x_init.device),
                method=method, options=options, atol=atol, rtol=rtol,
            )  # fmt: skip
        return states if return_intermediates else states[-1]

    def compute_likelihood(
        self, x_1: Tensor, log_p0: Any, step_size: Any, method: str = "euler", atol: float = 1e-5, rtol: float = 1e-5,
        time_grid: Tensor = DOWN, return_intermediates: bool = False, exact_divergence: bool = False,
        enable_grad: bool = False, **extras: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from torchdiffeq import odeint

        if time_grid[0] != 1.0 or time_grid[-1] != 0.0:
            raise AssertionError("the time grid must run from 1 to 0")
        probe = None if exact_divergence else (torch.randn_like(x_1) < 0) * 2.0 - 1.0

        def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x = state[0] if enable_grad and state[0].requires_grad else state[0].detach().requires_grad_()
                u = self.velocity_model(x=x, t=t, **extras)
                if probe is not None:
                    (slope,) = torch.autograd.grad(u, x, probe)
                    change = torch.einsum("bi,bi->b", slope.flatten(1), probe.flatten(1))
                else:
                    change = sum(
                        torch.autograd.grad(u[:, d].sum(), x, retain_graph=True)[0][:, d] for d in range(x[0].numel())
                    )
            return u.detach(), change.detach()

        with torch.set_grad_enabled(enable_grad):
            found, change = odeint(
                field, (x_1, torch.zeros(len(x_1))), time_grid, method=method,
                options={} if step_size is None else {"step_size": step_size}, atol=atol, rtol=rtol,
            )  # fmt: skip
        log_p = log_p0(found[-1]) + change[-1]
        return found if return_intermediates else found[-1], log_p


def exports(package: str) -> Any:
    """The public names of the four modules of ``package``."""
    found: dict[str, Any] = {}
    for part in PARTS:
        module = importlib.import_module(f"{package}.{part}")
        # Its solver lists a ModelWrapper that it does not have.
        found |= {name: getattr(module, name) for name in module.__all__ if hasattr(module, name)}
    return SimpleNamespace(**found)


class Velocity(nn.Module):
    """A small network of x and t, [B, 4] or anything with 4 elements a sample; keeps the times it is given."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(5, 16, generator=generator, dtype=torch.float64).mul(0.5).to(dtype))
        self.b = nn.Parameter(torch.randn(16, 4, generator=generator, dtype=torch.float64).mul(0.5).to(dtype))
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        self.times.append(t.detach())
        given = torch.cat([x.flatten(1), t.expand(len(x), 1)], 1)
        return (torch.tanh(given @ self.a) @ self.b).reshape(x.shape) + shift


def gaussian_velocity(x: Tensor, t: Tensor, std: float = 0.5) -> Tensor:
    """The exact field from N(0, I) to N(1, std^2 I) along straight lines (arXiv 2210.02747)."""
    variance = (1 - t) ** 2 + (t * std) ** 2
    return 1.0 + (t * std**2 - (1 - t)) / variance * (x - t)


def start(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (3, 4)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def apart(found: Tensor, want: Tensor) -> float:
    """The largest difference relative to the largest element."""
    if not want.numel():
        return 0.0
    return float((found.detach() - want.detach()).abs().max() / want.detach().abs().max().clamp(min=1e-30))

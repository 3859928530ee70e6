"""The ODE dx/dt = u(x, t) of a velocity model: samples, encodings and likelihoods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffkern.compat.flow_matching.solver import _dopri5, _fixed, _torchdiffeq
from diffkern.compat.flow_matching.solver._stages import State
from diffkern.compat.flow_matching.solver.solver import Solver
from diffkern.compat.flow_matching.utils.model_wrapper import ModelWrapper
from diffkern.compat.flow_matching.utils.utils import gradient
from diffkern.compat.kit.rows import wide
from diffkern.compat.kit.transforms import transformed

Velocity = ModelWrapper | Callable[..., Tensor]


class ODESolver(Solver):
    """Integrates ``velocity_model(x=x, t=t, **extras)``, t a 0-dim tensor in the dtype of x; one fused op a model call.

    Methods: euler, midpoint, heun2, heun3, rk4 (the 3/8 rule), explicit_adams on torchdiffeq's fixed grid; dopri5 with
    torchdiffeq's control; the others are torchdiffeq's own and need it installed.
    """

    def __init__(self, velocity_model: Velocity) -> None:
        super().__init__()
        self.velocity_model = velocity_model

    def sample(  # type: ignore[override]  # flow_matching's own signature
        self,
        x_init: Tensor,
        step_size: float | None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor = torch.tensor([0.0, 1.0], device="cpu"),  # noqa: B008
        return_intermediates: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> Tensor | Sequence[Tensor]:
        """The state [B, ...] at the last time of ``time_grid``; with ``return_intermediates`` at all, [T, B, ...].

        ``step_size``: of the fixed methods, from the first time on; the last step is shorter, and states at times in
        between are on the line between the steps'. None: one step from each time to the next. The grid may run either
        way. ``atol`` and ``rtol`` belong to the adaptive methods. ``enable_grad``: differentiable in x_init and in what
        the model depends on. TypeError, AssertionError and ValueError for wrong input as flow_matching raises them.
        """
        _check_state("x_init", x_init)

        def field(t: Tensor, state: State) -> State:
            return (self.velocity_model(x=state[0], t=t, **model_extras),)

        with torch.set_grad_enabled(enable_grad):
            found = _integrate(
                field, (x_init,), step_size, method, atol, rtol, time_grid, return_intermediates, enable_grad
            )
            return _samples(found, return_intermediates)

    def compute_likelihood(
        self,
        x_1: Tensor,
        log_p0: Callable[[Tensor], Tensor],
        step_size: float | None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor = torch.tensor([1.0, 0.0], device="cpu"),  # noqa: B008
        return_intermediates: bool = False,
        exact_divergence: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> tuple[Tensor, Tensor] | tuple[Sequence[Tensor], Tensor]:
        """(x_0 or the states at all times, ln p_1(x_1) [B]) of data x_1 [B, ...] (arXiv 1806.07366, 1810.01367).

            ln p_1(x_1) = ln p_0(x_0) + int_1^0 div u dt

        ``log_p0`` is the log-density [B] of the noise. The divergence is Hutchinson's v.(du/dx) v, v of +-1 drawn once
        from torch's generator, or with ``exact_divergence`` the trace, a backward pass an element. The state is
        float32, or float64 for float64 data. ``enable_grad``: differentiable in x_1 and the model's parameters.
        The other arguments are those of `sample`; the times must run from 1 to 0.
        """
        if not bool(time_grid[0] == 1.0) or not bool(time_grid[-1] == 0.0):
            raise AssertionError(f"time_grid must run from 1 to 0, got {time_grid.tolist()}")
        _check_state("x_1", x_1)
        work = wide(x_1.dtype)
        probe = None if exact_divergence else (torch.randn_like(x_1) < 0).to(work) * 2.0 - 1.0
        x_1 = x_1.to(work)

        def field(t: Tensor, state: State) -> State:
            with torch.enable_grad():
                x = state[0]
                x = x if x.requires_grad and enable_grad else x.detach().requires_grad_()
                u = self.velocity_model(x=x, t=t, **model_extras)
                change = _divergence(u, x, probe, enable_grad)
            return (u, change) if enable_grad else (u.detach(), change)

        with torch.set_grad_enabled(enable_grad):
            start = (x_1, torch.zeros(x_1.shape[0], dtype=x_1.dtype, device=x_1.device))
            found = _integrate(
                field, start, step_size, method, atol, rtol, time_grid, return_intermediates, enable_grad
            )
            states = _samples(found, return_intermediates)
        x_0, change = found[-1]
        return states, log_p0(x_0) + change


def _samples(found: list[State], every: bool) -> Tensor:
    """The last samples or all, [T, B, ...]; contiguous whatever the state was, as torchdiffeq's are."""
    return torch.stack([state[0].contiguous() for state in found]) if every else found[-1][0].contiguous()


def _divergence(u: Tensor, x: Tensor, probe: Tensor | None, differentiable: bool) -> Tensor:
    """div u [B]: of each element, or Hutchinson's estimate with ``probe``."""
    u = u.to(x.dtype)
    if probe is not None:
        return (gradient(u, x, probe, create_graph=differentiable) * probe).flatten(1).sum(1)
    flat = u.flatten(1)
    total = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
    for d in range(flat.shape[1]):
        (slope,) = torch.autograd.grad(flat[:, d].sum(), x, create_graph=differentiable, retain_graph=True)
        total = total + slope.flatten(1)[:, d]
    return total


def _integrate(
    field: Any,
    y: State,
    step_size: Any,
    method: str,
    atol: float,
    rtol: float,
    time_grid: Tensor,
    every: bool,
    enable_grad: bool,
) -> list[State]:
    """The states at the last time, or at all; in the dtypes of ``y``."""
    _torchdiffeq.check_method(method)
    why = ""
    if method not in (*_fixed.METHODS, "dopri5"):
        why = f"method {method!r}"
    elif enable_grad and time_grid.requires_grad:
        why = "a gradient by time_grid"
    elif transformed():
        why = "a forward-mode derivative, torch.func or vmap of the solver"
    if why:
        whole = _torchdiffeq.run(why, method, field, y, time_grid.to(y[0].device), step_size, rtol, atol)
        states = [tuple(part[j] for part in whole) for j in range(len(time_grid))]
        return states if every else states[-1:]
    if method == "dopri5":
        if step_size is not None:
            warnings.warn(f"step_size is not used by dopri5, got {step_size}", stacklevel=3)
        found = _dopri5.run(field, y, time_grid, rtol, atol, every)
    else:
        found = _fixed.run(method, field, y, _fixed.make_grid(method, time_grid, step_size, every))
    if not found:
        found[0] = tuple(part.clone() for part in y)
    elif every:
        found[0] = y
    wanted = range(len(time_grid)) if every else [len(time_grid) - 1]
    return [tuple(part.to(first.dtype) for part, first in zip(found[j], y, strict=True)) for j in wanted]


def _check_state(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise AttributeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"{name} must be floating point of shape [B, ...], got {x.dtype} of shape {list(x.shape)}")

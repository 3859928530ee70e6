"""The probability-flow ODE: on the device by `diffkern.rk45`, or by scipy on the host as score_sde solves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
from torch import Tensor

from diffkern.compat.kit.rows import as_dtype, wide
from diffkern.compat.score_sde import _rows
from diffkern.compat.score_sde.models import ScoreFunction, from_flattened_numpy, to_flattened_numpy
from diffkern.names import OdeSolver
from diffkern.samplers.arguments import choice
from diffkern.sampling import adaptive

SOLVERS = get_args(OdeSolver)


def check_solver(solver: OdeSolver) -> None:
    """Raises ValueError for another."""
    choice("solver", solver, SOLVERS)


def on_schedule(sde: Any, method: str, solver: OdeSolver) -> bool:
    """Whether diffkern's solvers take it: RK45, and an SDE that is one of diffkern's schedules."""
    known = all(_rows.linear(sde, name) for name in ("sde", "marginal_prob")) and sde.T == 1
    return solver == "device" and method == "RK45" and known


def integrate(
    sde: Any,
    score_fn: ScoreFunction,
    x: Tensor,
    span: tuple[float, float],
    rtol: float,
    atol: float,
    method: str,
    solver: OdeSolver,
) -> tuple[Tensor, int]:
    """(state at span[1] in the dtype of x, network calls) from the state x at span[0]."""
    if not on_schedule(sde, method, solver):
        rsde = sde.reverse(score_fn, probability_flow=True)

        def drift(t: float, flat: np.ndarray) -> np.ndarray:
            state = from_flattened_numpy(flat, x.shape).to(x.device, x.dtype)
            return to_flattened_numpy(rsde.sde(state, state.new_full([len(x)], t))[0])

        end, calls = solve_ivp(drift, span, to_flattened_numpy(x), rtol, atol, method)
        return from_flattened_numpy(end, x.shape).to(x.device, x.dtype), calls
    schedule = sde.schedule
    first, last = (float(schedule.alpha(t)) for t in span)

    def network(y: Tensor, t: Tensor) -> Tensor:
        return score_fn.network(y, t.to(x.dtype))

    found = adaptive.rk45(
        network,
        x.double() / first,  # it takes the state of variance-exploding form
        schedule,
        rtol=rtol,
        atol=atol,
        prediction="score" if score_fn.exploding else "eps",
        span=(float(schedule.sigma_ve(span[0])), float(schedule.sigma_ve(span[1]))),
        denoise=False,
        max_steps=100_000,
        model_dtype=x.dtype,
    )
    return (found.x * last).to(x.dtype), found.model_calls


def solve_ivp(
    function: Callable[[float, np.ndarray], np.ndarray],
    span: tuple[float, float],
    start: np.ndarray,
    rtol: float,
    atol: float,
    method: str,
) -> tuple[np.ndarray, int]:
    """(end, calls) by scipy; RuntimeError where it does not arrive, ModuleNotFoundError without scipy."""
    try:
        from scipy import integrate as scipy_integrate
    except ImportError as error:
        raise ModuleNotFoundError(
            f"method {method!r} of the score_sde ODE samplers needs scipy (pip install scipy); solver='device' with "
            "method='RK45' and the SDEs of diffkern.compat.score_sde needs torch alone"
        ) from error
    solution = scipy_integrate.solve_ivp(function, span, start, rtol=rtol, atol=atol, method=method)
    if not solution.success:
        raise RuntimeError(f"scipy's {method} did not arrive at t = {span[1]:g}: {solution.message}")
    end: np.ndarray = solution.y[:, -1]
    return end, int(solution.nfev)


def widened(x: Tensor) -> Tensor:
    """In float32 at least: score_sde solves, and calls the network, in float32."""
    return as_dtype(x, wide(x.dtype))

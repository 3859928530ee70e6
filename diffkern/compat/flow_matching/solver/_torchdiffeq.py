"""The methods that stay with torchdiffeq, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

METHODS = (
    *("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun", "euler", "midpoint", "heun2", "heun3", "rk4"),
    *("explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver"),
)
"""What flow_matching's solver takes."""


def check_method(method: str) -> None:
    """Raise ValueError for a method that torchdiffeq does not have."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def run(
    why: str,
    method: str,
    field: Callable[[Tensor, Any], Any],
    y: Any,
    time_grid: Tensor,
    step_size: Any,
    rtol: float,
    atol: float,
) -> Any:
    """The states at all time points; ``y`` a tensor or a tuple of tensors, ``why`` what needs torchdiffeq."""
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise ImportError(
            f"{why} needs the package torchdiffeq, which is not installed: pip install torchdiffeq"
        ) from None
    options = {} if step_size is None else {"step_size": step_size}
    return odeint(field, y, time_grid, method=method, options=options, rtol=rtol, atol=atol)

"""`ODE` and `SDE`, the interfaces of lecture 003, and what turns functions and networks into them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkern.checks import unwrapped
from diffkern.names import Prediction
from diffkern.schedules import predictions
from diffkern.schedules.base import Schedule

Field = Callable[[Tensor, Tensor], Tensor]
"""A function of the state x [B, ...] and the time t, [] or [B], in the shape of x: a vector field, a score."""


class ODE(ABC):
    """dx/dt = u_t(x) (lectures 001, 003)."""

    @abstractmethod
    def drift_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        """u_t(x), shaped like x [B, ...]; t, [] or [B] (one time a sample), has the dtype of x, as networks take it."""


class SDE(ABC):
    """dx = u_t(x) dt + g_t dw (lectures 001, 003), for steps dt in the process's own direction of time."""

    time_direction: float = 1.0
    """The sign of dt for which the equation holds: an SDE has an arrow of time. -1: it runs from high t to low."""

    @abstractmethod
    def drift_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        """u_t(x), shaped like x [B, ...]: what multiplies dt, whose sign is `time_direction`."""

    @abstractmethod
    def diffusion_coefficient(self, x: Tensor, t: Tensor) -> Tensor | float:
        """g_t >= 0: a number, a tensor [] or [B] (one a sample), or something that broadcasts with x."""


class VectorField(ODE):
    """The ODE of a function `field(x, t)`: a closed form, or a network that predicts a velocity."""

    def __init__(self, field: Field) -> None:
        self.field = checked("field", field)

    def drift_coefficient(self, x: Tensor, t: Tensor) -> Tensor:
        """`field(x, t)`."""
        return shaped("field", self.field(x, t), x)


def checked(name: str, function: Any) -> Any:
    """`function` itself; raises ValueError unless it can be called."""
    if not callable(function):
        raise ValueError(f"{name} must be a function of (x, t), got {function!r}")
    return function


def shaped(name: str, value: object, x: Tensor) -> Tensor:
    """`value`, `unwrapped`; raises ValueError unless it has the shape of the state."""
    value = unwrapped(value, name)
    if value.shape != x.shape:
        raise ValueError(f"{name} must return the shape of x, {list(x.shape)}, got {list(value.shape)}")
    return value


def as_rate(value: Tensor | float) -> Tensor:
    """What a `diffusion_coefficient` returned, as a tensor."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)


def spread(g: Tensor, x: Tensor) -> Tensor:
    """`as_rate` in the dtype and on the device of x [B, ...], shaped to multiply it."""
    if g.ndim == 0 or (g.ndim == 1 and x.ndim > 1):
        return column(g, x)
    return g.to(x)


def column(value: Tensor, x: Tensor) -> Tensor:
    """Coefficients [] or [B] in the dtype and on the device of x [B, ...], shaped to multiply it."""
    return predictions.per_sample(value, x, x.dtype)


def from_model(
    model: Callable[..., Tensor],
    schedule: Schedule,
    prediction: Prediction,
    target: Prediction = "score",
    **model_kwargs: Any,
) -> Field:
    """The function (x, t) -> `target` ("score", "velocity", ...) of a network that was trained for `prediction`.

    `model(c x_t, t, **model_kwargs)` gets t as [B] in the dtype of the state and, for ``edm``, its scaled input and
    c_noise. Conversions are those of `predictions.convert`, which raises ValueError where one is not defined. A network
    that is called for its derivative must have one: an output without a gradient in x, where one is wanted, is an
    error and not a divergence of 0.
    """
    prediction = predictions.prediction_of(schedule, prediction)
    target = predictions.prediction_of(schedule, target)
    checked("model", model)

    def field(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x.device)
        scale = column(schedule.input_scale(prediction, t), x)
        time = schedule.model_time(prediction, t).to(x.dtype).expand(x.shape[:1])
        m = shaped("model", model(scale * x, time, **model_kwargs), x).to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad and not m.requires_grad:
            raise ValueError("model must be differentiable in x, got an output without a gradient (no_grad or detach?)")
        return predictions.convert(m, x, t, schedule, prediction, target)

    return field

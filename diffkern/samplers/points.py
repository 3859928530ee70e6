"""Many points of the probability flow at once: what schedule and prediction say at each, as tensors.

`nodes.Coordinates` makes its points here, all of a grid in one pass; solvers that choose their own steps take them as
they are (`points`). An entry has the same bits whatever stands beside it: vectorised code and the scalar code for the
rest of a vector may round differently, so every list is filled up to whole vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffkern.names import Prediction
from diffkern.schedules import predictions
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule

if TYPE_CHECKING:
    from diffkern.samplers.nodes import Coordinates
    from diffkern.schedules.base import Schedule

_LANES = 16


class Said(NamedTuple):
    """At each point: the model is given k x and the time; x0 = p x + q m, eps = P x + Q m; dx/dv = sx x + s0 x0 + sm m.

    x = alpha x0 + sigma eps. NaN stands where the prediction does not determine a number.
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor
    k: Tensor
    p: Tensor
    q: Tensor
    P: Tensor
    Q: Tensor
    sx: Tensor
    s0: Tensor
    sm: Tensor


class Points(NamedTuple):
    """Points [n] for a solver in u, the time of a flow, ln sigma otherwise: dx/du = sx x + s0 x0 + sm m."""

    time: Tensor
    k: Tensor
    p: Tensor
    q: Tensor
    sx: Tensor
    s0: Tensor
    sm: Tensor


def filled(values: Sequence[float] | Tensor) -> Tensor:
    """The values and, up to whole vectors, the last of them again, float64 on the CPU."""
    listed = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    return torch.cat([listed, listed[-1:].expand(-listed.numel() % _LANES)])


def points(space: Coordinates, u: Tensor) -> Points:
    """The points at u, float64 [n] on the CPU: what ``space.node`` says of each."""
    count, u = u.numel(), filled(u)
    direct = space.prediction == "velocity" and space.clip == math.inf
    if space.in_time and direct:  # the slope is m, and nothing else is needed
        one, zero = torch.ones_like(u), torch.zeros_like(u)
        return Points(*(column[:count] for column in (u, one, zero, zero, zero, zero, one)))
    said = in_time(space, u) if space.in_time else in_sigma(space, u.exp())
    # dx/d ln sigma is sigma dx/d sigma.
    by = torch.ones_like(u) if space.in_time else said.sigma
    none, clipped = torch.zeros_like(u), space.clip < math.inf
    if clipped and not space.in_time:
        sx, s0, sm = torch.ones_like(u), -torch.ones_like(u), none
    else:
        sx, s0, sm = said.sx * by, said.s0 * by, said.sm * by
    p, q = (said.p, said.q) if clipped else (none, none)
    unknown = (sx + s0 + sm + p + q).isnan()
    if bool(unknown.any()):
        raise ValueError(undetermined(space.schedule, space.prediction, said.time[unknown][0].item()))
    return Points(*(column[:count] for column in (said.time, said.k, p, q, sx, s0, sm)))


def undetermined(schedule: Schedule, prediction: Prediction, time: float) -> str:
    """What a prediction lacks at a time, as a sentence."""
    return (
        f"prediction {prediction!r} does not determine x0 and eps where alpha v - sigma u is 0: {schedule.name}, "
        f"t={time:g}; take a prediction that does, or times without this one"
    )


def in_sigma(
    space: Coordinates,
    sigma: Tensor,
    t: Tensor | None = None,
    *,
    clamp: bool = False,
    alpha: Tensor | None = None,
) -> Said:
    """At levels of the ODE in sigma, whose state is x_t/alpha = x0 + sigma eps; t and a table's alpha where known."""
    schedule, prediction = space.schedule, space.prediction
    if t is None:
        t = times_of(schedule, sigma, clamp=clamp)
    bad = ~((sigma > 0.0) & (sigma < math.inf))
    if bool(bad.any()):
        level, time = sigma[bad][0].item(), t[bad][0].item()
        remedy = ""
        if level == math.inf:
            remedy = (
                "; ddim, dpmpp_* and unipc start there, in the schedule's own state (with a prediction that says "
                "something of x0 there: v, x0), or give timesteps that begin later"
            )
        raise ValueError(
            f"the ODE in sigma needs a finite sigma > 0 at each model call, got {level} at t={time} "
            f"({schedule.name}){remedy}"
        )
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
    if isinstance(schedule, DiscreteSchedule):
        k = alpha = 1.0 / (1.0 + sigma * sigma).sqrt() if alpha is None else alpha
        u, v = _target_at_level(schedule, prediction, t, alpha, sigma)
        p, q, P, Q = predictions.estimates(alpha, sigma * alpha, u, v)
    else:
        alpha = schedule.alpha(t)
        k = alpha * schedule.input_scale(prediction, t)
        u, v = predictions.target_coefficients(schedule, prediction, t)
        p, q, P, Q = predictions.estimates(alpha, schedule.sigma(t), u, v)
    known = schedule.model_time(prediction, t).to(torch.float64)
    clipped = space.clip < math.inf
    slope = (one / sigma, -one / sigma, zero) if clipped else (P * alpha, zero, Q)
    return Said(one, sigma, known, k, p * alpha, q, P * alpha, Q, *slope)


def _target_at_level(
    schedule: DiscreteSchedule, prediction: Prediction, t: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """(u, v) at the level sigma: noise levels need not be those of the table, times then only label them."""
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
    if prediction == "eps":
        return zero, one
    if prediction == "x0":
        return one, zero
    if prediction == "v":
        return -sigma * alpha, alpha
    if prediction == "score":
        return zero, -1.0 / (sigma * alpha)
    return predictions.target_coefficients(schedule, prediction, t)


def in_time(space: Coordinates, t: Tensor) -> Said:
    """At times of a flow's ODE; slope dx/dt = alpha_dot x0 + sigma_dot eps."""
    schedule, prediction = space.schedule, space.prediction
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    alpha_dot, sigma_dot = schedule.alpha_dot(t), schedule.sigma_dot(t)
    p, q, P, Q = predictions.estimates(alpha, sigma, *predictions.target_coefficients(schedule, prediction, t))
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    # Where the signal is 0 and its slope too, x is sigma eps and moves with sigma alone: no x0 is needed.
    still = (alpha == 0) & (alpha_dot == 0)
    if space.clip < math.inf:
        slope = (sigma_dot / sigma, alpha_dot - sigma_dot * alpha / sigma, zero)
    elif prediction == "velocity":
        slope = (zero, zero, one)  # m itself, without rounding
    else:
        sx = torch.where(still, sigma_dot / sigma + 0.0, alpha_dot * p + sigma_dot * P)
        slope = (sx, zero, torch.where(still, 0.0, alpha_dot * q + sigma_dot * Q))
    return Said(alpha, sigma, t, one, p, q, P, Q, *slope)


def times_of(schedule: Schedule, sigma: Tensor, *, clamp: bool = False) -> Tensor:
    """The schedule's times of noise levels sigma/alpha; ``clamp`` keeps those of a table in it."""
    if isinstance(schedule, EDMSchedule):
        return sigma
    if isinstance(schedule, DiscreteSchedule) and clamp:
        low, high = schedule.sigma_ve(torch.tensor([0, schedule.T - 1], device="cpu")).tolist()
        sigma = sigma.clamp(low, high)
    return schedule.time_of_sigma(sigma)

"""Points of the probability flow for many values of the coordinate at once, for solvers that choose their own steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffkern.samplers.nodes import Coordinates
from diffkern.schedules import predictions
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule

_LANES = 16


class Points(NamedTuple):
    """`Node`s as tensors [n]: the model is given k x and the time, x0 = p x + q m, slope = sx x + s0 x0 + sm m.

    The slope is dx/du in the coordinate u: the time of a flow, ln sigma otherwise, where it is sigma eps.
    """

    time: Tensor
    k: Tensor
    p: Tensor
    q: Tensor
    sx: Tensor
    s0: Tensor
    sm: Tensor


def points(space: Coordinates, u: Tensor) -> Points:
    """The points at u, float64 [n] on the CPU: what ``space.node`` says of each.

    An entry has the same bits whatever stands beside it: vectorised code and the scalar code for the rest of a vector
    may round differently, so u is filled up to whole vectors.
    """
    count = u.numel()
    filled = torch.cat([u, u[-1:].expand(-count % _LANES)])
    made = _in_time(space, filled) if space.in_time else _in_sigma(space, filled.exp())
    return Points(*(column[:count] for column in made))


def _in_sigma(space: Coordinates, sigma: Tensor) -> Points:
    schedule, prediction = space.schedule, space.prediction
    t = sigma if isinstance(schedule, EDMSchedule) else schedule.time_of_sigma(sigma)
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
    if isinstance(schedule, DiscreteSchedule):
        k = alpha = 1.0 / (1.0 + sigma * sigma).sqrt()
        fixed = {
            "eps": (zero, one),
            "x0": (one, zero),
            "v": (-sigma * alpha, alpha),
            "score": (zero, -1.0 / (sigma * alpha)),
        }
        u, w = fixed[prediction] if prediction in fixed else predictions.target_coefficients(schedule, prediction, t)
        p, q, P, Q = predictions.solve(alpha, sigma * alpha, u, w)
    else:
        alpha = schedule.alpha(t)
        k = alpha * schedule.input_scale(prediction, t)
        p, q, P, Q = predictions.to_x0_eps(schedule, prediction, t)
    time = schedule.model_time(prediction, t)
    if space.clip == math.inf:
        return Points(time, k, zero, zero, P * alpha * sigma, zero, Q * sigma)
    return Points(time, k, p * alpha, q, one, -one, zero)


def _in_time(space: Coordinates, t: Tensor) -> Points:
    schedule, prediction = space.schedule, space.prediction
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    if prediction == "velocity" and space.clip == math.inf:
        return Points(t, one, zero, zero, zero, zero, one)
    alpha_dot, sigma_dot = schedule.alpha_dot(t), schedule.sigma_dot(t)
    p, q, P, Q = predictions.to_x0_eps(schedule, prediction, t)
    if space.clip == math.inf:
        return Points(t, one, zero, zero, alpha_dot * p + sigma_dot * P, zero, alpha_dot * q + sigma_dot * Q)
    ratio = sigma_dot / schedule.sigma(t)
    return Points(t, one, p, q, ratio, alpha_dot - ratio * schedule.alpha(t), zero)

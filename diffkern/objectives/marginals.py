"""The exact posterior and the exact minimiser of the losses where the data are given points (lecture 003)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffkern.modes import readable
from diffkern.names import Prediction
from diffkern.schedules import predictions
from diffkern.schedules.base import as_time

if TYPE_CHECKING:
    from diffkern.schedules.base import Schedule

__all__ = ["log_joint", "marginal_prediction"]


def marginal_prediction(
    data: Tensor,
    x: Tensor,
    t: Tensor,
    schedule: Schedule,
    prediction: Prediction = "velocity",
    weights: Tensor | None = None,
) -> Tensor:
    """E[target given x_t = x] where the data are the N given points: the exact minimiser of the losses, for checks.

        u_t(x) = sum_z u_t(x given z) p_t(x given z) p(z) / p_t(x),    p_t(x given z) = N(x; alpha_t z, sigma_t^2 I)

    (lecture 003, "marginalization trick"). data [N, ...], x [B, ...], t [] or [B]; `weights` [N] are p(z), equal if not
    given. float64 [B, ...]. Of order B N D work and memory; sigma must be positive, as the fields have no density else.
    """
    share = torch.softmax(log_joint(data, x, t, schedule, weights), dim=1)
    t = as_time(t)
    alpha, sigma = (rate.reshape(-1, 1).to(x.device) for rate in (schedule.alpha(t), schedule.sigma(t)))
    u, v = (c.reshape(-1, 1).to(x.device) for c in predictions.target_coefficients(schedule, prediction, t))
    points, state = data.flatten(1).to(torch.float64), x.flatten(1).to(torch.float64)
    x0 = share @ points
    eps = (state - alpha * x0) / sigma
    return (u * x0 + v * eps).reshape(x.shape)


def log_joint(data: Tensor, x: Tensor, t: Tensor, schedule: Schedule, weights: Tensor | None = None) -> Tensor:
    """ln p(z) p_t(x given z) of every x [B, ...] and every point z of data [N, ...]: [B, N] float64, in nats.

    Its softmax over the points is the posterior of z given x, its logsumexp the marginal density ln p_t(x); arguments
    as in `marginal_prediction`, where sums of weights other than 1 are scaled.
    """
    if data.shape[1:] != x.shape[1:] or x.ndim == 0:
        raise ValueError(
            f"data [N, ...] and x [B, ...] must have one sample shape, got {list(data.shape)} and {list(x.shape)}"
        )
    prior = torch.ones(len(data), dtype=torch.float64, device="cpu") if weights is None else weights.to(torch.float64)
    if prior.shape != (len(data),):
        raise ValueError(f"weights must have shape [{len(data)}], got {list(prior.shape)}")
    t = as_time(t)
    if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x)):
        raise ValueError(f"t must have shape [] or [{len(x)}] (one time a sample), got {list(t.shape)}")
    alpha, sigma = (rate.reshape(-1, 1).to(x.device) for rate in (schedule.alpha(t), schedule.sigma(t)))
    if readable(x) and readable(sigma) and not bool((sigma > 0).all()):
        raise ValueError(f"sigma must be positive for a marginal prediction, got {sigma.min().item()}")
    points, state = data.flatten(1).to(torch.float64), x.flatten(1).to(torch.float64)
    gap = state[:, None] - alpha[..., None] * points  # [B, N, D]
    log_p = (prior / prior.sum()).log().to(x.device) - 0.5 * (gap / sigma[..., None]).square().sum(-1)
    return log_p - points.shape[1] * (0.5 * math.log(2.0 * math.pi) + sigma.log())

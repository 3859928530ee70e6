"""Training losses on fused passes: x_t is made from addresses of noise, the target and eps are never stored.

    seeds = draw_seeds(len(x0))                              # fresh int64 seeds from torch's generator
    x_t = noised(x0, t, schedule, seeds=seeds)
    loss = prediction_loss(model(x_t, t), x0, t, schedule, seeds=seeds)

`simple_loss`, `flow_matching_loss` and `edm_loss` do the three lines for a model. Every loss is a weighted mean squared
error of a prediction (eps, x0, v, score, velocity, edm) against the target u x0 + v eps that the schedule names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import ops, streams
from .schedules import DiscreteSchedule, EDMSchedule, FlowSchedule, Schedule, edm, flow

__all__ = [
    "draw_seeds",
    "drop_condition",
    "edm_loss",
    "flow_matching_loss",
    "noised",
    "prediction_loss",
    "simple_loss",
    "uniform_times",
]

Model = Callable[..., Tensor]


def draw_seeds(n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None) -> Tensor:
    """n int64 seeds from torch's generator, for one training iteration: the run repeats under torch.manual_seed."""
    device = generator.device if device is None and generator is not None else device
    return torch.randint(-(2**63), 2**63 - 1, (n,), dtype=torch.int64, device=device, generator=generator)


def uniform_times(
    n: int,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times t ~ Uniform, [n]: {0, ..., T-1} for a discrete schedule (int64), [0, 1) for a flow (float64)."""
    device = generator.device if device is None and generator is not None else device
    if isinstance(schedule, DiscreteSchedule):
        return torch.randint(0, schedule.T, (n,), generator=generator, device=device)
    if isinstance(schedule, FlowSchedule):
        return torch.rand(n, dtype=torch.float64, generator=generator, device=device)
    raise ValueError(f"schedule must be discrete or a flow for uniform times, got {schedule.name}: give its times")


def _table(schedule: Schedule, prediction: str, t: Tensor, x0: Tensor) -> tuple[Tensor, Tensor | None]:
    """(table, index) for the noising op: the schedule's own table, or one row a sample for continuous times."""
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] != x0.shape[0]):
        raise ValueError(f"t must have shape [] or [{x0.shape[0]}] (one time a sample), got {list(t.shape)}")
    if isinstance(schedule, DiscreteSchedule):
        if t.is_floating_point():
            raise ValueError(f"t must be an integer index for the schedule {schedule.name}, got dtype {t.dtype}")
        return schedule.table(prediction, x0.device), t.to(x0.device)
    return schedule.coefficients(prediction, t.reshape(-1).to(x0.device, torch.float64)), None


@lru_cache(maxsize=64)
def _plain_loss_table(schedule: DiscreteSchedule, prediction: str, device: torch.device) -> Tensor:
    return _with_weights(schedule.table(prediction, device), None)


def _with_weights(table: Tensor, weight: Tensor | None) -> Tensor:
    """Noising rows (s, n, u, v) -> loss rows (u, v, weight)."""
    rows = table.shape[0]
    if weight is not None and weight.shape != (rows,):
        raise ValueError(f"weight must have shape [{rows}], got {list(weight.shape)}")
    column = table.new_ones(rows) if weight is None else weight.to(table.device, torch.float64)
    return torch.cat([table[:, 2:], column[:, None]], dim=1)


def noised(
    x0: Tensor,
    t: Tensor,
    schedule: Schedule,
    prediction: str = "eps",
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    stream: int = streams.TRAINING,
) -> Tensor:
    """x_t = k (alpha_t x0 + sigma_t eps), with the input scale k of the prediction (1; c_in for `edm`).

    x0 [B, ...]; t [B] or []: an index for a discrete schedule, else a time; eps by address (`seeds`) or `noise`.
    Lectures 000, 001, 002: q(x_t | x_0).
    """
    table, index = _table(schedule, prediction, t, x0)
    if isinstance(schedule, EDMSchedule):
        scale = schedule.input_scale(prediction, t.reshape(-1).to(x0.device, torch.float64))
        table = torch.cat([table[:, :2] * scale[:, None], table[:, 2:]], dim=1)
    return ops.noising(x0, table, index, seeds=seeds, stream=stream, noise=noise)[0]


def prediction_loss(
    pred: Tensor,
    x0: Tensor,
    t: Tensor,
    schedule: Schedule,
    prediction: str = "eps",
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    stream: int = streams.TRAINING,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """weight_t mean (pred - target)^2, with the eps that `noised` used at the same seeds and stream.

    `weight`: float64 [T] for a discrete schedule (indexed by t), else [B]; none means 1, the L_simple of lectures 000,
    001, 002 (Ho et al. 2020, eq. 14). `reduction`: "none" [B], "mean", "sum". Differentiable in pred.
    """
    table, index = _table(schedule, prediction, t, x0)
    if weight is None and isinstance(schedule, DiscreteSchedule):
        loss_table = _plain_loss_table(schedule, prediction, x0.device)
    else:
        loss_table = _with_weights(table, weight)
    return ops.loss(pred, x0, loss_table, index, seeds=seeds, stream=stream, noise=noise, reduction=reduction)


def simple_loss(
    model: Model,
    x0: Tensor,
    t: Tensor,
    schedule: Schedule,
    prediction: str = "eps",
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    **model_kwargs: Any,
) -> Tensor:
    """L_simple: noise, call ``model(x_t, t, **model_kwargs)``, compare (lecture 002, Algorithm 1; arXiv 2006.11239).

    Without `seeds` and `noise`, fresh seeds are drawn from torch's generator. The model gets the schedule's model time
    (t itself, c_noise for `edm`) in float32, or t as int64 for a discrete schedule.
    """
    if seeds is None and noise is None:
        seeds = draw_seeds(x0.shape[0], device=x0.device)
    t = t.to(x0.device)
    x_t = noised(x0, t, schedule, prediction, seeds=seeds, noise=noise)
    time = schedule.model_time(prediction, t)
    pred = model(x_t, time.float() if time.is_floating_point() else time, **model_kwargs)
    return prediction_loss(
        pred, x0, t, schedule, prediction, seeds=seeds, noise=noise, weight=weight, reduction=reduction
    )


def flow_matching_loss(
    model: Model,
    x1: Tensor,
    t: Tensor | None = None,
    schedule: FlowSchedule | None = None,
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    reduction: str = "mean",
    **model_kwargs: Any,
) -> Tensor:
    """Conditional flow matching on the optimal-transport path (lectures 000, 003; Lipman et al. 2023, 2210.02747).

        x_t = t x1 + (1 - (1 - sigma_min) t) eps,    L = mean |model(x_t, t) - (x1 - (1 - sigma_min) eps)|^2

    x1 is the data, t in [0, 1] [B] with noise at 0 (drawn uniformly if not given). Lecture 003 drops the dots of the
    path's derivatives in its last line; the target is alpha_dot x1 + sigma_dot eps.
    """
    schedule = flow() if schedule is None else schedule
    t = uniform_times(x1.shape[0], schedule, device=x1.device) if t is None else t
    return simple_loss(
        model, x1, t, schedule, "velocity", seeds=seeds, noise=noise, reduction=reduction, **model_kwargs
    )


def edm_loss(
    model: Model,
    x0: Tensor,
    sigma: Tensor | None = None,
    schedule: EDMSchedule | None = None,
    *,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    reduction: str = "mean",
    **model_kwargs: Any,
) -> Tensor:
    """The loss of EDM (Karras et al. 2022, arXiv 2206.00364, eq. 8) for the raw network F.

        D(x, sigma) = c_skip x + c_out F(c_in x, c_noise),   L = lambda(sigma) mean |D(x0 + sigma eps, sigma) - x0|^2

    With lambda = 1 / c_out^2 this is the unweighted error of F against (x0 - c_skip x) / c_out, which is what is
    computed. sigma [B]: ln sigma ~ N(P_mean, P_std^2) if not given. The model is called as model(c_in x, c_noise).
    """
    schedule = edm() if schedule is None else schedule
    if sigma is None:
        if P_std <= 0:
            raise ValueError(f"P_std must be positive, got {P_std}")
        sigma = torch.exp(torch.randn(x0.shape[0], dtype=torch.float64, device=x0.device) * P_std + P_mean)
    return simple_loss(model, x0, sigma, schedule, "edm", seeds=seeds, noise=noise, reduction=reduction, **model_kwargs)


def drop_condition(cond: Tensor, null: Tensor | float | int, p: float, seeds: Tensor) -> Tensor:
    """Condition dropout for classifier-free guidance: sample b gets `null` with probability p (lectures 000, 002).

    cond [B, ...]; by address (stream DROPOUT), so that sample b's fate is a function of its seed. Ho and Salimans 2022.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    z = ops.randn([cond.shape[0], 1], seeds, streams.DROPOUT)
    drop = 0.5 * torch.erfc(-z / math.sqrt(2)) < p
    return torch.where(drop.reshape(-1, *(1,) * (cond.dim() - 1)), null, cond)

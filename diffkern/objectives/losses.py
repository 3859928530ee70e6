"""Training losses on fused passes: x_t is made from addresses of noise, the target and eps are never stored.

    seeds = draw_seeds(len(x0))                              # fresh int64 seeds from torch's generator
    x_t = noised(x0, t, schedule, seeds=seeds)
    loss = prediction_loss(model(x_t, t), x0, t, schedule, seeds=seeds)

`simple_loss` and `edm_loss` do the three lines for a model, on every schedule, discrete or continuous. Every loss is a
weighted mean squared error of a prediction (eps, x0, v, score, velocity, edm) against the target u x0 + v eps that the
schedule names. Weights are in `weightings`, times in `time_sampling`; `flow_matching` and `score_matching` have the
losses of those families.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkern import ops, streams
from diffkern.checks import check_level, most_in, need_model, need_tensor, unwrapped
from diffkern.draws import check_count, draw_seeds
from diffkern.modes import fakes, kept, readable
from diffkern.names import Prediction, Reduction, WeightingName
from diffkern.objectives._densities import LogNormal, Uniform
from diffkern.objectives._weighting import WeightFunction, Weighting
from diffkern.objectives.weightings import WEIGHTINGS, get_weighting
from diffkern.ops import Seeds
from diffkern.schedules.base import Schedule, Time, as_time, need_schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule
from diffkern.schedules.makers import edm
from diffkern.schedules.predictions import mixtures, prediction_of

__all__ = [
    "draw_seeds",
    "drop_condition",
    "edm_loss",
    "noised",
    "prediction_loss",
    "simple_loss",
    "uniform_times",
]

Model = Callable[..., Tensor]
Weight = WeightingName | Weighting | WeightFunction | Tensor
"""What the losses take as `weight`; see `prediction_loss`."""

UNIFORM = WEIGHTINGS["uniform"]
_IMMUTABLE = {type(weighting) for weighting in WEIGHTINGS.values()}


def uniform_times(
    n: int,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times t ~ Uniform, [n]: {0, ..., T-1} for a discrete schedule (int64), else its time range (float64).

    `diffkern.objectives.time_sampling` has the other densities, and all of them by address.
    """
    check_count(n)
    device = generator.device if device is None and generator is not None else device
    if isinstance(schedule, DiscreteSchedule):
        return torch.randint(0, schedule.T, (n,), generator=generator, device=device)
    return Uniform().sample(n, schedule, generator=generator, device=device)


def _times(t: Time) -> Tensor:
    """The times as a tensor: numbers, lists and NumPy's arrays mean what they say."""
    if isinstance(t, Tensor):
        return t
    try:
        return as_time(t)
    except (RuntimeError, TypeError, ValueError):
        got = type(t).__name__
        raise ValueError(f"t must be a time or one a sample, got {got}: are the arguments in another order?") from None


def _placed(t: Tensor, schedule: Schedule, x0: Tensor) -> Tensor:
    """The times on the device of x0: the index into the table of a discrete schedule, else float64 [B] or [1]."""
    need_tensor("x0", x0)
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] != x0.shape[0]):
        raise ValueError(f"t must have shape [] or [{x0.shape[0]}] (one time a sample), got {list(t.shape)}")
    if isinstance(schedule, DiscreteSchedule):
        if t.is_floating_point():
            raise ValueError(f"t must be an integer index for the schedule {schedule.name}, got dtype {t.dtype}")
        return t.to(x0.device)
    need_schedule(schedule)
    return as_time(t).reshape(-1).to(x0.device, torch.float64)


def _rows(
    u: Tensor,
    v: Tensor,
    schedule: Schedule,
    prediction: Prediction,
    target: Prediction | None,
    weighting: Weighting,
    t: Tensor,
) -> Tensor:
    """Loss rows (u, v, weight) at the times ``t``."""
    if weighting is UNIFORM and target in (None, prediction):
        return torch.stack([u, v, torch.ones_like(u)], dim=1)
    return torch.stack([u, v, weighting.at(schedule, prediction, t, target).to(u.device)], dim=1)


def _discrete_rows(
    schedule: DiscreteSchedule,
    prediction: Prediction,
    target: Prediction | None,
    weighting: Weighting,
    device: torch.device,
) -> Tensor:
    """Loss rows of t = 0..T-1."""
    _, _, u, v = schedule.table(prediction, device).unbind(1)
    return _rows(u, v, schedule, prediction, target, weighting, torch.arange(schedule.T, device="cpu"))


_kept_rows = kept(64)(_discrete_rows)


@kept(64)
def _all_hold(
    schedule: DiscreteSchedule,
    prediction: Prediction,
    target: Prediction | None,
    weighting: Weighting,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    rows = _kept_rows(schedule, prediction, target, weighting, device)
    return bool(torch.isfinite(rows).all() & (rows[:, :2].abs() <= most_in(dtype)).all())


def _loss_table(
    schedule: Schedule,
    prediction: Prediction,
    target: Prediction | None,
    weight: Weight | None,
    t: Tensor,
    x0: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """(table, index) for the loss op: a weighting, a table and the change of space all go into the row's weight."""
    at = _placed(t, schedule, x0)
    if isinstance(schedule, DiscreteSchedule):
        schedule.table(prediction, x0.device)  # raises where the schedule does not have the prediction
    else:
        _, _, u, v = mixtures(schedule, prediction, at)
    prediction = prediction_of(schedule, prediction)
    target = None if target is None else prediction_of(schedule, target)
    weighting = UNIFORM if weight is None or isinstance(weight, Tensor) else get_weighting(weight)
    index, holds = None, False
    if isinstance(schedule, DiscreteSchedule):
        index = at
        # Ours are immutable; what a user's own weighting returns may change from call to call. torch.compile can not
        # hand an object that was made in what it compiles to a function that it does not trace.
        keeps = type(weighting) in _IMMUTABLE and fakes(x0.device) is None
        keeps = keeps and not (torch.compiler.is_compiling() and isinstance(weight, Weighting))
        known = schedule, prediction, target, weighting, x0.device
        rows = _kept_rows(*known) if keeps else _discrete_rows(*known)
        holds = keeps and readable(rows) and _all_hold(*known, dtype)
    else:
        rows = _rows(u, v, schedule, prediction, target, weighting, at)
    if isinstance(weight, Tensor):
        rows = torch.cat([rows[:, :2], rows[:, 2:] * _checked(weight, len(rows)).to(rows.device)[:, None]], dim=1)
    if readable(rows) and readable(t) and not holds:
        what = f"target {target!r}" if weight is None or isinstance(weight, Tensor) else f"weight {weighting.name!r}"
        t = t.reshape(-1)
        _check_rows(rows if index is None else rows[t.clamp(0, len(rows) - 1)], t, what, schedule, prediction, dtype)
    return rows, index


def _check_rows(
    rows: Tensor, t: Tensor, what: str, schedule: Schedule, prediction: Prediction, dtype: torch.dtype
) -> None:
    """Raise ValueError for a target that the prediction's dtype does not hold, or a weight that is not finite."""
    most = most_in(dtype)
    if rows.numel() > 0:
        least, greatest = torch.aminmax(rows.detach())  # a quarter of the cost of finding what is wrong
        if -most <= least.item() and greatest.item() <= most:
            return
    limit = torch.tensor([most, most, torch.finfo(torch.float64).max], dtype=torch.float64, device="cpu")
    bad = ~(rows.abs() <= limit)
    if not bool(bad.any()):
        return
    i, column = (int(n) for n in bad.nonzero()[0])
    u, v, weight = rows[i].tolist()
    at = f"at t = {t[i].item()}"
    if column == 2:
        raise ValueError(f"{what} must give prediction {prediction!r} a finite weight, got {weight} {at}")
    narrow = str(dtype).removeprefix("torch.")
    low, high = schedule.time_range
    remedy = f"train inside time_range, {low:g} to {high:g}"
    if math.isfinite(u) and math.isfinite(v):
        remedy += " or in " + ("bfloat16 or float32" if dtype == torch.float16 else "float64")
    raise ValueError(
        f"prediction {prediction!r} must have a target u x0 + v eps with u and v of at most {most_in(dtype):.4g} in "
        f"{narrow}, got u = {u:g} and v = {v:g} {at} of {schedule.name}: {remedy}"
    )


def _checked(weight: Tensor, rows: int) -> Tensor:
    """A user's weights as a float64 column; their values are looked at on the CPU."""
    if weight.shape != (rows,):
        raise ValueError(f"weight must have shape [{rows}], got {list(weight.shape)}")
    weight = weight.to(torch.float64)
    bad = ~(torch.isfinite(weight) & (weight >= 0))
    if readable(weight) and bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(f"weight must be finite and not negative, got weight[{i}] = {float(weight[i])}")
    return weight


def noised(
    x0: Tensor,
    t: Time,
    schedule: Schedule,
    prediction: Prediction = "eps",
    *,
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    stream: int = streams.TRAINING,
) -> Tensor:
    """x_t = k (alpha_t x0 + sigma_t eps), with the input scale k of the prediction (1; c_in for `edm`).

    x0 [B, ...]; t [B], [] or a number: an index for a discrete schedule, else a time; eps by address (`seeds`)
    or `noise`.
    Lectures 000, 001, 002: q(x_t | x_0).
    """
    t = _times(t)
    at = _placed(t, schedule, x0)
    if isinstance(schedule, DiscreteSchedule):
        table, index = schedule.table(prediction, x0.device), at
    else:
        table, index = schedule.coefficients(prediction, at), None
    if isinstance(schedule, EDMSchedule):
        scale = schedule.input_scale(prediction, at)
        table = torch.cat([table[:, :2] * scale[:, None], table[:, 2:]], dim=1)
    if x0.dtype == torch.float16 and index is None and readable(table):
        check_level(float(table[:, :2].detach().abs().max()), x0.dtype, f"sigma of {schedule.name}")
    return ops.noising(x0, table, index, seeds=seeds, stream=stream, noise=noise)[0]


def prediction_loss(
    pred: Tensor,
    x0: Tensor,
    t: Time,
    schedule: Schedule,
    prediction: Prediction = "eps",
    *,
    target: Prediction | None = None,
    weight: Weight | None = None,
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    stream: int = streams.TRAINING,
    reduction: Reduction = "mean",
) -> Tensor:
    """weight_t mean (error)^2 of `pred`, with the eps that `noised` used at the same seeds and stream.

    The error is that of the `prediction` itself, |pred - target|, or measured in another space: with
    ``prediction="v", target="x0"`` it is that of the x0 which the v implies, which differs only by a factor of t
    (`diffkern.objectives.weightings.fold`), so that it costs nothing.

    `weight`: a name or a `Weighting` of `weightings`, the same loss whatever the prediction and the target; a
    function weight(log_snr, prediction) or float64 numbers, [T] for a discrete schedule (indexed by t) or [B], which
    multiply the error in the target's space. None means 1, for ``eps`` the L_simple of Ho et al. 2020, eq. 14
    (lectures 000, 001, 002). On the CPU a weight that is not finite at one of the times raises ValueError.

    `reduction`: "none" [B], "mean", "sum". Differentiable in pred. One fused pass each way, whatever the options.
    """
    table, index = _loss_table(schedule, prediction, target, weight, _times(t), x0, pred.dtype)
    return ops.loss(pred, x0, table, index, seeds=seeds, stream=stream, noise=noise, reduction=reduction)


def simple_loss(
    model: Model,
    x0: Tensor,
    t: Time,
    schedule: Schedule,
    prediction: Prediction = "eps",
    *,
    target: Prediction | None = None,
    weight: Weight | None = None,
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    reduction: Reduction = "mean",
    **model_kwargs: Any,
) -> Tensor:
    """L_simple: noise, call ``model(x_t, t, **model_kwargs)``, compare (arXiv 2006.11239; lecture 002, Algorithm 1).

    With `target` and `weight` (see `prediction_loss`) any weighted L_t. Without `seeds` and `noise`, fresh seeds are
    drawn from torch's generator. The model gets the schedule's model time (t itself, c_noise for `edm`) in float32, or
    t as int64 for a discrete schedule.
    """
    need_model(model)
    need_tensor("x0", x0)
    need_schedule(schedule)
    if seeds is None and noise is None:
        seeds = draw_seeds(x0.shape[0], device=x0.device)
    elif seeds is not None and not isinstance(seeds, Tensor):
        seeds = ops.as_seeds(seeds, x0.shape[0], x0.device)
    t = _times(t).to(x0.device)
    x_t = noised(x0, t, schedule, prediction, seeds=seeds, noise=noise)
    time = schedule.model_time(prediction, t)
    pred = unwrapped(model(x_t, time.float() if time.is_floating_point() else time, **model_kwargs))
    return prediction_loss(
        pred,
        x0,
        t,
        schedule,
        prediction,
        target=target,
        weight=weight,
        seeds=seeds,
        noise=noise,
        reduction=reduction,
    )


def edm_loss(
    model: Model,
    x0: Tensor,
    sigma: Tensor | None = None,
    schedule: EDMSchedule | None = None,
    *,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    seeds: Seeds | None = None,
    noise: Tensor | None = None,
    reduction: Reduction = "mean",
    **model_kwargs: Any,
) -> Tensor:
    """The loss of EDM (Karras et al. 2022, arXiv 2206.00364, eq. 8) for the raw network F.

        D(x, sigma) = c_skip x + c_out F(c_in x, c_noise),   L = lambda(sigma) mean |D(x0 + sigma eps, sigma) - x0|^2

    With lambda = 1 / c_out^2 this is the unweighted error of F against (x0 - c_skip x) / c_out, which is what is
    computed. sigma [B]: ln sigma ~ N(P_mean, P_std^2) if not given, by address where `seeds` are. The model is called
    as model(c_in x, c_noise).
    """
    schedule = edm() if schedule is None else schedule
    if not 0 < P_std < math.inf:
        raise ValueError(f"P_std must be positive, got {P_std}")
    if sigma is None:
        sigma = LogNormal(P_mean, P_std).sample(x0.shape[0], seeds=seeds, device=x0.device)
    return simple_loss(model, x0, sigma, schedule, "edm", seeds=seeds, noise=noise, reduction=reduction, **model_kwargs)


def drop_condition(cond: Tensor, null: Tensor | float | int, p: float, seeds: Seeds) -> Tensor:
    """Condition dropout for classifier-free guidance: sample b gets `null` with probability p (lectures 000, 002).

    cond [B, ...], null of one sample [...] or of each, [B, ...] (not of cond [B], where it would be taken for one);
    by address (stream DROPOUT), so that sample b's fate is a function of its seed. Ho and Salimans 2022.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    one = tuple(null.shape) if isinstance(null, Tensor) else ()
    of_each = cond.dim() > 1 and one == tuple(cond.shape)
    fits = all(n in (1, m) for n, m in zip(one[::-1], tuple(cond.shape)[::-1], strict=False))
    if not of_each and (len(one) >= cond.dim() or not fits):
        raise ValueError(f"cond must have the shape {['B', *one]} of its null, got {list(cond.shape)}")
    z = ops.randn([cond.shape[0], 1], ops.as_seeds(seeds, len(cond), cond.device), streams.DROPOUT)
    drop = 0.5 * torch.erfc(-z / math.sqrt(2)) < p
    return torch.where(drop.reshape(-1, *(1,) * (cond.dim() - 1)), null, cond)

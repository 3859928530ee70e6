"""What must fit together: the network's time and the schedule's, a plan and the model, the data and the noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.checks import need_tensor
from diffkern.modes import neutral, real, untraced
from diffkern.names import Prediction
from diffkern.parallel import bare
from diffkern.plan import Plan
from diffkern.schedules import predictions
from diffkern.schedules.base import Schedule, UnitTime
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule

EMBEDDED = 1000.0
"""The range of times that sinusoidal embeddings are made for: the steps of Ho et al. 2020."""
LARGEST_RANGE = 20.0 * EMBEDDED
LOUD, FAINT = 4.0, 0.01
"""Root mean squares of data between which the noise levels of the schedules have a meaning."""
TOLERANCE = 1e-2
"""Relative difference of a plan's coefficients from the schedule's: other libraries' float32 tables differ by 3e-4."""


def null_of(model: nn.Module, null: float | Tensor | None, drop: float) -> Tensor | None:
    """The condition that means none: the one given, or that of a network with classes or with tokens of a text."""
    network = bare(model)
    if null is None and getattr(network, "classes", None) is not None:
        null = getattr(network, "null_class", None)
    elif null is None:
        own = getattr(network, "null", None)
        null = own if isinstance(own, Tensor) and own.dtype == torch.int64 else None  # no learned vector of its own
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"drop must lie in [0, 1), got {drop}")
    if drop > 0.0 and null is None:
        raise ValueError(f"null must be given, the condition that means none, where some are dropped, got drop={drop}")
    return None if null is None else torch.as_tensor(null)


def shape_of(model: nn.Module, shape: Sequence[int] | None) -> tuple[int, ...] | None:
    """The shape of a sample: the one given, or that of a network that says its own."""
    if shape is not None:
        return tuple(int(size) for size in shape)
    config = getattr(bare(model), "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "image_size", None)
    sides = (size, size) if isinstance(size, int) else size
    return (channels, *sides) if isinstance(channels, int) and isinstance(sides, tuple) else None


def time_scale(model: nn.Module, schedule: Schedule, prediction: Prediction, given: float | None) -> float:
    """What the schedule's model times are multiplied by for the network; see `Diffusion`."""
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0.0 < given < math.inf:
            raise ValueError(f"time_scale must be a positive number, got {given!r}")
        return float(given)
    own = getattr(getattr(bare(model), "config", None), "time_scale", None)
    if not isinstance(own, int | float):
        return 1.0
    if isinstance(schedule, DiscreteSchedule):
        if own * schedule.T > LARGEST_RANGE:
            raise ValueError(
                f"the network multiplies its times by config.time_scale = {own:g}, which is meant for times in [0, 1], "
                f"and the times of {schedule.name} are 0..{schedule.T - 1}: make it with time_scale=1 (or give "
                "Diffusion a time_scale= of your own)"
            )
        return 1.0
    if isinstance(schedule, UnitTime):
        return EMBEDDED / own
    with neutral():
        ends = schedule.model_time(prediction, torch.tensor(schedule.time_range, dtype=torch.float64))
        return EMBEDDED / (own * float((ends[1] - ends[0]).abs()))


@untraced
def check_plan(plan: Plan, schedule: Schedule, prediction: Prediction) -> None:
    """Raise ValueError for a plan that was made for another prediction or on another schedule; looked at once."""
    key = "fits", schedule, prediction
    if key not in plan.cache:
        with neutral():
            _check_plan(plan, schedule, prediction)
        plan.cache[key] = True


def _check_plan(plan: Plan, schedule: Schedule, prediction: Prediction) -> None:
    if plan.prediction != prediction:
        raise ValueError(
            f"plan {plan.name} must be made for the model's prediction {prediction!r}, got one for "
            f"{plan.prediction!r}: make it with prediction={prediction!r}, or give the sampler by its name"
        )
    remedy = f"make it on the model's schedule {schedule.name}, or give the sampler by its name"
    rows = [row for row in plan.rows if row.calls_model]
    times = torch.tensor([row.time for row in rows], dtype=torch.float64)
    t, ok = _schedule_times(times, schedule, prediction)
    if not bool(ok.all()):
        raise ValueError(
            f"plan {plan.name} must give the model times of {schedule.name}, got {float(times[~ok][0]):g}: {remedy}"
        )
    checked = [i for i, row in enumerate(rows) if row.q != 0.0 and math.isfinite(row.q) and not math.isnan(float(t[i]))]
    if not checked:
        return
    at = t[checked].to(torch.int64) if isinstance(schedule, DiscreteSchedule) else t[checked]
    try:
        u, v = predictions.target_coefficients(schedule, prediction, at)
    except ValueError:  # a row at an end where the prediction has no value, which samplers treat by themselves
        return
    expected = predictions.solve(schedule.alpha(at), schedule.sigma(at), u, v)[1]
    found = torch.tensor([rows[i].q for i in checked], dtype=torch.float64)
    wrong = expected.isfinite() & ((found - expected).abs() > TOLERANCE * expected.abs())
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"plan {plan.name} must fit the schedule {schedule.name}, got a row at time {float(times[checked[i]]):g} "
            f"that reads the model times {float(found[i]):.6g} instead of {float(expected[i]):.6g}: {remedy}"
        )


def _schedule_times(times: Tensor, schedule: Schedule, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(the schedule's times of these model times, NaN where not compared; whether the schedule has them)."""
    if isinstance(schedule, DiscreteSchedule):
        kept = schedule.kept.to(torch.float64)
        index = torch.searchsorted(kept, times).clamp(max=len(kept) - 1)
        return torch.where(kept[index] == times, index.to(torch.float64), torch.nan), (times >= 0) & (times <= kept[-1])
    if isinstance(schedule, EDMSchedule):
        t = (4.0 * times).exp() if prediction == "edm" else times
        return t, torch.isfinite(t) & (t >= 0)
    return times, (times >= 0) & (times <= 1)


def check_data(x0: Any) -> bool:
    """Raise ValueError for what are no images as floating-point numbers; warn where their range is far from [-1, 1].

    Returns whether the values could be looked at: not in a graph, nor under a transform of torch.func.
    """
    need_tensor("x0", x0)
    if not x0.is_floating_point():
        raise ValueError(
            f"x0 must be floating point in about [-1, 1], got {x0.dtype}: scale images of bytes by x0 / 127.5 - 1"
        )
    if x0.numel() == 0 or not real(x0):
        return False
    size = float(x0.detach().to(torch.float32).square().mean().sqrt())
    if size > LOUD or 0.0 < size < FAINT:
        warnings.warn(
            f"x0 should lie in about [-1, 1], or have a standard deviation of about 1, for the noise to have its "
            f"meaning; its root mean square is {size:.3g}: scale it (images of 0..255 by x0 / 127.5 - 1)",
            stacklevel=4,
        )
    return True


def shape_wanted(n: int | Sequence[int], own: tuple[int, ...] | None) -> tuple[int, ...]:
    """The whole shape [B, ...] of n samples of the shape ``own``, or n itself where it is one."""
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        if isinstance(n, bool | str) or not isinstance(n, Sequence):
            raise ValueError(f"n must be a number of samples or a whole shape [B, ...], got {n!r}")
        return tuple(int(size) for size in n)
    if own is None:
        raise ValueError(
            f"n must be a whole shape [B, ...] for a network that does not say its own, got {n!r}: or "
            "make Diffusion with shape="
        )
    return int(n), *own

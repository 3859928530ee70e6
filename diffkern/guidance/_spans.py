"""Guidance in a limited interval: which model times lie in it, without waiting for a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffkern.names import Prediction
from diffkern.plan import Plan
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.predictions import prediction_of


def number(t: Any, device: torch.device | str) -> Tensor:
    """A time that is no tensor, as one; a float in float32, whatever the default dtype."""
    return torch.tensor(t, dtype=torch.float32 if isinstance(t, float) else None, device=device)


@dataclass(frozen=True)
class TimeSpan:
    """The model times low <= t <= high; float32 numbers, or whole ones where the times are."""

    low: float
    high: float

    def contains(self, t: Tensor) -> Tensor:
        """bool in the shape of ``t``, on its device."""
        if t.is_floating_point():
            t = t.to(torch.float32)  # the dtype that plans give models; a float64 end would be off by its rounding
            return (t >= self.low) & (t <= self.high)
        inside = torch.ones_like(t, dtype=torch.bool)
        if math.isfinite(self.low):
            inside &= t >= math.ceil(self.low)
        return inside & (t <= math.floor(self.high)) if math.isfinite(self.high) else inside

    def holds(self, t: float) -> bool:
        """`contains` of one number."""
        return bool(self.contains(number(t, "cpu")))


class Locator:
    """Where a model time stands: True or False if that is known for the whole batch, else bool [B] on its device.

    Times on the CPU are simply read. On a device, a row of a [R, n] tensor of times, as `sample` has one, is looked up
    in a copy that is read once a run; others are compared there, and nothing is read.
    """

    def __init__(self, span: TimeSpan | None) -> None:
        self.span = span
        self._times: Tensor | None = None
        self._version = -1
        self._rows: list[bool | None] = []

    def __call__(self, t: Any) -> bool | Tensor:
        if self.span is None:
            return True
        if not isinstance(t, Tensor):
            return self.span.holds(t)
        if not torch.compiler.is_compiling():
            found = self.in_rows(t) if t.device.type != "cpu" else _same(self.span.contains(t))
            if found is not None:
                return found
        return self.span.contains(t)

    def in_rows(self, t: Tensor) -> bool | None:
        """The answer for ``t`` that is a row of a matrix of times, None if it is not or if the row's times differ."""
        assert self.span is not None
        times = t._base
        if times is None or times.ndim != 2 or t.ndim != 1 or t.shape[0] == 0 or not times.is_contiguous():
            return None
        row, first = divmod(int(t.storage_offset()) - int(times.storage_offset()), times.shape[1])
        if t.stride(0) != 1 or first + t.shape[0] > times.shape[1]:
            return None
        if times is not self._times or times._version != self._version:
            if times.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            inside = self.span.contains(times).tolist()
            self._rows = [values[0] if len(set(values)) == 1 else None for values in inside]
            self._times, self._version = times, times._version
        return self._rows[row]


def time_span(
    interval: tuple[float, float] | None,
    sigma_interval: tuple[float, float] | None,
    plan: Plan | None,
    schedule: Schedule | None,
    prediction: Prediction | None,
) -> TimeSpan | None:
    """The span of either kind of interval; None for neither."""
    if interval is None and sigma_interval is None:
        return None
    if interval is not None and sigma_interval is not None:
        raise ValueError(f"give interval or sigma_interval, not both, got {interval} and {sigma_interval}")
    if interval is not None:
        if plan is None:
            raise ValueError(f"interval counts the steps of a plan: give plan=, got interval={interval} without plan")
        return steps_span(plan, interval)
    assert sigma_interval is not None
    if schedule is None:
        raise ValueError(
            f"sigma_interval needs the schedule that has these noise levels: give schedule=, got {sigma_interval}"
        )
    if prediction is None and plan is not None:
        prediction = plan.prediction
    return sigma_span(schedule, sigma_interval, prediction_of(schedule, prediction))


def steps_span(plan: Plan, interval: tuple[float, float]) -> TimeSpan:
    """From the time of step floor(start S) up to, but without, that of step floor(stop S), of a plan of S steps.

    A step's further model calls (Heun's second, a midpoint) count by their own time, so guidance depends on the time
    alone. Raises ValueError if that cannot tell the steps apart (Langevin steps at one level, jumps back in time).
    """
    start, stop = _pair("interval", interval)
    if not 0.0 <= start < stop <= 1.0:
        raise ValueError(f"interval must be fractions of the steps, 0 <= start < stop <= 1, got {interval}")
    steps = len(plan.steps)
    first, last = (math.floor(part * steps + 1e-9) for part in (start, stop))  # 0.29 of 100 steps is 29
    if first == last:
        raise ValueError(f"interval must hold at least one of the {steps} steps of {plan.name}, got {interval}")
    times = [plan.rows[rows.start].time for rows in plan.steps]
    falling = times[0] > times[-1]
    integer = plan.time_dtype == "int64"
    begin = -math.inf if first == 0 else _closed(times[first], falling, True, integer)
    end = math.inf if last == steps else _closed(times[last], not falling, False, integer)
    if falling:
        begin, end = (-begin if first == 0 else begin), (-end if last == steps else end)
    span = TimeSpan(end, begin) if falling else TimeSpan(begin, end)
    for i, time in enumerate(times):
        if span.holds(time) != (first <= i < last):
            raise ValueError(
                f"interval must not end between steps of one time or a time passed twice, got {interval} for "
                f"{plan.name}, whose step {i} is at t={time:g}: give sigma_interval"
            )
    return span


def sigma_span(schedule: Schedule, interval: tuple[float, float], prediction: Prediction) -> TimeSpan:
    """The times of the levels low < sigma/alpha <= high of a schedule (arXiv 2404.07724); high may be inf."""
    low, high = _pair("sigma_interval", interval)
    if not 0.0 <= low < high:
        raise ValueError(f"sigma_interval must be noise levels, 0 <= low < high, got {interval}")
    quietest, noisiest = (
        float((-0.5 * schedule.log_snr(end)).exp()) for end in (schedule.data_end, schedule.noise_end)
    )
    if high < quietest or low >= noisiest:
        raise ValueError(
            f"sigma_interval must hold levels of the schedule, {quietest:.6g}..{noisiest:.6g}, got {interval}"
        )
    rising = schedule.direction > 0
    lower = -math.inf if rising else math.inf
    upper = -lower
    if low > 0.0 and low >= quietest:
        lower = _closed(_model_time(schedule, low, prediction), not rising, False, False)
    if high < noisiest:
        upper = _closed(_model_time(schedule, high, prediction), rising, True, False)
    return TimeSpan(min(lower, upper), max(lower, upper))


def _model_time(schedule: Schedule, sigma: float, prediction: Prediction) -> float:
    t = schedule.time_of_log_snr(-2.0 * math.log(sigma))
    if isinstance(schedule, DiscreteSchedule):
        t = torch.where(t.abs() < 1e-6, 0.0, t)  # the first level exactly
        if t < 0:  # between clean data and the first level, where no model is called
            return float(t)
    return float(schedule.model_time(prediction, t))


def _closed(bound: float, upper: bool, included: bool, integer: bool) -> float:
    """The last time on the inner side of ``bound``: itself if it is included, else its neighbour among the times."""
    if integer:
        return bound if included else bound + (-1.0 if upper else 1.0)
    value, towards = torch.tensor([bound, -math.inf if upper else math.inf], dtype=torch.float32, device="cpu")
    return float(value if included else torch.nextafter(value, towards))


def _pair(name: str, interval: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two numbers, got {interval!r}") from None
    return low, high


def _same(inside: Tensor) -> bool | None:
    """Whether all samples are inside, or none is; None if they differ."""
    if inside.numel() == 0 or bool(inside.all()):
        return True
    return None if bool(inside.any()) else False

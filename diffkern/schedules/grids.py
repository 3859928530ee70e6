"""Grids for samplers: times of a table, noise levels, shifts of flow models. All float64, from noise to data.

| spacing | rule | gives |
|---|---|---|
| ``leading``, ``trailing``, ``linspace`` | `spaced_timesteps` | whole times of a table |
| ``karras`` | `karras_sigmas`: even in sigma^(1/rho) | noise levels |
| ``log_snr``, ``exponential`` | `exponential_sigmas`: even in ln sigma, so in log-SNR ("lu lambdas") | noise levels |
| ``polyexponential`` | `polyexponential_sigmas`: even steps to the power rho in ln sigma | noise levels |
| ``beta`` | `beta_sigmas`: quantiles of Beta(0.6, 0.6) (needs scipy) | noise levels |
| | `vp_sigmas`: even in the time of the VP SDE | noise levels |
| | `flow_sigmas`, with `shifted`, `dynamically_shifted`, `stretched` | levels 1 - t of a flow |

A noise level is sigma/alpha, the sigma of the state x/alpha. `levels` lays a spacing over a schedule's own range, and
`times` and `whole_times` are the times of such levels, so that any spacing goes with any schedule:

    ddim(schedule, 20, spacing="karras")                      # whole times nearest to the levels
    euler(schedule, 20, spacing="log_snr")                    # the levels themselves, at fractional times
    euler(edm(), sigmas=exponential_sigmas(20, 0.002, 80.0))
    euler(flow(), timesteps=1.0 - flow_sigmas(20, shift=3.0))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from diffkern.checks import unknown
from diffkern.names import LevelSpacing, Spacing, TableSpacing
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule
from diffkern.schedules.spacings import (
    SHIFTS,
    beta_sigmas,
    dynamically_shifted,
    exponential_sigmas,
    flow_sigmas,
    karras_sigmas,
    polyexponential_sigmas,
    resolution_mu,
    shifted,
    stretched,
    vp_sigmas,
)
from diffkern.schedules.timesteps import SPACINGS, Numbers, check_steps, check_timesteps, linspace, spaced_timesteps

__all__ = [
    "LEVELS",
    "SHIFTS",
    "SPACINGS",
    "Numbers",
    "beta_sigmas",
    "check_spacing",
    "check_steps",
    "check_timesteps",
    "dynamically_shifted",
    "exponential_sigmas",
    "flow_sigmas",
    "karras_sigmas",
    "levels",
    "linspace",
    "polyexponential_sigmas",
    "resolution_mu",
    "shifted",
    "spaced_timesteps",
    "stretched",
    "table_times",
    "times",
    "vp_sigmas",
    "whole_times",
]

LEVELS: dict[str, Callable[..., Tensor]] = {
    "karras": karras_sigmas,
    "log_snr": exponential_sigmas,
    "exponential": exponential_sigmas,
    "polyexponential": polyexponential_sigmas,
    "beta": beta_sigmas,
}
"""Spacings of noise levels by name: function(n, sigma_min, sigma_max, **options) gives n levels and a final 0."""


def check_spacing(spacing: str) -> Spacing:
    """``spacing`` if it is known; raises ValueError with the known ones."""
    if spacing not in SPACINGS and spacing not in LEVELS:
        raise ValueError(unknown("spacing", spacing, [*SPACINGS, *LEVELS]))
    return cast(Spacing, spacing)


def levels(
    schedule: Schedule,
    n: int,
    spacing: LevelSpacing = "log_snr",
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    **options: Any,
) -> Tensor:
    """n noise levels sigma/alpha of a schedule and a final 0, [n + 1], by a spacing of `LEVELS`.

    The range is the schedule's own (`Schedule.time_range`) where sigma_min and sigma_max do not say otherwise; an end
    whose level is infinite or 0, such as a flow's, has to be given. ``options`` go to the spacing: rho; a and b.
    An EDM schedule's rho is used for ``karras``.
    """
    if spacing not in LEVELS:
        raise ValueError(f"spacing must be one of {', '.join(LEVELS)} for noise levels, got {spacing!r}")
    near, far = schedule.time_range[:: 1 if schedule.direction > 0 else -1]
    ends = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    for argument, t in (("sigma_min", near), ("sigma_max", far)):
        if ends[argument] is None:
            level = float(schedule.sigma_ve(t))
            if not 0.0 < level < math.inf:
                raise ValueError(f"{argument} must be given for {schedule.name}, whose own is {level:g}")
            ends[argument] = level
    if spacing == "karras" and isinstance(schedule, EDMSchedule):
        options = {"rho": schedule.rho, **options}
    return LEVELS[spacing](n, **ends, **options)


def times(schedule: Schedule, n: int, spacing: LevelSpacing = "log_snr", **options: Any) -> Tensor:
    """The n times of a schedule that have the noise levels of `levels`, [n], from noise to data, the final 0 left out.

    Fractional for a table (by `DiscreteSchedule.time_of_sigma`). A sampler on a flow also takes the end, which to add.
    """
    return schedule.time_of_sigma(levels(schedule, n, spacing, **options)[:-1])


def table_times(
    schedule: DiscreteSchedule, steps: int | None, timesteps: Iterable[float] | None, spacing: Spacing = "leading"
) -> list[int]:
    """The table entries a discrete sampler visits: ``steps`` of them by `whole_times`, or the ``timesteps`` given."""
    if timesteps is not None:
        if steps is not None:
            raise ValueError(f"give steps or timesteps, not both, got steps={steps} and timesteps")
        return check_timesteps(schedule.T, timesteps)
    assert steps is not None
    return whole_times(schedule, steps, spacing)


def whole_times(schedule: DiscreteSchedule, n: int, spacing: Spacing = "log_snr", **options: Any) -> list[int]:
    """n different entries of a table, from noise to data: by `spaced_timesteps`, or the ones nearest to `levels`.

    Levels that are closer than the table is fine share a nearest entry; all but the last such then move on to the next
    free one towards the noise (other libraries visit one entry several times). Ties round to even.
    """
    n = check_steps(n, schedule.T)
    if check_spacing(spacing) in SPACINGS:
        return spaced_timesteps(schedule.T, n, cast(TableSpacing, spacing), **options)
    rounded = torch.round(times(schedule, n, cast(LevelSpacing, spacing), **options)).to(torch.int64).tolist()
    chosen: list[int] = []
    for i, t in enumerate(reversed(rounded)):
        lowest = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(t, lowest), schedule.T - n + i))
    return chosen[::-1]

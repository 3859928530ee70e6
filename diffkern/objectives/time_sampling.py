"""Random training times: densities with their exact values, from torch's generator or by address.

    sampler = get_time_sampler("logit_normal", mean=0.0, std=1.0)
    t = sampler.sample(len(x0), schedule)                     # torch's generator
    t = sampler.sample(len(x0), schedule, seeds=seeds)        # by address (stream TIME), one seed a sample
    p = sampler.density(t, schedule)                          # probability of t (discrete) or density in t

Every sampler is its quantile function applied to uniform numbers, so every sampler can be stratified: one offset a
batch, u_i = (i + offset)/B, which is Kingma et al.'s low-discrepancy sampler (arXiv 2107.00630, appendix I).

| name | axis | density | source |
|---|---|---|---|
| ``uniform`` | share of the way | 1 on [low, high] | lectures 000, 001, 002, 003 |
| ``stratified`` | share of the way | the same, evenly spread over the batch | arXiv 2107.00630 |
| ``logit_normal`` | share of the way | N(logit t; mean, std^2)/(t (1-t)) | arXiv 2403.03206, section 3.1 |
| ``mode`` | share of the way | 1/q'(u), t = q(u) = u - s (sin^2(pi u/2) - u) | the same |
| ``cosmap`` | share of the way | 2/(pi (1 - 2t + 2t^2)) | the same |
| ``log_normal`` | sigma/alpha | N(ln sigma; mean, std^2)/sigma | arXiv 2206.00364, table 1 |
| ``loss_second_moment`` | index | ~ sqrt(mean of the last losses^2), see `LossSecondMoment` | arXiv 2102.09672 |

"Share of the way" is 0 at the data and 1 at the noise, as in those papers, whichever way a schedule's time runs:
t = floor(T share) for a discrete schedule, and linear from the data's end of `Schedule.time_range` to the noise's for
a continuous one. A density over noise levels meets a schedule at its sigma/alpha: the nearest level of a discrete one,
and the part of the density inside the range of a continuous one. None of the losses divides by these densities: a time
density is a weighting too, and the field uses it as such. `TimeSampler.weights` gives 1/p where the expectation under
uniform times is wanted, which importance resampling needs.
"""

from __future__ import annotations

from collections.abc import Callable

from diffkern.checks import unknown
from diffkern.objectives._densities import CosMap, LogitNormal, LogNormal, Mode, Uniform, stratified
from diffkern.objectives._resampling import LossSecondMoment
from diffkern.objectives._time_sampler import TimeSampler

__all__ = [
    "TIME_SAMPLERS",
    "CosMap",
    "LogNormal",
    "LogitNormal",
    "LossSecondMoment",
    "Mode",
    "TimeSampler",
    "Uniform",
    "get_time_sampler",
    "stratified",
]

TIME_SAMPLERS: dict[str, Callable[..., TimeSampler]] = {
    "uniform": Uniform,
    "stratified": stratified,
    "logit_normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "log_normal": LogNormal,
    "loss_second_moment": LossSecondMoment,
}
"""Every time sampler by name; called with its constants, which all have defaults."""


def get_time_sampler(name: str | TimeSampler, **constants: float) -> TimeSampler:
    """The sampler of that name with these constants, or a sampler itself; ValueError for other names."""
    if isinstance(name, TimeSampler):
        if constants:
            raise ValueError(f"constants must go with a name, got a sampler and {', '.join(constants)}")
        return name
    if name not in TIME_SAMPLERS:
        raise ValueError(unknown("time sampler", name, TIME_SAMPLERS))
    return TIME_SAMPLERS[name](**constants)

"""The plan of a sampler given by name, function or plan, and whose an argument is."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from typing import Any

from diffkern.checks import misspelt, renamed
from diffkern.diffusion._fit import check_plan
from diffkern.modes import neutral
from diffkern.names import Prediction, SamplerName
from diffkern.plan import Plan
from diffkern.samplers import get_sampler
from diffkern.sampling.options import SampleOptions
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule

LOOP = {*SampleOptions.__annotations__, "trajectory", "logprob"}
"""Arguments of `diffkern.sample`."""
STEPS = 50
GRID = ("timesteps", "sigmas")


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of the loop, arguments of the sampler)."""
    own = {name: value for name, value in options.items() if name in LOOP}
    if isinstance(own.get("noise"), numbers.Real):
        del own["noise"]
    return own, {name: value for name, value in options.items() if name not in own}


def plan_of(
    schedule: Schedule,
    prediction: Prediction,
    sampler: SamplerName | Plan | Callable[..., Plan] | None,
    steps: int | None,
    options: dict[str, Any],
    learned: bool,
) -> Plan:
    """The plan, checked; see `Diffusion.plan`."""
    if isinstance(sampler, Plan):
        if steps is not None or options:
            given = ", ".join((["steps"] if steps is not None else []) + list(options))
            raise ValueError(f"{given} must be given to the sampler that made the plan {sampler.name}, not with it")
        if sampler.learned_variance and not learned:
            raise ValueError(
                f"plan {sampler.name} needs a model of learned variance: Diffusion(..., learned_variance=True)"
            )
        check_plan(sampler, schedule, prediction)
        return sampler
    if sampler is None:
        with neutral():
            from_noise = float(schedule.alpha(schedule.noise_end)) == 0.0  # where samplers in sigma cannot start
        discrete = isinstance(schedule, DiscreteSchedule)
        sampler = ("ddpm" if learned else "ddim") if discrete or from_noise else "euler"
        sampler = "heun" if isinstance(schedule, EDMSchedule) else sampler
    if isinstance(sampler, str):
        make: Callable[..., Plan] = get_sampler(sampler)
    elif callable(sampler):
        make = sampler
    else:
        raise ValueError(f"sampler must be a name, a Plan or a function that makes one, got {type(sampler).__name__}")
    if learned and make is get_sampler("ddpm"):
        options = {"variance": "learned", **options}
    known = inspect.signature(make).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    options = renamed("sample()", {"steps": steps, **options}, known)
    steps = options.pop("steps")
    for name in options:
        if name in ("schedule", "prediction") or not (name in known or open_ended):
            choices = [other for other in (*known, *sorted(LOOP)) if other not in ("schedule", "prediction")]
            raise TypeError(misspelt(f"{getattr(make, '__name__', 'sampler')}()", name, choices))
    if steps is None and "steps" in known and not any(name in options for name in GRID):
        steps = min(STEPS, schedule.T) if isinstance(schedule, DiscreteSchedule) else STEPS
    arguments = {"steps": steps} if steps is not None else {}
    plan = make(schedule, prediction=prediction, **arguments, **options)
    if not isinstance(plan, Plan):
        raise ValueError(f"sampler must be a function that returns a Plan, got one that returns {type(plan).__name__}")
    check_plan(plan, schedule, prediction)
    return plan

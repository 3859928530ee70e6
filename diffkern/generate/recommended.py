"""The plan of a sampler as it is good for images in [-1, 1]: steps, noise levels, and x0 kept in range."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffkern.integers import integer
from diffkern.names import SamplerName
from diffkern.plan import Plan
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.spacings import karras_sigmas

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion
    from diffkern.gan import GAN

__all__ = ["DEFAULT_STEPS", "described", "planned", "recommended"]

DEFAULT_STEPS = {
    **{"ddpm": 250, "ddim": 50, "euler": 30, "heun": 15, "midpoint": 15, "rk4": 8, "rk4_38": 8},
    **{"lms": 20, "deis": 20, "euler_ancestral": 50, "dpmpp_1s": 30, "dpmpp_2s": 15, "dpmpp_2m": 20, "dpmpp_3m": 20},
    **{"dpmpp_2m_sde": 40, "dpmpp_3m_sde": 40, "dpmpp_sde": 25, "unipc": 20, "dpm_2": 15, "dpm_2_ancestral": 25},
    **{"dpmpp_2s_ancestral": 25, "euler_maruyama": 500, "flow_sde": 250},
}
"""Steps of the samplers that go from noise to data, where none are given."""
MOST_STEPS = 100_000
SIGMA_MAX, SIGMA_MIN = 80.0, 0.01
"""Ends of the noise levels on a table: the grid of Karras et al. 2022, inside the schedule's own range."""
GRID = ("sigmas", "timesteps", "spacing")


def recommended(
    diffusion: Diffusion,
    sampler: SamplerName | Plan | Callable[..., Plan] | None = None,
    steps: int | None = None,
    **options: Any,
) -> Plan:
    """The plan of a ``sampler`` for images in [-1, 1]: `Diffusion.plan`, with these ``options`` where none are given.

    - ``steps``: `DEFAULT_STEPS`, on a table no more than it has.
    - ``clip``: 1, so that the estimate of x0 stays in [-1, 1]; None for no clip, as of a model in latents.
    - on a table, of DDPM and DDIM the times from the last one on ("trailing"), of the others the noise levels of
      Karras et al. 2022 (arXiv 2206.00364, eq. 5) from 80 to 0.01; on other schedules what the sampler takes itself.

    A `Plan` is taken as it is. Raises ValueError for an unknown name (with the known ones), for steps that are no
    integer in 1..100000, TypeError for options that the sampler does not have.
    """
    from diffkern.samplers import get_sampler

    if isinstance(sampler, Plan):
        return diffusion.plan(sampler, steps, **options)
    if sampler is None:
        sampler = get_sampler(diffusion.plan(steps=1).name)  # the model's own choice
    make: Any = get_sampler(sampler) if isinstance(sampler, str) else sampler
    known = inspect.signature(make).parameters if callable(make) else {}
    name = getattr(make, "__name__", "")
    table, own_grid = diffusion.schedule, any(each in options for each in GRID)
    given = {"clip": 1.0} | options if "clip" in known and diffusion.autoencoder is None else dict(options)
    if steps is None and "steps" in known and not {"sigmas", "timesteps"} & options.keys():
        steps = DEFAULT_STEPS.get(name)
        if steps is not None and isinstance(table, DiscreteSchedule):
            steps = min(steps, table.T)
    if steps is not None:
        steps = integer("steps", steps, 1, MOST_STEPS)
    if isinstance(table, DiscreteSchedule) and steps is not None and not own_grid:
        if name in ("ddpm", "ddim"):
            given["spacing"] = "trailing"
        elif "sigmas" in known and name in DEFAULT_STEPS:
            highest = min(SIGMA_MAX, float(table.sigma_ve(table.T - 1)))
            given["sigmas"] = karras_sigmas(steps, max(SIGMA_MIN, float(table.sigma_ve(0))), highest)
            steps = None
    return diffusion.plan(make, steps, **given)


def planned(
    model: Diffusion | GAN,
    sampler: SamplerName | Plan | Callable[..., Plan] | None = None,
    steps: int | None = None,
    *,
    guidance: Any = None,
    **options: Any,
) -> Plan | None:
    """The plan that a model samples by, `recommended`; None of a `diffkern.GAN`, whose generator is called once.

    ValueError for a GAN with a sampler, steps, guidance or options.
    """
    diffusion: Any = model
    if hasattr(diffusion, "plan"):
        return recommended(diffusion, sampler, steps, **options)
    for name, value in {"sampler": sampler, "steps": steps, "guidance": guidance, **options}.items():
        if value is not None:
            raise ValueError(
                f"{name} must be left out for a {type(model).__name__}, which needs no plan, got {value!r}"
            )
    return None


def described(plan: Plan | None, guidance: float | None = None) -> str:
    """The words above a picture of what the plan makes, or a generator without one."""
    if plan is None:
        return "a generator, one call"
    words = f"{plan.name}, {len(plan.steps)} steps, {plan.model_calls} model calls"
    return words if guidance is None else f"{words}, guidance {guidance:g}"

"""Single steps of the samplers, guided and of Heun's two rows, and whole loops with a model that costs nothing.

The baselines are diffusers' schedulers called as pipelines call them (`step(model_output, t, sample)` under no_grad,
timesteps set once, `clip_sample=False`, which is their leanest path).
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import (
    Baseline,
    Case,
    Check,
    Setting,
    bytes_of,
    compare,
    cpu_target,
    job_seeds,
    loose,
    random_tensor,
    reference_noise,
    tight,
)
from diffkern import ops, reference, samplers, sampling, schedules
from diffkern.plan import Plan

__all__ = ["SMALL", "guided", "heun", "loop", "step"]

SMALL = (1, 4, 64, 64)
"""The state where the call's overhead is the point."""
STEPS = 50
ROW = 20
"""The row that the single-step cases run: any row in the middle does the same work."""


# ----------------------------------------------------------------------------------------------------- helpers
def _scheduler(kind: str, **config: Any) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import diffusers

    return getattr(diffusers, kind)(**config)


def _vp(kind: str, setting: Setting) -> tuple[Any, Plan]:
    """A diffusers scheduler of the DDPM family with its timesteps set, and our plan on the same table."""
    scheduler = _scheduler(kind, clip_sample=False)
    scheduler.set_timesteps(STEPS, device=setting.device)
    make = samplers.ddpm if kind == "DDPMScheduler" else samplers.ddim
    plan = make(schedules.from_alphas_cumprod(scheduler.alphas_cumprod), timesteps=scheduler.timesteps.tolist())
    return scheduler, plan


# ------------------------------------------------------------------------------------------------------- steps
def step(
    name: str,
    setting: Setting,
    shape: tuple[int, ...],
    kind: str,
    dtype: torch.dtype = torch.float32,
    want_x0: bool = False,
    channels_last: bool = False,
    goal: float | None = None,
    goal_us: float | None = None,
    add: float | None = None,
) -> Case:
    """One step of DDIM or DDPM into `out`, noise by address. `add`: also against torch.add(x, m, out=out)."""
    scheduler, plan = _vp(f"{kind.upper()}Scheduler", setting)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, m = (random_tensor(k, shape, setting, dtype).contiguous(memory_format=layout) for k in (0, 1))
    out = torch.empty_like(x)
    x0 = torch.empty_like(x) if want_x0 else None
    table, t = plan.table, scheduler.timesteps[ROW]
    draws = plan.rows[ROW].draws
    seeds = job_seeds(shape[0], setting) if draws else None

    def ours() -> Tensor:
        return ops.step_out(x, m, table=table, row=ROW, seeds=seeds, out=out, x0=x0)

    def theirs() -> Any:
        return scheduler.step(m, t, x)

    def check() -> list[Check]:
        noise = reference_noise(shape, plan.rows[ROW].stream) if draws else None
        want, clean, _, _ = reference.step(x.cpu(), m.cpu(), table=table, row=ROW, noise=noise)
        ours()
        checks = [compare("ours", out, want, tight(dtype))]
        if x0 is not None:
            checks.append(compare("ours x0", x0, clean, tight(dtype)))
        if not draws:
            found = theirs()
            checks.append(compare("diffusers", found.prev_sample, want, loose(dtype)))
            checks.append(compare("diffusers x0", found.pred_original_sample, clean, 2 * loose(dtype)))
        else:  # the scheduler draws its own: make the same draw, and give it to ours
            device = torch.device(setting.device)
            drawn = torch.randn(
                shape, generator=torch.Generator(device).manual_seed(5), device=device, dtype=dtype
            ).contiguous(memory_format=layout)
            found = scheduler.step(m, t, x, generator=torch.Generator(device).manual_seed(5))
            same = ops.step(x, m, table=table, row=ROW, noise=drawn)[0]
            checks.append(compare("diffusers, same noise", found.prev_sample, same, loose(dtype)))
        return checks

    baselines = [Baseline("diffusers", theirs, cpu_target(goal, setting))]
    if add is not None:
        note = f"ours may take {add:g}x its time"
        baselines.append(
            Baseline("torch.add", functools.partial(torch.add, x, m, out=out), cpu_target(1 / add, setting), note)
        )
    extras = [", x0 too"] * want_x0 + [", channels_last"] * channels_last
    return Case(
        name,
        f"{kind.upper()} step" + "".join(extras),
        shape,
        dtype,
        ours,
        tuple(baselines),
        check,
        bytes_of(x, m, out) + (bytes_of(x) if want_x0 else 0),
        goal_us=goal_us if setting.cpu else None,
        overhead=math.prod(shape) <= math.prod(SMALL),
    )


def guided(name: str, setting: Setting, shape: tuple[int, ...]) -> Case:
    """A guided DDIM step as pipelines do it: split [2B], combine, step, and the next [2B] input."""
    scheduler, plan = _vp("DDIMScheduler", setting)
    weight = 7.5
    table, t = plan.with_guidance(weight).table, scheduler.timesteps[ROW]
    x = random_tensor(0, shape, setting)
    m = random_tensor(1, (2 * shape[0], *shape[1:]), setting)
    out, following = torch.empty_like(x), torch.empty_like(m)

    def ours() -> Tensor:
        return ops.step_out(x, m, table=table, row=ROW, out=out, next=following)

    def theirs() -> tuple[Tensor, Tensor]:
        uncond, cond = m.chunk(2)
        latents = scheduler.step(uncond + weight * (cond - uncond), t, x).prev_sample
        return latents, torch.cat([latents] * 2)

    def check() -> list[Check]:
        want = reference.step(x.cpu(), m.cpu(), table=table, row=ROW)[0]
        ours()
        return [
            compare("ours", out, want, 10 * tight(x.dtype)),
            compare("ours next", following, torch.cat([out, out]), 0.0),
            compare("diffusers", theirs()[0], want, loose(x.dtype)),
        ]

    return Case(
        name,
        "guided DDIM step",
        shape,
        x.dtype,
        ours,
        (Baseline("diffusers", theirs),),
        check,
        bytes_of(x, m, out, following),
        overhead=math.prod(shape) <= math.prod(SMALL),
    )


def heun(name: str, setting: Setting, shape: tuple[int, ...]) -> Case:
    """Both rows of one Heun step in sigma: the first saves a history, the second reads it."""
    scheduler = _scheduler("HeunDiscreteScheduler")
    scheduler.set_timesteps(STEPS, device=setting.device)
    levels = [*scheduler.sigmas[::2].tolist()]  # [s0, s1, s1, ..., 0]: every level once
    plan = samplers.heun(schedules.from_alphas_cumprod(scheduler.alphas_cumprod), sigmas=levels)
    first = 2 * (ROW // 2)
    x, m1, m2 = (random_tensor(k, shape, setting) for k in (0, 1, 2))
    x = x * levels[ROW // 2]
    middle, history, out = (torch.empty_like(x) for _ in range(3))
    table, times = plan.table, scheduler.timesteps

    def ours() -> Tensor:
        ops.step_out(x, m1, table=table, row=first, out=middle, s=history)
        return ops.step_out(middle, m2, h0=history, table=table, row=first + 1, out=out)

    def theirs() -> Tensor:
        scheduler._step_index = first
        half = scheduler.step(m1, times[first], x).prev_sample
        return scheduler.step(m2, times[first + 1], half).prev_sample

    def check() -> list[Check]:
        half, _, saved, _ = reference.step(x.cpu(), m1.cpu(), table=table, row=first)
        want = reference.step(half, m2.cpu(), h0=saved, table=table, row=first + 1)[0]
        ours()
        return [
            compare("ours", out, want, 2 * tight(x.dtype)),
            compare("diffusers", theirs(), want, loose(x.dtype)),
        ]

    moved = bytes_of(x, m1, middle, history) + bytes_of(m2, history, out)  # x~ enters the second row through h0 and m
    return Case(name, "Heun step, two rows", shape, x.dtype, ours, (Baseline("diffusers", theirs),), check, moved)


def loop(name: str, setting: Setting, shape: tuple[int, ...], kind: str) -> Case:
    """A whole run of 50 steps with a model that costs nothing: what a sampler adds to a model, per step."""
    scheduler, plan = _vp(f"{kind.upper()}Scheduler", setting)
    x, m = (random_tensor(k, shape, setting) for k in (0, 1))
    seeds = job_seeds(shape[0], setting)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return m

    def ours() -> object:
        return sampling.sample(model, x, plan, seeds=None if plan.deterministic else seeds)

    def theirs() -> Tensor:
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(model(state, t), t, state).prev_sample
        return state

    def check() -> list[Check]:
        want = x.cpu().double()
        for i, row in enumerate(plan.rows):
            noise = reference.randn(shape, seeds.cpu(), row.stream) if row.draws else None
            want = reference.step(want, m.cpu(), table=plan.table, row=i, noise=noise)[0]
        found = ours()
        assert isinstance(found, Tensor)
        checks = [compare("ours", found, want, 20 * tight(x.dtype))]
        if plan.deterministic:
            checks.append(compare("diffusers", theirs(), want, 10 * loose(x.dtype)))
        return checks

    return Case(
        name,
        f"{kind.upper()} loop, per step",
        shape,
        x.dtype,
        ours,
        (Baseline("diffusers", theirs),),
        check,
        bytes_of(x, m, x),
        steps=STEPS,
        overhead=True,
    )

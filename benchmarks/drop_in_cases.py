"""Whole runs of diffusers' schedulers and of our drop-ins for them, as a pipeline runs them with a model that costs
nothing: set_timesteps, then scale_model_input and step for every timestep (RePaint with an image and a mask, the
variance exploding SDE with a corrector and a predictor)."""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

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
)
from diffkern import ops, streams

__all__ = ["TABLE", "drop_in"]

SMALL, LARGE = (1, 4, 64, 64), (16, 3, 256, 256)


def drop_in(
    name: str,
    setting: Setting,
    shape: tuple[int, ...],
    kind: str,
    steps: int = 20,
    goal: float | None = None,
    rng: str = "torch",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Case:
    """The original takes the same run, with noise from torch's generator. Ours does too with ``rng`` "torch"; with
    "counter" its noise is by address, and the check hands the original the same."""
    import diffusers

    from diffkern.compat import diffusers as compat

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original, fused = (getattr(module, kind)(**config) for module in (diffusers, compat))
    x, m = (random_tensor(k, shape, setting, dtype) for k in (0, 1))
    run, inputs = _runs(kind, steps, x, m)
    seeds = job_seeds(shape[0], setting)
    fused.diffkern(rng=rng, seeds=seeds)

    def loop(scheduler: Any) -> Tensor:
        with torch.no_grad():
            return run(scheduler)

    def check() -> list[Check]:
        found, module = [], sys.modules[type(original).__module__]
        for scheduler in (fused, original):
            torch.manual_seed(3)
            numbers = itertools.count(streams.STEP)

            def draw(size: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
                return ops.randn(size, seeds, next(numbers), dtype=dtype)  # noqa: B023  (called in this round only)

            same = mock.patch.object(module, "randn_tensor", draw) if rng == "counter" else contextlib.nullcontext()
            with same:
                found.append(loop(scheduler))
        scale = 1 + float(found[1].abs().max())
        return [compare("ours", found[0] / scale, found[1] / scale, loose(x.dtype))]

    loop(fused)
    return Case(
        name,
        f"{kind}, {steps} steps, per step call{', noise by address' if rng == 'counter' else ''}",
        shape,
        x.dtype,
        lambda: loop(fused),
        (Baseline("diffusers", lambda: loop(original), cpu_target(goal, setting)),),
        check,
        bytes_of(x, m, x, *inputs),
        steps=len(fused.timesteps),
        overhead=True,
        counted=True,
    )


def _runs(kind: str, steps: int, x: Tensor, m: Tensor) -> tuple[Callable[[Any], Tensor], tuple[Tensor, ...]]:
    """The loop over a scheduler as its pipeline has it, and what a step reads and writes beside x, m and x'."""
    original, mask = torch.flip(x, [-1]).clamp(-1, 1), (m[:, :1] > 0).to(x.dtype)

    def plain(scheduler: Any) -> Tensor:
        scheduler.set_timesteps(steps, device=x.device)
        state = x
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(state, t)
            state = scheduler.step(m, t, state, return_dict=False)[0]
        return state

    def repaint(scheduler: Any) -> Tensor:
        scheduler.set_timesteps(steps, jump_n_sample=1, device=x.device)  # no jumps back: every call is a step
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(m, t, state, original, mask, return_dict=False)[0]
        return state

    def score_sde_ve(scheduler: Any) -> Tensor:
        scheduler.set_timesteps(steps, device=x.device)
        scheduler.set_sigmas(steps)
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step_correct(m, state, return_dict=False)[0]
            state = scheduler.step_pred(m, t, state, return_dict=False)[0]
        return state

    if kind == "RePaintScheduler":
        return repaint, (original, mask)
    if kind == "ScoreSdeVeScheduler":
        return score_sde_ve, (x, m, x)  # a corrector and a predictor a step
    return plain, ()


def _table() -> dict[str, tuple[Callable[..., Case], dict[str, Any]]]:
    deterministic, multistep = {"small": 6.0, "large": 8.0}, {"small": 10.0, "large": 10.0}
    kinds: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
        "ddim": ("DDIMScheduler", {}, deterministic),
        "ddpm": ("DDPMScheduler", {}, {}),
        "ddim-inverse": ("DDIMInverseScheduler", {}, deterministic),
        "dpmpp-2m": ("DPMSolverMultistepScheduler", {}, multistep),
        "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
        "unipc": ("UniPCMultistepScheduler", {}, multistep),
        "euler": ("EulerDiscreteScheduler", {}, deterministic),
        "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
        "heun": ("HeunDiscreteScheduler", {}, deterministic),
        "edm-euler": ("EDMEulerScheduler", {}, deterministic),
        "lms": ("LMSDiscreteScheduler", {}, deterministic),
        "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}, deterministic),
        "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}, deterministic),
        "repaint": ("RePaintScheduler", {}, {}),
        "score-sde-ve": ("ScoreSdeVeScheduler", {}, {}),
    }
    table: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {}
    for size, shape, steps in (("small", SMALL, 50), ("large", LARGE, 10)):
        for short, (kind, config, goals) in kinds.items():
            options = {"shape": shape, "kind": kind, "steps": steps, "goal": goals.get(size), **config}
            table[f"diffusers-{short}-{size}"] = (drop_in, options)
            if short in ("ddpm", "dpmpp-2m-sde", "euler-ancestral"):
                table[f"diffusers-{short}-counter-{size}"] = (drop_in, {**options, "rng": "counter"})
    return table


TABLE = _table()

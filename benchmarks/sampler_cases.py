"""Whole runs of every sampler with a model that costs nothing: what a sampler adds to a model, per model call."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    tight,
)
from diffkern import reference, samplers, sampling, schedules
from diffkern.plan import Plan

__all__ = ["TABLE"]

SHAPE = (1, 4, 64, 64)
STEPS = 50
GOAL_US = {False: 12.0, True: 20.0}
"""Most microseconds a model call, without and with noise."""


def loop(name: str, setting: Setting, kind: str, **options: Any) -> Case:
    """Eager is the same plan by hand in torch: one expression a row, numbers for coefficients, randn for noise."""
    plan: Plan = samplers.get_sampler(kind)(schedules.linear(), STEPS, **options)
    x, m = (random_tensor(k, SHAPE, setting) for k in (0, 1))
    seeds = job_seeds(SHAPE[0], setting)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return m

    def ours() -> object:
        return sampling.sample(model, x, plan, seeds=None if plan.deterministic else seeds)

    def theirs() -> Tensor:
        return _eager(model, x, plan, torch.randn_like)

    def check() -> list[Check]:
        noise = iter([reference.randn(SHAPE, seeds.cpu(), row.stream) for row in plan.rows if row.draws])
        want = _eager(lambda x, t: m.cpu().double(), x.cpu().double(), plan, lambda _: next(noise))
        found = ours()
        assert isinstance(found, Tensor)
        scale = 1 + float(want.abs().max())
        checks = [compare("ours", found / scale, want / scale, 40 * tight(x.dtype))]
        if plan.deterministic:
            checks.append(compare("eager", theirs() / scale, want / scale, 10 * loose(x.dtype)))
        return checks

    return Case(
        name,
        f"{kind} loop, per model call",
        SHAPE,
        x.dtype,
        ours,
        (Baseline("eager", theirs),),
        check,
        bytes_of(x, m, x),
        goal_us=cpu_target(GOAL_US[not plan.deterministic], setting),
        steps=len(plan.rows),
        overhead=True,
    )


@torch.no_grad()
def _eager(
    model: Callable[[Tensor, Tensor], Tensor], x: Tensor, plan: Plan, noise: Callable[[Tensor], Tensor]
) -> Tensor:
    """The rows of a plan without diffkern, as a sampler written by hand computes them."""
    histories: dict[int, Tensor] = {}
    ones = torch.ones(len(x), device=x.device)
    scale = plan.first_k
    for row in plan.rows:
        m = model(x if scale == 1.0 else x * scale, ones * row.time) if row.calls_model else None
        x0 = (
            row.p * x + row.q * m
            if m is not None and row.makes_x0 and (row.b or row.B or ("x0" in dict(row.saves).values()))
            else None
        )
        parts: list[tuple[float, Tensor | None]] = [(row.a, x), (row.b, x0), (row.d, m)]
        parts += [(e, histories.get(k)) for k, e in enumerate((row.e0, row.e1, row.e2, row.e3))]
        new = _sum(parts)
        if row.g:
            new = new + row.g * noise(x)
        made = {"x": x, "x0": x0}
        if row.A or row.B or row.D:
            made["s"] = _sum([(row.A, x), (row.B, x0), (row.D, m)])
        for slot, source in row.saves:
            saved = made[source]
            assert saved is not None
            histories[slot] = saved
        x, scale = new, row.k
    return x


def _sum(parts: list[tuple[float, Tensor | None]]) -> Tensor:
    """The weighted sum of the parts whose weight is not 0."""
    terms = [tensor if weight == 1.0 else weight * tensor for weight, tensor in parts if weight and tensor is not None]
    return functools.reduce(torch.add, terms)


_OPTIONS: dict[str, dict[str, Any]] = {"annealed_langevin": {"each": 2, "step_size": 1e-5}}
_LEFT_OUT = ("flow_sde", "langevin", "ddim_inversion")  # another schedule, one level, the steps of ddim

TABLE: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
    f"loop-{kind.replace('_', '-')}": (loop, {"kind": kind, **_OPTIONS.get(kind, {})})
    for kind in samplers.SAMPLERS
    if kind not in _LEFT_OUT
}

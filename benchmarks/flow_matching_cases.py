"""flow_matching's loops and paths before and after: the installed original against `diffkern.compat.flow_matching`.

The model is given, so that what is timed in a loop is the solver's own work, per model call.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Baseline, Case, Check, Setting, bytes_of, compare, cpu_target, loose, random_tensor, tight
from diffkern.compat.flow_matching.path import AffineProbPath
from diffkern.compat.flow_matching.path import scheduler as schedulers
from diffkern.compat.flow_matching.solver import ODESolver

__all__ = ["TABLE"]

SMALL, LARGE = (1, 4, 64, 64), (16, 3, 256, 256)
GOALS = {SMALL: 1.5, LARGE: 2.0}
"""Least time of the original over ours in a loop."""
NEEDED = ("flow_matching", "torchdiffeq")
STAGES = {"euler": 1, "midpoint": 2, "rk4": 4}


def _missing() -> str:
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def loop(name: str, setting: Setting, shape: tuple[int, ...], method: str) -> Case:
    """Steps enough that what is done once a run counts little."""
    steps = 4 if shape == LARGE else 20
    x, m = (random_tensor(k, shape, setting) for k in range(2))

    def run(cls: Any, x: Tensor = x, m: Tensor = m) -> Tensor:
        found: Tensor = cls(lambda x, t: m).sample(x, 1.0 / steps, method=method)
        return found

    theirs: Callable[[], Tensor] | None = None
    if not _missing():
        original = importlib.import_module("flow_matching.solver").ODESolver
        theirs = lambda: run(original)  # noqa: E731

    def check() -> list[Check]:
        want = run(ODESolver, x.cpu().double(), m.cpu().double())
        checks = [compare("ours", run(ODESolver), want, 40 * tight(x.dtype))]
        if theirs is not None:
            checks.append(compare("flow_matching", theirs(), want, loose(x.dtype)))
        return checks

    return Case(
        name,
        f"flow_matching {method} loop, per model call",
        shape,
        x.dtype,
        lambda: run(ODESolver),
        (Baseline("flow_matching", theirs, cpu_target(GOALS.get(shape), setting), _missing()),),
        check,
        bytes_of(x, m, x),
        steps=steps * STAGES[method],
        overhead=True,
        counted=True,
    )


def path(name: str, setting: Setting, shape: tuple[int, ...], scheduler: str) -> Case:
    """x_t and dx_t of a batch; the scheduler's own work, in plain torch, is in both times."""
    x_0, x_1 = (random_tensor(k, shape, setting) for k in range(2))
    t = torch.linspace(0.1, 0.9, shape[0], device=setting.device)
    ours = AffineProbPath(getattr(schedulers, scheduler)())

    def run(path: Any) -> Tensor:
        found: Tensor = path.sample(x_0=x_0, x_1=x_1, t=t).dx_t
        return found

    theirs: Callable[[], Tensor] | None = None
    if not _missing():
        peer = importlib.import_module("flow_matching.path")
        original = peer.AffineProbPath(getattr(importlib.import_module("flow_matching.path.scheduler"), scheduler)())
        theirs = lambda: run(original)  # noqa: E731

    def check() -> list[Check]:
        rates = getattr(schedulers, scheduler)()(t.cpu())
        over = (-1, *(1,) * (len(shape) - 1))
        d_alpha, d_sigma = (rate.double().reshape(over) for rate in (rates.d_alpha_t, rates.d_sigma_t))
        want = d_alpha * x_1.cpu().double() + d_sigma * x_0.cpu().double()
        checks = [compare("ours", run(ours), want, tight(x_0.dtype))]
        if theirs is not None:
            checks.append(compare("flow_matching", theirs(), want, loose(x_0.dtype)))
        return checks

    return Case(
        name,
        f"AffineProbPath.sample, {scheduler}",
        shape,
        x_0.dtype,
        lambda: run(ours),
        (Baseline("flow_matching", theirs, cpu_target(2.0, setting) if shape == LARGE else None, _missing()),),
        check,
        bytes_of(x_0, x_1, x_0, x_0),
        overhead=True,
        counted=True,
    )


TABLE: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {}
for size, shape in (("", SMALL), ("-large", LARGE)):
    TABLE |= {f"flow-matching-{method}{size}": (loop, {"shape": shape, "method": method}) for method in STAGES}
    TABLE[f"flow-matching-path{size}"] = (path, {"shape": shape, "scheduler": "CondOTScheduler"})

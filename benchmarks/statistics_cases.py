"""The cases of the statistics of a sample: dynamic thresholding, mean and deviation."""

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
    loose,
    random_tensor,
    tight,
    try_compile,
)
from diffkern import ops, reference

__all__ = ["TABLE"]

Q, MAXIMUM = 0.995, 1.5


def dynamic_threshold(
    name: str,
    setting: Setting,
    shape: tuple[int, ...],
    goal: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """A predicted x0 thresholded by its quantile. Eager is the form of the pipelines: sort, clamp, divide."""
    x0 = random_tensor(0, shape, setting, dtype)

    def ours() -> Tensor:
        return ops.dynamic_threshold(x0, Q, MAXIMUM)

    def formula(x0: Tensor) -> Tensor:
        s = torch.quantile(x0.float().abs().flatten(1), Q, dim=1).clamp(1, MAXIMUM).view(-1, 1, 1, 1)
        return (torch.clamp(x0, -s, s) / s).to(x0.dtype)

    fused, why = try_compile(formula, setting, x0)

    def check() -> list[Check]:
        exact = reference.dynamic_threshold(x0.cpu(), Q, MAXIMUM)
        return [
            compare("ours", ours(), exact, tight(x0.dtype)),
            compare("eager", formula(x0), exact, loose(x0.dtype)),
        ]

    baselines = (
        Baseline("eager", functools.partial(formula, x0), cpu_target(goal, setting), "torch.quantile sorts"),
        Baseline("torch.compile", fused and functools.partial(fused, x0), None, why),
    )
    return Case(name, "dynamic threshold", shape, x0.dtype, ours, baselines, check, bytes_of(x0, x0))


def moments(
    name: str,
    setting: Setting,
    shape: tuple[int, ...],
    goal: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Mean and unbiased standard deviation of each sample."""
    x = random_tensor(0, shape, setting, dtype)

    def ours() -> Tensor:
        return ops.moments(x)

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        deviation, mean = torch.std_mean(x, dim=(1, 2, 3))
        return mean, deviation

    fused, why = try_compile(formula, setting, x)

    def check() -> list[Check]:
        exact = reference.moments(x.cpu())
        return [
            compare("ours", ours(), exact, tight(x.dtype)),
            compare("eager", torch.stack(formula(x), 1), exact, loose(x.dtype)),
        ]

    baselines = (
        Baseline("torch.std_mean", functools.partial(formula, x), cpu_target(goal, setting)),
        Baseline("torch.compile", fused and functools.partial(fused, x), None, why),
    )
    return Case(name, "mean and deviation", shape, x.dtype, ours, baselines, check, bytes_of(x))


IMAGES, PICTURES = (16, 3, 64, 64), (4, 3, 256, 256)
TABLE: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
    "threshold-64": (dynamic_threshold, {"shape": IMAGES, "goal": 4.0}),
    "threshold-256": (dynamic_threshold, {"shape": PICTURES, "goal": 4.0}),
    "moments-64": (moments, {"shape": IMAGES, "goal": 4.0}),
    "moments-256": (moments, {"shape": PICTURES, "goal": 4.0}),
}

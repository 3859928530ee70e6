"""What the examples share: a run before and after, and the time of the sampler's update alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def update_time(scheduler: Any, shape: tuple[int, ...], steps: int, device: str = "cpu", repeats: int = 5) -> float:
    """Microseconds of one `step` of a diffusers scheduler on given model outputs: the fastest of ``repeats`` runs."""
    scheduler.set_timesteps(steps, device=device)
    x = torch.randn(shape, device=device)
    m = torch.randn(shape, device=device)
    generator = torch.Generator(device).manual_seed(0)
    draws = "generator" in scheduler.step.__code__.co_varnames
    times = []
    for _ in range(repeats + 1):  # the first makes the tables
        scheduler.set_timesteps(steps, device=device)
        spent = 0.0
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            spent -= _now(device)
            scheduler.step(m, t, x, return_dict=False, **({"generator": generator} if draws else {}))
            spent += _now(device)
        times.append(spent / len(scheduler.timesteps))
    return 1e6 * min(times[1:])


def before_and_after(run: Callable[[], Tensor], change: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """(result, result after ``change()``); prints how far they are apart."""
    before = run()
    print(change())
    after = run()
    print(f"max difference of the results: {(before - after).abs().max().item():.2e}")
    return before, after


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()

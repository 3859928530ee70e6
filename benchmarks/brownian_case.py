"""The cases of Brownian noise: a weighted sum of normals, and an increment of a path."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Baseline, Case, Check, Setting, bytes_of, compare, cpu_target, job_seeds, tight
from diffkern import brownian, ops, reference

__all__ = ["increments", "noise_sum"]

NODES = 24
STEPS = 20


def noise_sum(name: str, setting: Setting, shape: tuple[int, ...], goal: float | None = None) -> Case:
    """24 normals an element, weighted and added. Eager draws 24 tensors and adds them."""
    seeds = job_seeds(shape[0], setting)
    chosen = torch.arange(NODES)
    weights = torch.randn(NODES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    numbers = weights.tolist()

    def ours() -> Tensor:
        return ops.noise_sum(shape, seeds, chosen, weights)

    def eager() -> Tensor:
        total = torch.randn(shape, device=setting.device).mul_(numbers[0])
        for weight in numbers[1:]:
            total.add_(torch.randn(shape, device=setting.device), alpha=weight)
        return total

    def check() -> list[Check]:
        part = [1, *shape[1:]]
        exact = reference.noise_sum(part, seeds[:1].cpu(), chosen, weights)
        return [compare("ours", ours()[:1], exact, NODES * tight(torch.float32))]

    baseline = Baseline("eager", eager, cpu_target(goal, setting), "24 x torch.randn, in place")
    return Case(name, "sum of 24 normals", shape, torch.float32, ours, (baseline,), check, bytes_of(ours()))


def increments(name: str, setting: Setting, shape: tuple[int, ...], goal: float | None = None) -> Case:
    """The 20 increments of a sampler's run, each normalised. torchsde's BrownianInterval is what k-diffusion's
    BrownianTreeNoiseSampler asks (through BrownianTree); a new path each run, as in sampling."""
    seeds = job_seeds(shape[0], setting)
    points = [i / STEPS for i in range(STEPS + 1)]

    def ours() -> list[Tensor]:
        steps = itertools.pairwise(points)
        return [ops.noise_sum(shape, seeds, *brownian.increment(s, t, normalised=True)) for s, t in steps]

    def theirs() -> list[Tensor]:
        import torchsde

        make: Any = torchsde.BrownianTree
        tree = make(t0=0.0, w0=torch.zeros(shape, device=setting.device), t1=1.0, entropy=7)
        return [tree(s, t) / (t - s) ** 0.5 for s, t in itertools.pairwise(points)]

    def check() -> list[Check]:
        part = [1, *shape[1:]]
        got = ours()
        checks = []
        for k in (0, STEPS // 2, STEPS - 1):
            terms = brownian.increment(points[k], points[k + 1], normalised=True)
            exact = reference.noise_sum(part, seeds[:1].cpu(), *terms)
            checks.append(compare(f"ours, step {k}", got[k][:1], exact, NODES * tight(torch.float32)))
        return checks

    found = importlib.util.find_spec("torchsde") is not None
    why = "BrownianTree" if found else "torchsde is not installed"
    baseline = Baseline("torchsde", theirs if found else None, cpu_target(goal, setting), why)
    title = f"Brownian path, {STEPS} increments"
    return Case(name, title, shape, torch.float32, ours, (baseline,), check, STEPS * bytes_of(ours()[0]), steps=STEPS)

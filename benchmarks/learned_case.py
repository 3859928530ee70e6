"""The case of the step with a learned variance: one ancestral step of a network with twice the channels."""

from __future__ import annotations

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
    try_compile,
)
from diffkern import ops, reference, streams
from diffkern.ops import LEARNED_COLUMNS

__all__ = ["learned"]

T = 400
"""Any step in the middle does the same work."""


def learned(
    name: str, setting: Setting, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, goal: float | None = None
) -> Case:
    """A DDPM step whose variance is the network's, between beta and beta~ (arXiv 2102.09672, eq. 15), into `out`.

    Eager is the same formula on Python floats in plain torch; diffusers' scheduler is called as its pipelines call it.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import diffusers

    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=True)
    here, before = (float(scheduler.alphas_cumprod[t]) for t in (T, T - 1))
    beta = 1 - here / before
    low, high = math.log((1 - before) / (1 - here) * beta), math.log(beta)
    c = {
        **{"p": here**-0.5, "q": -math.sqrt((1 - here) / here), "clip": 1.0, "k": 1.0},
        **{"a": math.sqrt(here / before) * (1 - before) / (1 - here), "b": math.sqrt(before) * beta / (1 - here)},
        **{"g": 1.0, "r0": 0.5 * (high + low), "r1": 0.5 * (high - low), "stream": float(streams.STEP + T)},
    }
    table = torch.tensor([[c.get(column, 0.0) for column in LEARNED_COLUMNS]], dtype=torch.float64)
    x = random_tensor(0, shape, setting, dtype)
    both = (shape[0], 2 * shape[1], *shape[2:])
    m = random_tensor(1, both, setting, dtype)
    m[:, shape[1] :].tanh_()
    out, seeds = torch.empty_like(x), job_seeds(shape[0], setting)

    def ours() -> Tensor:
        return ops.learned_step_out(x, m, table=table, seeds=seeds, out=out)

    def update(x: Tensor, m: Tensor, z: Tensor) -> Tensor:
        eps, v = m.chunk(2, dim=1)
        x0 = (c["p"] * x + c["q"] * eps).clamp(-1, 1)
        return c["a"] * x + c["b"] * x0 + torch.exp(0.5 * (c["r0"] + c["r1"] * v)) * z

    def plain(x: Tensor, m: Tensor) -> Tensor:
        return update(x, m, torch.randn_like(x))

    def theirs(generator: torch.Generator | None = None) -> Any:
        return scheduler.step(m, T, x, generator=generator)

    fused, why = try_compile(plain, setting, x, m)

    def check() -> list[Check]:
        z = reference_noise(shape, streams.STEP + T)
        want = reference.learned_step(x.cpu(), m.cpu(), table=table, noise=z)[0]
        ours()
        device = torch.device(setting.device)
        drawn = torch.randn(shape, generator=torch.Generator(device).manual_seed(5), device=device, dtype=dtype)
        found = theirs(torch.Generator(device).manual_seed(5)).prev_sample
        same = ops.learned_step(x, m, table=table, noise=drawn)[0]
        return [
            compare("ours", out, want, tight(dtype)),
            compare("eager", update(x, m, z.to(device, dtype)), want, loose(dtype)),
            compare("diffusers, same noise", found, same, loose(dtype)),
        ]

    baselines = (
        Baseline("eager", lambda: plain(x, m), cpu_target(goal, setting)),
        Baseline("torch.compile", fused and (lambda: fused(x, m)), None, why),
        Baseline("diffusers", theirs, cpu_target(goal, setting)),
    )
    title = "DDPM step, learned variance"
    return Case(name, title, shape, dtype, ours, baselines, check, bytes_of(x, m, out))

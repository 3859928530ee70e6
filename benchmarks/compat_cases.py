"""Loops of k-diffusion and EDM before and after: the originals' own code against the drop-ins of `diffkern.compat`.

The model is given and so is the noise (for both), so that what is timed is the sampler's update, per model call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.case import Baseline, Case, Check, Setting, bytes_of, compare, cpu_target, loose, random_tensor, tight
from diffkern.compat import edm, k_diffusion

__all__ = ["TABLE"]

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

SMALL, LARGE = (1, 4, 64, 64), (16, 3, 256, 256)
GOAL = 2.0
"""Least time of the original over ours."""


def k_loop(name: str, setting: Setting, shape: tuple[int, ...], kind: str) -> Case:
    """Steps enough that what is done once a run counts little."""
    from helpers import k_diffusion_oracle

    steps = 5 if shape == LARGE else 20
    x, m, z = (random_tensor(k, shape, setting) for k in range(3))
    x = 14.0 * x
    sigmas = k_diffusion.get_sigmas_karras(steps, 0.03, 14.0, device=setting.device)
    calls = 0

    def run(function: Callable[..., Tensor], x: Tensor, sigmas: Tensor, m: Tensor, z: Tensor) -> Tensor:
        nonlocal calls
        calls = 0

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return m

        def given(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return z

        options: dict[str, Any] = {"noise_sampler": lambda sigma, to: z} if "sde" in kind or "ancestral" in kind else {}
        with mock.patch("torch.randn_like", given):
            return function(model, x, sigmas, disable=True, **options)

    mine = getattr(k_diffusion, f"sample_{kind}")
    theirs: Callable[[], Tensor] | None = None
    if not k_diffusion_oracle.missing():
        original = getattr(k_diffusion_oracle.modules().sampling, f"sample_{kind}")
        theirs = lambda: run(original, x, sigmas, m, z)  # noqa: E731
    note = "" if theirs is not None else f"not installed: {', '.join(k_diffusion_oracle.missing())}"

    def ours() -> Tensor:
        return run(mine, x, sigmas, m, z)

    def check() -> list[Check]:
        want = run(mine, *(t.cpu().double() for t in (x, sigmas, m, z)))
        checks = [compare("ours", ours(), want, 40 * tight(x.dtype))]
        if theirs is not None:
            checks.append(compare("k-diffusion", theirs(), want, loose(x.dtype)))
        return checks

    ours()
    baseline = Baseline("k-diffusion", theirs, cpu_target(GOAL, setting), note)
    return Case(
        name,
        f"k-diffusion {kind} loop, per model call",
        shape,
        x.dtype,
        ours,
        (baseline,),
        check,
        bytes_of(x, m, x),
        steps=calls,
        overhead=True,
        counted=True,
    )


def edm_loop(name: str, setting: Setting, shape: tuple[int, ...], churn: float = 0.0) -> Case:
    """EDM's float64 Heun loop; the baseline is our transcription of the paper's algorithm."""
    from helpers.edm_algorithm import algorithm_2

    steps = 4 if shape == LARGE else 18
    x, m, z = (random_tensor(k, shape, setting, torch.float64) for k in range(3))

    class Net:
        sigma_min, sigma_max = 0.0, float("inf")

        def round_sigma(self, sigma: Tensor) -> Tensor:
            return sigma

        def __call__(self, x: Tensor, sigma: Tensor, labels: Any = None) -> Tensor:
            return m

    def ours() -> Tensor:
        return edm.edm_sampler(Net(), x, None, lambda x: z, num_steps=steps, S_churn=churn)

    @torch.no_grad()
    def theirs() -> Tensor:
        return algorithm_2(Net(), x, None, lambda x: z, num_steps=steps, S_churn=churn)

    return Case(
        name,
        "EDM loop with churn, per model call" if churn else "EDM loop, per model call",
        shape,
        x.dtype,
        ours,
        (Baseline("algorithm 2", theirs, cpu_target(GOAL, setting)),),
        lambda: [compare("ours", ours(), theirs(), 1e-11)],
        bytes_of(x, m, x),
        steps=2 * steps - 1,
        overhead=True,
        counted=True,
    )


TABLE: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
    f"k-diffusion-{kind.replace('_', '-')}": (k_loop, {"shape": SMALL, "kind": kind})
    for kind in (
        *("euler", "heun", "dpm_2", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "lms", "dpmpp_2m"),
        *("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"),
    )
}
TABLE |= {
    f"k-diffusion-{kind.replace('_', '-')}-large": (k_loop, {"shape": LARGE, "kind": kind})
    for kind in ("euler", "heun", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde")
}
TABLE |= {
    "edm-loop": (edm_loop, {"shape": SMALL}),
    "edm-loop-churn": (edm_loop, {"shape": SMALL, "churn": 40.0}),
    "edm-loop-large": (edm_loop, {"shape": LARGE}),
}

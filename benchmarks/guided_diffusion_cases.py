"""guided-diffusion's steps and losses before and after, called as its loops call them, with a model that costs nothing.

Baselines: an installed guided_diffusion, and our transcription of the papers in plain torch (its tables stay on the
device, where the original copies about ten of them there in a step). Noise is given unless a case draws it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.case import Baseline, Case, Check, Setting, bytes_of, compare, cpu_target, loose, random_tensor
from diffkern.compat import guided_diffusion

__all__ = ["TABLE", "losses", "step"]

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

SMALL, LARGE = (1, 4, 64, 64), (16, 3, 256, 256)
GOAL = 4.0
"""Least time of the original over ours."""
KEPT, ROW = "250", 100


def _diffusions(variance: str, loss: str = "MSE") -> tuple[Any, Any]:
    """(ours, the original or None) over 250 of 1000 steps."""
    from helpers import guided_diffusion_oracle

    modules = [(guided_diffusion, guided_diffusion)]
    if not guided_diffusion_oracle.missing():
        found = guided_diffusion_oracle.modules()
        modules.append((found.gaussian_diffusion, found.respace))
    made = [
        respace.SpacedDiffusion(
            use_timesteps=respace.space_timesteps(1000, KEPT),
            betas=gd.get_named_beta_schedule("linear", 1000),
            model_mean_type=gd.ModelMeanType.EPSILON,
            model_var_type=gd.ModelVarType[variance],
            loss_type=gd.LossType[loss],
        )
        for gd, respace in modules
    ]
    return made[0], made[1] if len(made) > 1 else None


def _baselines(
    theirs: Callable[[], object] | None, plain: Callable[[], object], setting: Setting, goal: float | None = GOAL
) -> tuple[Baseline, Baseline]:
    note = "" if theirs is not None else "not installed: guided_diffusion"
    return (
        Baseline("guided-diffusion", theirs, cpu_target(goal, setting), note),
        Baseline("transcription", plain, None),
    )


def step(
    name: str,
    setting: Setting,
    shape: tuple[int, ...],
    kind: str = "p_sample",
    variance: str = "FIXED_SMALL",
    drawn: bool = False,
) -> Case:
    """`p_sample` or `ddim_sample` at timesteps of a tensor."""
    from helpers.guided_diffusion_algorithms import Chain

    ours_d, theirs_d = _diffusions(variance)
    channels = shape[1] * (2 if variance.startswith("LEARNED") else 1)
    x, z = (random_tensor(k, shape, setting) for k in (0, 1))
    m = random_tensor(2, (shape[0], channels, *shape[2:]), setting)
    t = torch.full((shape[0],), ROW, device=setting.device)
    calls = 1 if shape == LARGE else 20
    chain = Chain(ours_d.betas, "EPSILON", variance)
    for table in ("beta", "abar", "before", "after", "beta_tilde", "safe"):
        setattr(chain, table, getattr(chain, table).to(setting.device))

    def given(x: Tensor) -> Tensor:
        return z

    def times(call: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            if drawn:
                for _ in range(calls):
                    out = call()
                return out
            with mock.patch("torch.randn_like", given):
                for _ in range(calls):
                    out = call()
        return out

    def run(d: Any) -> Tensor:
        return times(lambda: getattr(d, kind)(lambda x, t: m, x, t)["sample"])

    def formula(chain: Chain, x: Tensor, m: Tensor, z: Tensor) -> Tensor:
        made = chain.ddpm if kind == "p_sample" else chain.ddim
        return made(lambda x, t: m, x, t.to(x.device), z)[0]

    def check() -> list[Check]:
        exact = Chain(ours_d.betas, "EPSILON", variance)
        with mock.patch("torch.randn_like", given):
            want = formula(exact, *(v.cpu().double() for v in (x, m, z)))
            named = {"ours": ours_d} if theirs_d is None else {"ours": ours_d, "guided-diffusion": theirs_d}
            return [compare(who, run(d), want, loose(x.dtype)) for who, d in named.items()]

    theirs = None if theirs_d is None else (lambda: run(theirs_d))
    baselines = _baselines(
        theirs,
        lambda: times(lambda: formula(chain, x, m, torch.randn_like(x) if drawn else z)),
        setting,
        None if drawn else GOAL,  # most of the time is torch's generator's
    )
    title = f"guided-diffusion {kind}, {variance.lower()}" + (", noise drawn" if drawn else "")
    # Read: x, m, z (DDIM at eta 0 reads none of it); written: x' and x0.
    moved = bytes_of(x, m if kind == "p_sample" else x, x, x) + (bytes_of(z) if kind == "p_sample" else 0)
    return Case(
        name,
        title,
        shape,
        x.dtype,
        lambda: run(ours_d),
        baselines,
        check,
        moved,
        steps=calls,
        overhead=True,
        counted=True,
    )


def losses(name: str, setting: Setting, shape: tuple[int, ...], exact: bool = False) -> Case:
    """`training_losses` of a learned variance (RESCALED_MSE) with its gradient; no sample is at t = 0."""
    from helpers.guided_diffusion_algorithms import Chain

    ours_d, theirs_d = _diffusions("LEARNED_RANGE", "RESCALED_MSE")
    ours_d.diffkern(exact=exact)
    x = (random_tensor(0, shape, setting)).clamp(-1, 1)
    z = random_tensor(1, shape, setting)
    m = random_tensor(2, (shape[0], 2 * shape[1], *shape[2:]), setting).requires_grad_()
    t = torch.randint(1, 250, (shape[0],), generator=torch.Generator().manual_seed(1)).to(setting.device)
    chain = Chain(ours_d.betas, "EPSILON", "LEARNED_RANGE")

    def run(d: Any) -> tuple[Tensor, Tensor]:
        value = d.training_losses(lambda x, t: m, x, t, noise=z)["loss"]
        return value, torch.autograd.grad(value.mean(), m)[0]

    def formula(x: Tensor, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        value = chain.losses(lambda x, t: m, x, t.to(x.device), z, "RESCALED_MSE")["loss"]
        return value, torch.autograd.grad(value.mean(), m)[0]

    def check() -> list[Check]:
        leaf = m.detach().cpu().double().requires_grad_()
        want, want_grad = formula(x.cpu().double(), leaf, z.cpu().double())
        scale, checks = 1 / float(want_grad.abs().max()), []
        for who, d in (("ours", ours_d), ("guided-diffusion", theirs_d)):
            if d is not None:
                value, grad = run(d)
                checks.append(compare(f"{who} value", value, want, loose(x.dtype)))
                checks.append(compare(f"{who} gradient", grad * scale, want_grad * scale, loose(x.dtype)))
        return checks

    theirs = None if theirs_d is None else (lambda: run(theirs_d))
    return Case(
        name,
        "guided-diffusion training_losses + gradient, learned variance" + (", exact" if exact else ""),
        shape,
        x.dtype,
        lambda: run(ours_d),
        _baselines(theirs, lambda: formula(x, m, z), setting),
        check,
        bytes_of(x, z, x) + bytes_of(m, m) + bytes_of(x, z, x),
        grad=True,
    )


TABLE: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
    f"guided-diffusion-{name}{size}": (step, {"shape": shape, **options})
    for size, shape in (("", SMALL), ("-large", LARGE))
    for name, options in (
        ("p", {}),
        ("p-learned", {"variance": "LEARNED_RANGE"}),
        ("ddim", {"kind": "ddim_sample"}),
        ("p-drawn", {"drawn": True}),
        ("ddim-drawn", {"kind": "ddim_sample", "drawn": True}),
    )
}
TABLE |= {
    "guided-diffusion-losses": (losses, {"shape": SMALL}),
    "guided-diffusion-losses-large": (losses, {"shape": LARGE}),
}

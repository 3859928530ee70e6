"""The pictures of the demo: dark ink on white, enlarged smoothly, with the words a reader needs beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern import ops, pictures
from diffkern.diffusion import Diffusion
from diffkern.generate import recommended
from diffkern.objectives.losses import noised

STEPS = 50
"""Of the sampler whose trajectory is drawn."""


def forward_strip(images: Tensor, diffusion: Diffusion, *, columns: int = 11, seed: int = 0) -> Any:
    """The forward process: a row an image, from clean data to noise, every column q(x_t | x_0) with the same eps
    (lecture 000)."""
    schedule, seeds = diffusion.schedule, ops.seeds(seed, len(images))
    times = [round((schedule.time_range[1]) * c / (columns - 1)) for c in range(columns)]
    shown = [noised(images, torch.full((len(images),), t), schedule, seeds=seeds) for t in times]
    title = f"Forward process, {schedule.name} schedule: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps"
    return pictures.grid(list(torch.stack(shown, dim=1)), [f"t={t}" for t in times], title=title, ink=True)


def trajectory_strip(diffusion: Diffusion, classes: int, guidance: float, *, columns: int = 11, seed: int = 0) -> Any:
    """The states of DDIM from noise to digits: a row a class, a column every few steps."""
    plan = recommended(diffusion, "ddim", STEPS)
    cond = torch.arange(classes, device=next(diffusion.parameters()).device)
    run = diffusion.sample(classes, plan, seeds=seed, cond=cond, guidance=guidance, trajectory=True)
    assert run.trajectory is not None
    states = run.trajectory.cpu()
    shown = [round((len(states) - 1) * c / (columns - 1)) for c in range(columns)]
    title = f"{plan.name}, {len(states) - 1} steps: the state after so many steps"
    rows, names = list(states[shown].transpose(0, 1)), [str(c) for c in range(classes)]
    return pictures.grid(rows, [str(i) for i in shown], names, title=title, ink=True)

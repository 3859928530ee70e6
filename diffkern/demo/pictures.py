"""The pictures of the demo: dark ink on white, enlarged smoothly, with the words a reader needs beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern import ops, pictures, streams
from diffkern.names import Prediction
from diffkern.nn import UNet
from diffkern.plan import Plan
from diffkern.sampling.runner import initial, sample
from diffkern.schedules.discrete import DiscreteSchedule


def forward_strip(
    images: Tensor, schedule: DiscreteSchedule, prediction: Prediction, *, columns: int = 11, seed: int = 0
) -> Any:
    """The forward process: a row an image, from clean data to noise, every column q(x_t | x_0) with the same eps
    (lecture 000)."""
    last = schedule.T - 1
    times = [round(last * c / (columns - 1)) for c in range(columns)]
    table, seeds = schedule.table(prediction), ops.seeds(seed, len(images))
    noised = [ops.noising(images, table, torch.tensor(t), seeds=seeds, stream=streams.TRAINING)[0] for t in times]
    headings = [f"t={t}" for t in times]
    title = f"Forward process, {schedule.name} schedule: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps"
    return pictures.grid(list(torch.stack(noised, dim=1)), headings, title=title, ink=True)


def trajectory_strip(
    model: UNet, plan: Plan, classes: Tensor, *, guidance: float, columns: int = 11, seed: int = 0
) -> Any:
    """The states of a sampler from noise to digits: a row a class, a column every few steps."""
    device = next(model.parameters()).device
    config = model.config
    seeds, cond = ops.seeds(seed, len(classes)).to(device), classes.to(device)
    x = initial(plan, (len(classes), *config.shape), seeds, device=device)
    none = torch.full_like(cond, model.null_class)
    run = sample(model, x, plan, seeds=seeds, cond=cond, uncond=none, guidance=guidance, trajectory=True)
    assert run.trajectory is not None
    states = run.trajectory.cpu()
    shown = [round((len(states) - 1) * c / (columns - 1)) for c in range(columns)]
    title = f"{plan.name}, {len(states) - 1} steps: the state after so many steps"
    rows = list(states[shown].transpose(0, 1))
    return pictures.grid(rows, [str(i) for i in shown], [str(c) for c in classes.tolist()], title=title, ink=True)

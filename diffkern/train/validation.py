"""The loss on images kept apart, comparable from step to step and from run to run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffkern import ops, parallel
from diffkern.data import Images
from diffkern.diffusion import Diffusion
from diffkern.objectives.losses import noised
from diffkern.objectives.variational import Variance, prior_bits, vlb_loss
from diffkern.schedules.discrete import DiscreteSchedule

__all__ = ["Validation", "validate"]

SEED = 0x76616C
"""Of times and noise: the same in every run, whatever its own seed."""


class Validation(NamedTuple):
    """Means over the images."""

    loss: float
    bits_per_dim: float | None
    """An unbiased estimate of the variational bound, one time an image; of models with a table alone."""


@torch.no_grad()
def validate(diffusion: Diffusion, images: Images, *, batch: int = 64) -> Validation:
    """The training loss of the images, and the bound in bits per dimension where the model has one.

    Image i has the same time and noise in every call, by address; times are spread evenly over the images. In
    evaluation mode: no dropout, no dropped condition. Processes share the images; sums are merged.
    """
    device = next(diffusion.parameters()).device
    seeds = ops.seeds(SEED, len(images))
    u = (torch.arange(len(images), dtype=torch.float64) + 0.5) / len(images)
    times, schedule = diffusion.times.times(u, diffusion.schedule), diffusion.schedule
    sums = torch.zeros(3, dtype=torch.float64)
    mine, training = parallel.share(len(images)), diffusion.training
    diffusion.eval()
    try:
        for first in range(mine.start, mine.stop, batch):
            chosen = torch.arange(first, min(first + batch, mine.stop))
            x0, labels = images.batch(chosen)
            x0, own = x0.to(device), seeds[chosen].to(device)
            cond = None if labels is None or diffusion.null is None else labels.to(device)
            losses = diffusion.loss(x0, times[chosen].to(device), cond=cond, seeds=own, reduction="none")
            sums[0] += losses.double().sum().cpu()
            sums[2] += len(chosen)
            if isinstance(schedule, DiscreteSchedule):
                t = (u[chosen] * schedule.T).to(torch.int64).to(device)
                sums[1] += _bits(diffusion, schedule, x0, t, own, cond).sum().cpu()
    finally:
        diffusion.train(training)
    total, bits, count = parallel.summed(sums.to(device))[0].tolist()
    return Validation(total / count, bits / count if isinstance(schedule, DiscreteSchedule) else None)


def _bits(
    diffusion: Diffusion, schedule: DiscreteSchedule, x0: Tensor, t: Tensor, seeds: Tensor, cond: Tensor | None
) -> Tensor:
    """T L_t + L_T [B], float64: for uniform t an unbiased estimate of the bound in bits per dimension."""
    prediction = diffusion.prediction
    m = diffusion.network(noised(x0, t, schedule, prediction, seeds=seeds), schedule.model_time(prediction, t), cond)
    variance: Variance = "learned" if diffusion.learned_variance else "beta_tilde"
    terms = vlb_loss(m, x0, t, schedule, prediction, variance=variance, seeds=seeds, reduction="none")
    return terms.double() + prior_bits(x0, schedule)

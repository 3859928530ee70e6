"""The loss on images kept apart, comparable from step to step and from run to run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern import ops, parallel, streams
from diffkern.data import Images
from diffkern.diffusion import Diffusion
from diffkern.draws import uniform_by_address
from diffkern.objectives.losses import noised
from diffkern.objectives.variational import Variance, prior_bits, variational_table
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.train.stepper import examples, in_mode

__all__ = ["Validation", "validate"]

SEED = 0x76616C
"""Of times and noise: the same in every run, whatever its own seed."""


class Validation(NamedTuple):
    """Means over the images."""

    loss: float
    bits_per_dim: float | None
    """An unbiased estimate of `diffkern.bits_per_dim`; of models of images with a table alone."""


@torch.no_grad()
def validate(diffusion: Diffusion, images: Images, *, batch: int = 64, seed: int = SEED) -> Validation:
    """The training loss of the images, and the bound in bits per dimension where the model has one.

    Image i has the same time and noise in every call, by address; times are spread evenly, one in each n-th part of
    their distribution, over the images at random. Of the bound each image has L_0 and L_T exactly and one of the terms
    between them, with x0 held in [-1, 1]. A model in latents has no bound, and is given the modes of the posteriors
    (draws of them where it degrades the images). In evaluation mode: no dropout, no dropped condition. Processes share
    the images; sums are merged.
    """
    count, schedule = len(images), diffusion.schedule
    device = next(diffusion.parameters()).device
    seeds = ops.seeds(seed, count)
    places = torch.argsort(torch.argsort(seeds)).double()
    u = (places + uniform_by_address(seeds, streams.TIME).double()) / count
    times = diffusion.times.times(u, schedule)
    bound = _Bound(diffusion, schedule, device) if isinstance(schedule, DiscreteSchedule) else None
    if diffusion.autoencoder is not None:  # whose latents are no bytes
        bound = None
    sums, mine = torch.zeros(2, dtype=torch.float64), parallel.share(count)
    with in_mode(diffusion, training=False):
        for first in range(
            0, -(-count // parallel.world()), batch
        ):  # as often on every process: FSDP gathers each time
            part = mine[first : first + batch]
            chosen = torch.arange(part.start, part.stop) if part else torch.zeros(1, dtype=torch.int64)
            x0, cond = examples(diffusion, *images.batch(chosen), device)
            x0 = x0 if diffusion.degradation is not None else diffusion.encode(x0)
            own = seeds[chosen].to(device)
            losses = diffusion.loss(x0, times[chosen].to(device), cond=cond, seeds=own, reduction="none")
            found = [losses.double().sum()]
            if bound is not None:
                given = diffusion.condition(x0, cond, own)
                found.append(bound.bits(x0, u[chosen].to(device), own, given).sum())
            if part:
                sums[: len(found)] += torch.stack(found).cpu()
    total, bits = (parallel.summed(sums.to(device))[0] / count).tolist()
    return Validation(total, bits if bound is not None else None)


class _Bound:
    """The variational bound by some of its terms."""

    def __init__(self, diffusion: Diffusion, schedule: DiscreteSchedule, device: torch.device) -> None:
        self.diffusion, self.schedule = diffusion, schedule
        variance: Variance = "learned" if diffusion.learned_variance else "beta_tilde"
        self.table = variational_table(schedule, diffusion.prediction, variance, clip=1.0).to(device)

    def bits(self, x0: Tensor, u: Tensor, seeds: Tensor, cond: Any) -> Tensor:
        """L_0 + (T - 1) L_t + L_T [B], float64, t = 1 + floor((T - 1) u)."""
        last = self.schedule.T - 1
        t = (1 + (u * last).to(torch.int64)).clamp(max=last)
        first, other = (self._term(x0, times, seeds, cond) for times in (torch.zeros_like(t), t))
        return first + last * other + prior_bits(x0, self.schedule)

    def _term(self, x0: Tensor, t: Tensor, seeds: Tensor, cond: Any) -> Tensor:
        diffusion, schedule, prediction = self.diffusion, self.schedule, self.diffusion.prediction
        x_t = noised(x0, t, schedule, prediction, seeds=seeds)
        m = diffusion.network(x_t, schedule.model_time(prediction, t), cond)
        return ops.variational(m, x0, self.table, t, seeds=seeds, stream=streams.TRAINING, reduction="none")[0].double()

"""A diffusion, an optimizer and averages, tiny, and steps of training that depend on their numbers alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from diffkern import Diffusion, schedules
from diffkern.train.ema import Averages
from helpers.diffusion_cases import small_unet

TINY = {"channels": 8, "groups": 4, "heads": 1, "embedding": 16, "multipliers": (1, 1)}


class Trained(NamedTuple):
    diffusion: Diffusion
    averages: Averages
    optimizer: Optimizer

    def steps(self, first: int, last: int) -> list[float]:
        """The losses of these steps, both ends included."""
        losses = []
        for step in range(first, last + 1):
            generator = torch.Generator().manual_seed(step)
            assert self.diffusion.shape is not None
            x0 = torch.rand(2, *self.diffusion.shape, generator=generator) * 2.0 - 1.0
            loss = self.diffusion.loss(x0, seeds=step, cond=torch.tensor([0, 2]))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.averages.update(step)
            losses.append(loss.item())
        return losses

    def tensors(self) -> list[Tensor]:
        """All that training changes: weights, averages, the optimizer's state."""
        averages = [t for name in self.averages.names for t in self.averages.tensors(name).values()]
        moments = [state[key] for state in self.optimizer.state.values() for key in sorted(state)]
        return [*self.diffusion.state_dict().values(), *averages, *moments]


def trained(seed: int = 0, decay: float | None = 0.9, **fields: object) -> Trained:
    diffusion = Diffusion(small_unet(seed, **{**TINY, **fields}), schedules.cosine(20), "v")
    averages = Averages(diffusion, widths=(0.05, 0.1), decay=decay)
    return Trained(diffusion, averages, AdamW(diffusion.parameters(), lr=1e-3))

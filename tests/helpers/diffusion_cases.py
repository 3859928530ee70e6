"""Networks for the model object: the exact one of Gaussian data, and a small UNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffkern.nn import UNet, UNetConfig
from diffkern.schedules import Schedule
from diffkern.schedules.predictions import target_coefficients

STD = 0.5
"""Standard deviation of the data whose network is `Exact`."""


class Exact(nn.Module):
    """E[u x0 + v eps given x] for x0 ~ N(0, STD^2) in float64, and a parameter that does nothing.

    x0 and eps are the linear regressions on x: alpha STD^2 x/s and sigma x/s with s = alpha^2 STD^2 + sigma^2.
    ``times`` is what the network multiplies its time by to find the schedule's.
    """

    def __init__(self, schedule: Schedule, prediction: str, times: float = 1.0) -> None:
        super().__init__()
        self.schedule, self.prediction, self.times = schedule, prediction, times
        self.nothing = nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.seen.append((t, cond, self.training))
        schedule, prediction = self.schedule, self.prediction
        t = t if self.times == 1.0 else t.double() * self.times
        t = (4.0 * t.double()).exp() if prediction == "edm" else t
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        u, v = target_coefficients(schedule, prediction, t)
        factor = (u * alpha * STD**2 + v * sigma) / (alpha**2 * STD**2 + sigma**2)
        factor = factor / schedule.input_scale(prediction, t)
        return (factor.reshape(-1, *(1,) * (x.ndim - 1)) * x + self.nothing).to(x.dtype)


def small_unet(seed: int = 0, **fields: Any) -> UNet:
    """A UNet of 8 x 8 images and 3 classes whose output is not 0."""
    config = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "heads": 2, "embedding": 32, "classes": 3, **fields}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = UNet(UNetConfig(**config))
        nn.init.normal_(net.leave.weight, std=0.1)
    return net

"""Algorithm 2 of arXiv 2206.00364 in plain torch, our own transcription: EDM's code is not on PyPI."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def algorithm_2(
    net: Any,
    latents: Tensor,
    labels: Any,
    randn_like: Any,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
) -> Tensor:
    """The stochastic sampler of the paper, the levels of its equation 5 rounded to those of the network."""
    low, high = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    t = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    t = torch.cat([net.round_sigma(t), torch.zeros(1, dtype=torch.float64)])
    x = latents.double() * t[0]
    for i in range(num_steps):
        gamma = min(S_churn / num_steps, math.sqrt(2) - 1) if S_min <= t[i] <= S_max else 0.0
        t_hat = net.round_sigma(t[i] + gamma * t[i])
        x_hat = x + (t_hat**2 - t[i] ** 2).sqrt() * S_noise * randn_like(x)
        d = (x_hat - net(x_hat, t_hat, labels).double()) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x - net(x, t[i + 1], labels).double()) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_next) / 2
    return x

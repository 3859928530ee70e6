"""The time embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    half = dim // 2
    angles = timesteps.float()[:, None] * torch.exp(torch.arange(half) * (-math.log(max_period) / max(half, 1)))
    zeros = torch.zeros(len(timesteps), dim % 2)
    return torch.cat([angles.cos(), angles.sin(), zeros], 1)

"""The time embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    half = dim // 2
    powers = torch.arange(half, dtype=torch.float32) / max(half, 1)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * powers)
    zeros = torch.zeros(len(timesteps), dim % 2, dtype=torch.float32)
    return torch.cat([angles.cos(), angles.sin(), zeros], 1)

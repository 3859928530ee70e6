"""Models and runs that the comparisons of samplers with other libraries share."""

from __future__ import annotations

import torch
from torch import Tensor


def model(x: Tensor, t: Tensor | float) -> Tensor:
    """Elementwise eps, smooth in x and time."""
    time = torch.as_tensor(t, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return 0.8 * torch.tanh(x) + 0.1 * torch.cos(0.003 * time) * x - 0.05

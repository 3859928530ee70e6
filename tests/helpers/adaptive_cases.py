"""Schedules, exact models and starts that the tests of adaptive steps share."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern import samplers, schedules
from diffkern.sampling import initial

LINEAR, VP, SUB_VP, VE = schedules.linear(), schedules.vp(), schedules.sub_vp(), schedules.ve()
EDM, FLOW = schedules.edm(), schedules.flow()
SHAPE = (3, 2, 4)


def start(schedule: schedules.Schedule, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return initial(samplers.euler(schedule, 1), shape, 1, dtype)


def network(x: Tensor, t: Tensor) -> Tensor:
    """Elementwise; its slope differs in size from element to element, and with time."""
    time = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return torch.tanh(3 * x) - 0.1 * torch.cos(0.01 * time) * x

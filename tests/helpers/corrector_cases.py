"""Schedules and exact models that the tests of predictor and corrector share."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern import schedules

SHAPE = (3, 2, 4, 5)
SEEDS = torch.tensor([11, -5, 2**62], dtype=torch.int64)
N = 40
VP_TABLE = schedules.from_betas(torch.linspace(0.1 / N, 20 / N, N, dtype=torch.float64))
VE, VP, SUB_VP, EDM, FLOW = schedules.ve(), schedules.vp(), schedules.sub_vp(), schedules.edm(), schedules.flow()
SCHEDULES = [schedules.linear(), VP, SUB_VP, VE, EDM, FLOW]


def network(x: Tensor, t: Tensor | float) -> Tensor:
    """Elementwise, so that a sample cannot see its batch; smooth in time."""
    time = torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return 0.6 * torch.tanh(x) - 0.05 * torch.sin(0.01 * time) * x + 0.1


def draw(n: int, seed: int = 3, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(n)]

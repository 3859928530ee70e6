"""Plans, an elementwise network and starting states that the tests of `sample` share."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern import samplers, schedules
from diffkern.plan import Plan
from diffkern.sampling import initial

LINEAR, COSINE, FLOW, EDM = schedules.linear(), schedules.cosine(), schedules.flow(), schedules.edm()
SHAPE = (3, 2, 5, 4)
SEEDS = torch.tensor([11, -5, 2**62], dtype=torch.int64)

PLANS = {
    "ddpm": samplers.ddpm(COSINE, 12),
    "ddpm_clip": samplers.ddpm(COSINE, 12, variance="beta", clip=0.7),
    "ddim": samplers.ddim(LINEAR, 10),
    "ddim_eta_clip": samplers.ddim(LINEAR, 10, eta=0.7, clip=0.8, prediction="v"),
    "euler": samplers.euler(LINEAR, 8),
    "euler_edm": samplers.euler(EDM, 8),
    "heun": samplers.heun(LINEAR, 8, clip=1.5),
    "heun_edm": samplers.heun(EDM, 8),
    "euler_flow": samplers.euler(FLOW, 8),
    "heun_flow": samplers.heun(FLOW, 8),
}


def network(x: Tensor, t: Tensor | float) -> Tensor:
    """Elementwise, so a sample cannot see its batch; smooth in time."""
    time = torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return 0.6 * torch.tanh(x) - 0.05 * torch.sin(0.01 * time) * x + 0.1


def start_of(plan: Plan, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return initial(plan, shape, SEEDS[: shape[0]], dtype)

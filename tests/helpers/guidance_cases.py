"""Models, conditions and plans that the tests of guidance share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern import ops, schedules

LINEAR, COSINE, FLOW, EDM = schedules.linear(), schedules.cosine(), schedules.flow(), schedules.edm()
SHAPE = (3, 2, 5, 4)
SEEDS = torch.tensor([11, -5, 2**62], dtype=torch.int64)
C, U = torch.tensor([0.3, -0.8, 0.5]), torch.tensor([0.1, 0.1, 0.1])


def column(t: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def net(x: Tensor, t: Any, c: Tensor) -> Tensor:
    """Elementwise, so that a sample cannot see its batch."""
    return 0.6 * torch.tanh(x + column(c, x)) - 0.05 * torch.sin(0.01 * column(t, x)) * x


class Calls:
    """A model that counts the inputs of each call."""

    def __init__(self, model: Any = net) -> None:
        self.model, self.sizes = model, []

    def __call__(self, x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.sizes.append(x.shape[0])
        return self.model(x, t, *args, **kwargs)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return ops.randn(shape, ops.seeds(seed, shape[0]), dtype=dtype)


X, T = noise(*SHAPE), torch.tensor([900, 500, 20])


def label(j: int, batch: int = 3) -> Tensor:
    return torch.full((batch,), j)


# --- rescale ----------------------------------------------------------------------------------------------------------


def rescale_noise_cfg(noise_cfg: Tensor, noise_pred_text: Tensor, guidance_rescale: float) -> Tensor:
    """arXiv 2305.08891, section 3.4, as diffusers has it."""
    std_text = noise_pred_text.std(dim=list(range(1, noise_pred_text.ndim)), keepdim=True)
    std_cfg = noise_cfg.std(dim=list(range(1, noise_cfg.ndim)), keepdim=True)
    rescaled = noise_cfg * (std_text / std_cfg)
    return guidance_rescale * rescaled + (1 - guidance_rescale) * noise_cfg

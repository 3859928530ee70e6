"""The helpers of k-diffusion's that samplers and wrappers of models share."""

from __future__ import annotations

import torch
from torch import Tensor


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """x with dimensions of size 1 behind it, up to ``target_dims``; raises ValueError if it has more."""
    missing = target_dims - x.ndim
    if missing < 0:
        raise ValueError(f"input has {x.ndim} dims but target_dims is {target_dims}, which is less")
    return x.reshape(x.shape + (1,) * missing)


def append_zero(x: Tensor) -> Tensor:
    """x with a 0 behind it."""
    return torch.cat([x, x.new_zeros([1])])


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """dx/dsigma = (x - denoised)/sigma, sigma [] or [B]."""
    return (x - denoised) / append_dims(sigma, x.ndim)

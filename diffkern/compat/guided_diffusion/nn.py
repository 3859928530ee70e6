"""guided-diffusion's helpers for networks: the time embedding and the mean over all but the batch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from diffkern.nn.embeddings import sinusoidal_embedding

__all__ = ["mean_flat", "timestep_embedding"]


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """[N] times (any dtype) to [N, dim] float32: cos(t f_i), then sin(t f_i), f_i = max_period^(-i / (dim // 2)).

    `diffkern.nn.sinusoidal_embedding` (Vaswani et al. 2017; Ho et al. 2020; lectures 000 and 002), made on the device
    of the times; an odd dim ends with a column of zeros.
    """
    if timesteps.dim() != 1:
        raise ValueError(f"timesteps must have shape [N], got {list(timesteps.shape)}")
    embedding = sinusoidal_embedding(timesteps, dim - dim % 2, max_period)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean over all dimensions but the first: [N, ...] to [N]."""
    return tensor.mean(dim=tuple(range(1, tensor.dim())))

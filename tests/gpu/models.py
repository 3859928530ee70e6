"""Exact models that the GPU checks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern import schedules

SHAPE = (3, 4, 9, 11)
LINEAR, COSINE, FLOW, EDM = schedules.linear(), schedules.cosine(), schedules.flow(), schedules.edm()


class ExactModel:
    """An elementwise model whose operations round once, with constants of few bits: the same bits on every device.

    It allocates in its first calls only, one buffer for each kind of input.
    """

    def __init__(self) -> None:
        self.buffers: dict[Any, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        key = (x.device, x.dtype, x.shape, x.stride())
        if key not in self.buffers:
            times = torch.empty(t.shape, dtype=torch.float32, device=x.device)
            self.buffers[key] = torch.empty_like(x), times
        out, times = self.buffers[key]
        each = (-1, *(1,) * (x.dim() - 1))
        torch.mul(t, 2.0**-11, out=times)
        torch.mul(x, 0.75, out=out)
        out.clamp_(-1.5, 1.5).add_(times.view(each))
        return out if cond is None else out.add_(cond.view(each))

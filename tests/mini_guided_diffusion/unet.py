"""Attention, and a network with both of its layouts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .nn import timestep_embedding


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q^T k / sqrt(C)) v over [batch, C, T]: roots of the scale on q and k, the softmax in float32 at least."""
    root = q.shape[1] ** -0.25
    logits = torch.einsum("bct,bcs->bts", q * root, k * root)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.einsum("bts,bcs->bct", logits.to(wide).softmax(-1).to(logits.dtype), v)


def count_flops(layer: Any, x: Any, y: Any) -> None:
    b, c, *spatial = y[0].shape
    layer.total_ops += torch.DoubleTensor([2 * b * math.prod(spatial) ** 2 * c])


class QKVAttentionLegacy(nn.Module):
    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        n, _, length = qkv.shape
        q, k, v = qkv.reshape(n * self.n_heads, -1, length).chunk(3, 1)
        return attend(q, k, v).reshape(n, -1, length)


class QKVAttention(nn.Module):
    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        n, _, length = qkv.shape
        q, k, v = (t.reshape(n * self.n_heads, -1, length) for t in qkv.chunk(3, 1))
        return attend(q, k, v).reshape(n, -1, length)


class Net(nn.Module):
    """[B, C, H, W] and times to the same shape; ``learn_sigma``: twice the channels."""

    def __init__(self, channels: int = 3, width: int = 32, heads: int = 2, learn_sigma: bool = False) -> None:
        super().__init__()
        self.width = width
        self.inner = nn.Conv1d(channels, width, 1)
        self.time = nn.Linear(width, width)
        self.qkv = nn.ModuleList(nn.Conv1d(width, 3 * width, 1) for _ in range(2))
        self.attention = nn.ModuleList([QKVAttentionLegacy(heads), QKVAttention(heads)])
        self.outer = nn.Conv1d(width, channels * (1 + learn_sigma), 1)

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        h = self.inner(x.flatten(2)) + self.time(timestep_embedding(t, self.width))[..., None]
        for qkv, attention in zip(self.qkv, self.attention, strict=True):
            h = h + attention(qkv(h))
        return self.outer(h).unflatten(2, x.shape[2:])

"""Weights that a network's description asks for by name and shape: random ones, made when they are first asked for.

A transcription of a network is then one function: what it computes says which tensors a state dict of it has.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Weights:
    """``device`` "meta": names and shapes alone."""

    state: dict[str, Tensor] = field(default_factory=dict)
    device: str = "cpu"
    closed: bool = False
    """Whether a name that ``state`` lacks is an error."""
    asked: set[str] = field(default_factory=set)
    constants: set[str] = field(default_factory=set)

    def __call__(self, name: str, *shape: int) -> Tensor:
        self.asked.add(name)
        if name not in self.state:
            assert not self.closed, name
            made = torch.empty(shape, device=self.device)
            if self.device == "cpu":
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                made.normal_(generator=generator).mul_(1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1)
                if len(shape) == 1 and name.endswith("weight"):
                    made += 1.0
            self.state[name] = made
        assert tuple(self.state[name].shape) == shape, (name, self.state[name].shape, shape)
        return self.state[name]

    def constant(self, name: str, value: Tensor) -> Tensor:
        """A buffer of this value."""
        self.constants.add(name)
        self.asked.add(name)
        found = self.state.setdefault(name, value.to(self.device))
        assert self.device == "meta" or torch.equal(found, value), name
        return found

    def count(self) -> int:
        """Of parameters."""
        return sum(tensor.numel() for name, tensor in self.state.items() if name not in self.constants)

    def affine(self, name: str, x: Tensor, out: int, bias: bool = True) -> Tensor:
        """A linear layer of [B, features]."""
        y = x @ self(f"{name}.weight", out, x.shape[1]).T
        return y + self(f"{name}.bias", out) if bias else y

    def conv(self, name: str, x: Tensor, out: int, size: int, stride: int = 1, axes: int = 2) -> Tensor:
        """A convolution that keeps the size, or halves it; ``axes`` 1: a 1 x 1 one whose weight has one axis less."""
        weight = self(f"{name}.weight", out, x.shape[1], *(size,) * axes)
        bias = self(f"{name}.bias", out)
        return F.conv2d(x, weight if axes == 2 else weight[..., None], bias, stride, size // 2)

    def group_norm(self, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
        """By the formula: (x - mean) / sqrt(var + eps) weight + bias, over each group of a sample."""
        grouped = x.reshape(x.shape[0], groups, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        normed = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
        over = (1, -1, *(1,) * (x.dim() - 2))
        return normed * self(f"{name}.weight", x.shape[1]).view(over) + self(f"{name}.bias", x.shape[1]).view(over)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q^T k / sqrt(D)) over [..., D, N]."""
    return v @ (q.transpose(-1, -2) @ k / math.sqrt(q.shape[-2])).softmax(-1).transpose(-1, -2)

"""The DiT of Peebles & Xie 2023 (arXiv 2212.09748), written from the paper, with the names of its checkpoints.

Plain torch, one step after the other, softmax attention written out: what `diffkern.nn.DiT` is compared with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def waves(t: Tensor, channels: int, freq_shift: float = 0.0) -> Tensor:
    half = channels // 2
    angles = [t.double() * math.exp(-math.log(10000.0) * i / (half - freq_shift)) for i in range(half)]
    return torch.stack([a.cos() for a in angles] + [a.sin() for a in angles], dim=1)


def positions(rows: int, columns: int, channels: int) -> Tensor:
    """[1, rows columns, channels]: column, then row, each by sines, then cosines."""
    quarter = channels // 4
    table = torch.empty(rows, columns, channels, dtype=torch.float64)
    for y in range(rows):
        for x in range(columns):
            for i in range(quarter):
                f = 10000.0 ** (-i / quarter)
                for part, value in enumerate((math.sin(x * f), math.cos(x * f), math.sin(y * f), math.cos(y * f))):
                    table[y, x, part * quarter + i] = value
    return table.reshape(1, rows * columns, channels)


class Patches(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)


class Times(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))


class Labels(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)


def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).unbind(2)
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(math.sqrt(width // self.heads)).softmax(-1)
        return self.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, between: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, between), nn.Linear(between, width)

    def forward(self, x: Tensor) -> Tensor:
        u = self.fc1(x)
        return self.fc2(0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = SelfAttention(width, heads), Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(normed(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(normed(x, shift2, scale2))


class Final(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class Original(nn.Module):
    """Square images; float64, so that the rounding is ours."""

    pos_embed: Tensor

    def __init__(
        self, size: int, patch: int, channels: int, width: int, depth: int, heads: int, classes: int, out_channels: int
    ) -> None:
        super().__init__()
        self.patch, self.out_channels = patch, out_channels
        self.x_embedder, self.t_embedder = Patches(channels, width, patch), Times(256, width)
        self.y_embedder = Labels(classes, width)
        self.pos_embed = nn.Parameter(positions(size // patch, size // patch, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = Final(width, patch * patch * out_channels)
        self.double()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        p = self.patch
        batch, _, height, width = x.shape
        h = self.x_embedder.proj(x.double()).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder.mlp(waves(t, 256)) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, dim=1)
        h = self.final_layer.linear(normed(h, shift, scale))
        h = h.reshape(batch, height // p, width // p, p, p, self.out_channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, height, width)

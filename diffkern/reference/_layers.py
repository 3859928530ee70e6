"""What networks are made of, in plain torch: attention, normalisation, products and convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkern.names import HeadOrder


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, compute: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and the logarithms of the sums of exponentials, [B, H, N, D] and [B, H, N]."""
    logits = q.to(compute) @ k.to(compute).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return logits.softmax(-1) @ v.to(compute), logits.logsumexp(-1)


def spatial_attention(
    qkv: Tensor,
    num_heads: int,
    order: HeadOrder = "new",
    scale: float | None = None,
    *,
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """`attention` over the positions of [B, 3 C, ...], q, k and v copied out of it: [B, C, ...] and [B, heads, N]."""
    batch, channels, *positions = qkv.shape
    dim = channels // (3 * num_heads)
    orders = {"new": ((3, num_heads, dim), 1), "legacy": ((num_heads, 3, dim), 2), "edm": ((num_heads, dim, 3), 3)}
    axes, part = orders[order]
    parts = qkv.reshape(batch, *axes, math.prod(positions)).movedim(part, 0)
    q, k, v = (part.transpose(-1, -2) for part in parts)  # each [B, heads, N, D]
    out, lse = attention(q, k, v, scale, compute=compute)
    return out.transpose(-1, -2).reshape(batch, channels // 3, *positions), lse


def group_norm_act(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    eps: float = 1e-5,
    act: str | None = "silu",
    compute: torch.dtype = torch.float64,
) -> Tensor:
    """act((x_hat weight + bias) (1 + scale) + shift), x_hat: x + add normalised over each group. Differentiable."""

    def of_channels(t: Tensor) -> Tensor:
        return t.to(compute).reshape(-1, x.shape[1], *(1,) * (x.dim() - 2))

    h = x.to(compute) if add is None else x.to(compute) + of_channels(add)
    each = h.reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    apart = each - each.mean(2, keepdim=True)
    u = (apart / (apart.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
    for factor, term in ((weight, bias), (None if scale is None else 1 + scale.to(compute), shift)):
        u = u if factor is None else u * of_channels(factor)
        u = u if term is None else u + of_channels(term)
    return u * torch.sigmoid(u) if act == "silu" else u


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, act: str | None = None) -> Tensor:
    """act(x) weight^T + bias in float64. Differentiable."""
    u = x.double()
    y = (u * torch.sigmoid(u) if act == "silu" else u) @ weight.double().t()
    return y if bias is None else y + bias.double()


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, upsample: bool = False) -> Tensor:
    """The sum over the taps of the image, with a border of zeros, in float64. Differentiable."""
    u = x.double()
    u = u.repeat_interleave(2, 2).repeat_interleave(2, 3) if upsample else u
    height, width = u.shape[2:]
    u = torch.nn.functional.pad(u, (1, 1, 1, 1))
    taps = [(i, j) for i in range(3) for j in range(3)]
    parts = [
        torch.einsum("bchw,kc->bkhw", u[..., i : i + height, j : j + width], weight.double()[..., i, j])
        for i, j in taps
    ]
    y = torch.stack(parts).sum(0)
    return y if bias is None else y + bias.double()[:, None, None]

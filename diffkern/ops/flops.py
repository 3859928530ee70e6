"""Floating-point operations of the ops whose time is products, for torch's counter:

    with FlopCounterMode(custom_mapping=FLOP_FORMULAS): model(x, t)

A multiplication and an addition are two, as torch counts; a convolution counts as the direct one, whatever products it
is computed by; attention counts its products alone, the gradient's with the logits made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["FLOP_FORMULAS"]

Shape = Sequence[int]


def _attention(q: Shape, k: Shape, v: Shape, *rest: Any, **options: Any) -> int:
    batch, heads, n, d = q
    return 2 * batch * heads * n * k[2] * (d + v[3])


def _attention_grad(grad_out: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, **options: Any) -> int:
    """q k', dq, dk: three products over d; grad v', dv: two over the values' size."""
    batch, heads, n, d = q
    return 2 * batch * heads * n * k[2] * (3 * d + 2 * v[3])


def _spatial(qkv: Shape, heads: int) -> list[int]:
    """[B, heads, N, D] of q, k and v in [B, 3 heads D, ...]."""
    n = 1
    for size in qkv[2:]:
        n *= size
    return [qkv[0], heads, n, qkv[1] // (3 * heads)]


def _spatial_attention(qkv: Shape, heads: int, *rest: Any, **options: Any) -> int:
    part = _spatial(qkv, heads)
    return _attention(part, part, part)


def _spatial_attention_grad(
    grad_out: Shape, qkv: Shape, out: Shape, lse: Shape, heads: int, *rest: Any, **options: Any
) -> int:
    part = _spatial(qkv, heads)
    return _attention_grad(grad_out, part, part, part)


def _conv3x3(x: Shape, weight: Shape, *rest: Any, out_shape: Shape, **options: Any) -> int:
    batch, channels, height, width = out_shape
    return 2 * 9 * weight[1] * batch * channels * height * width


def _linear_rows(x: Shape, weight: Shape, *rest: Any, **options: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.diffkern.attention: _attention,
    torch.ops.diffkern.attention_grad: _attention_grad,
    torch.ops.diffkern.spatial_attention: _spatial_attention,
    torch.ops.diffkern.spatial_attention_grad: _spatial_attention_grad,
    torch.ops.diffkern.conv3x3: _conv3x3,
    torch.ops.diffkern.linear_rows: _linear_rows,
}
"""From shapes to operations, by op."""

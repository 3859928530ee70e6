"""guided-diffusion's attention on `diffkern.spatial_attention`: nothing of size T x T, q, k and v read in place."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.compat.kit.kernels import why_not_channels, why_not_on, why_torch
from diffkern.names import HeadOrder
from diffkern.ops import spatial_attention

__all__ = ["FALLBACKS", "QKVAttention", "QKVAttentionLegacy", "qkv_attention"]

FALLBACKS: Counter[str] = Counter()
"""Reason -> number of calls of this process that ran on torch's own attention: there is no kernel, or it is faster."""


def qkv_attention(qkv: Tensor, n_heads: int, order: HeadOrder) -> Tensor:
    """softmax(q^T k / sqrt(C)) v of every head: [N, 3 H C, T] to [N, H C, T], in the dtype of qkv.

    ``order``: "legacy" where a head's q, k and v stand together, "new" where all q come first
    (`diffkern.spatial_attention`). Logits, softmax and sums are float32 whatever the dtype (float64 for float64), where
    the original has the logits and the weights of 16-bit tensors in 16 bits.
    There are kernels for C = 8, 16, ..., 256 and 512, on the CPU and CUDA: any other call runs on
    F.scaled_dot_product_attention, with a RuntimeWarning and a count in `FALLBACKS`; so does, without a warning, one
    that it does faster (bfloat16 on processors with AMX).
    Raises ValueError for tensors that are not 3-D and AssertionError, as the original, for channels that do not divide.
    """
    if qkv.dim() != 3:
        raise ValueError(f"qkv must have shape [N, 3 H C, T], got {list(qkv.shape)}")
    width, length = qkv.shape[1:]
    if n_heads < 1 or width % (3 * n_heads):
        raise AssertionError(f"the channels of qkv must be a multiple of 3 x {n_heads} heads, got {width}")
    dim = width // (3 * n_heads)
    reason = why_not_channels(dim)
    if reason is None and not qkv.is_meta:  # of which the op tells the shape
        reason = why_not_on(qkv)
    if reason is not None:
        if not torch.compiler.is_compiling():
            warnings.warn(f"attention runs on torch's own kernels: {reason}", RuntimeWarning, stacklevel=3)
        return _by_torch(qkv, n_heads, order, reason)
    columns = length > 1 and qkv.stride(1) != 1
    reason = why_torch(qkv, dim, length, length, "nchw" if columns else "channels_last")
    if reason is not None:
        return _by_torch(qkv, n_heads, order, reason, copies=columns)
    if length > 1 and qkv.stride(2) != 1 and qkv.stride(1) != 1:
        qkv = qkv.contiguous()  # neither positions nor channels lie next to each other
    return spatial_attention(qkv, n_heads, order)


def _by_torch(qkv: Tensor, heads: int, order: HeadOrder, reason: str, copies: bool = False) -> Tensor:
    """``copies``: with the channels contiguous, which its kernel is several times faster on."""
    if not torch.compiler.is_compiling():
        FALLBACKS[reason] += 1
    axes, at = ((heads, 3, -1), 2) if order == "legacy" else ((3, heads, -1), 1)
    q, k, v = (t.transpose(-1, -2) for t in qkv.unflatten(1, axes).unbind(at))
    if copies:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)


class _Attention(nn.Module):
    order: ClassVar[HeadOrder]

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        return qkv_attention(qkv, self.n_heads, self.order)

    @staticmethod
    def count_flops(model: Any, _x: Any, y: Any) -> None:
        """thop's hook, as the original's: adds 2 b T^2 c to ``model.total_ops``, b, c and T read off ``y[0]``.

        Given a tensor, as thop gives it, ``y[0]`` is one sample [C, T], and what is added 2 C T; given a tuple, as the
        original's comment has it, the tensor [b, c, T].
        """
        b, c, *spatial = y[0].shape
        model.total_ops += torch.tensor([2.0 * b * math.prod(spatial) ** 2 * c], dtype=torch.float64)


class QKVAttentionLegacy(_Attention):
    """``(n_heads).forward(qkv [N, H 3 C, T]) -> [N, H C, T]``: a head's q, k and v together; OpenAI's checkpoints."""

    order = "legacy"


class QKVAttention(_Attention):
    """``(n_heads).forward(qkv [N, 3 H C, T]) -> [N, H C, T]``: q of all heads, then k, then v."""

    order = "new"

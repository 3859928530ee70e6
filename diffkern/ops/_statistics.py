"""Statistics of each sample: quantile of |x| by selection, the dynamic threshold made of it, mean and deviation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkern.ops._common import empty_like, native, one_device, refuse_batches, refuse_grad, wrote
from diffkern.ops._explained import explained


@explained("quantile")
def quantile(x: Tensor, q: float) -> Tensor:
    """The q-quantile of |x| over each sample, [B]: `torch.quantile(x.float().abs().flatten(1), q, dim=1)`.

    Linear interpolation between the two ranks around q (n - 1), with torch's roundings: q in the dtype of the result,
    the rank in float64, one fused product (torch.lerp on CPUs with AVX2). float32 for float32, float16 and bfloat16 x;
    of float64 values, and float64, for float64 x. A NaN in a sample makes its quantile NaN; so does, as in torch, an
    infinity at the lower rank. Any number of elements a sample (torch.quantile takes at most 2^24).

    No sort and no copy: digits of |x|'s bits are counted in 3 passes (float64: 6). Counts are integers, so the bits do
    not depend on threads, grid, memory format or the other samples. Forward only: raises where x requires grad. Raises
    for q outside [0, 1] and for samples without elements.
    """
    refuse_grad("quantile", x)
    return native.quantile(x, q)


@torch.library.register_fake("diffkern::quantile")
def _(x: Tensor, q: float) -> Tensor:
    return x.new_empty([x.shape[0]], dtype=_wide(x))


@explained("dynamic_threshold")
def dynamic_threshold(x0: Tensor, q: float = 0.995, maximum: float = math.inf) -> Tensor:
    """Dynamic thresholding of a predicted x0 [B, ...]: each sample clamped to its own quantile, and scaled back.

        s   = clamp(quantile(x0, q), 1, maximum)
        out = clamp(x0, -s, s) / s

    Saharia et al. 2022 (Imagen, arXiv 2205.11487), section 2.3; `maximum` is diffusers' sample_max_value. Dtype and
    strides of x0; arithmetic in float32 (float64 for float64), one rounding at the store; NaN stays NaN, and where the
    quantile is NaN the whole sample is. Forward only: raises where x0 requires grad. Raises for q outside [0, 1] and
    for a maximum below 1.
    """
    refuse_grad("dynamic_threshold", x0)
    return native.dynamic_threshold(x0, q, maximum)


@torch.library.register_fake("diffkern::dynamic_threshold")
def _(x0: Tensor, q: float, maximum: float) -> Tensor:
    return empty_like(x0)


@explained("dynamic_threshold_out")
def dynamic_threshold_out(x0: Tensor, q: float = 0.995, maximum: float = math.inf, *, out: Tensor) -> Tensor:
    """`dynamic_threshold` into `out` of the shape and dtype of x0, which may be x0 itself; returns `out`."""
    refuse_grad("dynamic_threshold", x0, out)
    refuse_batches("dynamic_threshold_out", x0, out)
    native.dynamic_threshold_out(x0, q, maximum, out)
    wrote(out)
    return out


@torch.library.register_fake("diffkern::dynamic_threshold_out")
def _(x0: Tensor, q: float, maximum: float, out: Tensor) -> None:
    one_device("dynamic_threshold", x0=x0, out=out)


@explained("moments")
def moments(x: Tensor) -> Tensor:
    """Mean and unbiased standard deviation of each sample, [B, 2]: `torch.std_mean` over all its elements.

        mean = sum_i x_i / n,   deviation = sqrt(sum_i (x_i - mean)^2 / (n - 1))

    Two passes with float32 sums in one fixed order (float64 for float64 x): the bits do not depend on threads, grid or
    the other samples. The order is that of memory where a sample has no gaps, so a memory format may show in the last
    bits. A sample of one element has deviation NaN, one without elements both, as in torch. Forward only: raises where
    x requires grad.
    """
    refuse_grad("moments", x)
    return native.moments(x)


@torch.library.register_fake("diffkern::moments")
def _(x: Tensor) -> Tensor:
    return x.new_empty([x.shape[0], 2], dtype=_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

"""Noise by address: `randn` and `noise_sum`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffkern.ops._common import native, one_device, refuse_batches, refuse_grad, wrote
from diffkern.ops._explained import explain, explained
from diffkern.ops._seeds import Seeds, as_seeds, numbered

_randn: Callable[..., Tensor] = native.randn.default


def randn(
    shape: Sequence[int],
    seeds: Seeds,
    stream: int = 0,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normals by address, [B, ...] on the device of `seeds` (int64 [B], one a sample; or an integer).

    Element i (row-major within its sample) is lane i mod 4 of Philox4x32-10 (Salmon et al. 2011) at counter
    (i div 4, stream) under the key seed, made normal by Box and Muller's transform (1958) in fixed float32 arithmetic.
    The bits depend on nothing else: not on the batch, the memory format, threads, the SIMD level or the device.
    float64 tensors hold the float32 normals, 16-bit tensors the rounded ones. `dtype` is float32 unless given.
    `out`, any strides: written instead; shape and dtype must be its own.
    """
    try:
        if not hasattr(shape, "__iter__"):
            raise RuntimeError(f"diffkern.randn: shape must be a list of integers, got {shape!r}")
        if not isinstance(seeds, Tensor):
            seeds = as_seeds(seeds, shape[0] if len(shape) else 0, None if out is None else out.device)
        if out is None:
            if dtype is not None and dtype is not torch.float32:
                return _randn(list(shape), seeds, stream, dtype)
            if type(stream) is int and stream == 0:
                return _randn(list(shape), seeds)
            return _randn(list(shape), seeds, stream)
        if list(out.shape) != list(shape):
            raise RuntimeError(f"diffkern.randn: out must have shape {list(shape)}, got {list(out.shape)}")
        if dtype is not None and dtype != out.dtype:
            raise RuntimeError(f"diffkern.randn: out must have dtype {dtype}, got {out.dtype}")
        refuse_grad("randn", out)
        native.randn_out(seeds, stream, out)
        wrote(out)
        return out
    except Exception as error:
        explain("randn", randn, locals(), error)
        raise


@torch.library.register_fake("diffkern::randn")
def _(size: Sequence[int], seeds: Tensor, stream: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return seeds.new_empty(size, dtype=dtype)


@torch.library.register_fake("diffkern::randn_out")
def _(seeds: Tensor, stream: int, out: Tensor) -> None:
    one_device("randn", out=out, seeds=seeds)


@explained("noise_sum")
def noise_sum(
    size: Sequence[int],
    seeds: Seeds,
    streams: Tensor,
    weights: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """sum_j weights[j] randn(size, seeds, streams[j]), [B, ...] on the device of `seeds` (int64 [B], or an
    integer).

    streams: int64 [n] in [0, 2^53), weights: finite float64 [n], both on the CPU, n <= 64; n = 0 gives zeros. The terms
    are drawn and added in registers, one fused multiply-add each in the order given: one write, nothing read. float32
    sums, rounded once at the store of 16-bit dtypes; float64 tensors add the float32 normals of `randn` in float64.
    As with `randn` the bits depend on seed, element and terms alone. `diffkern.brownian` gives the terms that make
    increments of a Brownian path.
    """
    if not hasattr(size, "__iter__"):
        raise RuntimeError(f"diffkern.noise_sum: size must be a list of integers, got {size!r}")
    if not isinstance(seeds, Tensor):
        seeds = as_seeds(seeds, size[0] if len(size) else 0)
    refuse_grad("noise_sum", weights)
    return native.noise_sum(list(size), seeds, streams, weights, dtype)


@explained("noise_sum_out")
def noise_sum_out(seeds: Seeds, streams: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """`noise_sum` into `out`, [B, ...] of any floating dtype and any strides; returns it."""
    refuse_grad("noise_sum", out, weights)
    refuse_batches("noise_sum_out", seeds if isinstance(seeds, Tensor) else None, streams, weights, out)
    native.noise_sum_out(numbered(seeds, out), streams, weights, out)
    wrote(out)
    return out


def _check_on_host(streams: Tensor, weights: Tensor) -> None:
    for name, values in (("streams", streams), ("weights", weights)):
        if not values.is_cpu:
            raise RuntimeError(f"diffkern.noise_sum: {name} must be on the CPU, got {values.device}")


@torch.library.register_fake("diffkern::noise_sum")
def _(size: Sequence[int], seeds: Tensor, streams: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    _check_on_host(streams, weights)
    return seeds.new_empty(size, dtype=dtype)


@torch.library.register_fake("diffkern::noise_sum_out")
def _(seeds: Tensor, streams: Tensor, weights: Tensor, out: Tensor) -> None:
    _check_on_host(streams, weights)
    one_device("noise_sum", out=out, seeds=seeds)

"""Noise by address: the seeds of samples, `randn`, and `noise_sum`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffkern.ops._common import native, one_device, refuse_grad, wrote
from diffkern.ops._explained import explained

_INTEGERS = (int, np.integer, torch.SymInt)


def _mix64(z: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers with full avalanche: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


Seeds = int | Tensor
"""What every function takes as its ``seeds``: an integer, of which `seeds` makes one a sample, or int64 [B]."""


def seeds(s: int, n: int, first: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Seeds of the samples first, ..., first + n - 1 of a job with seed `s`, int64 [n].

        seed_j = mix64(mix64(s + 0x9E3779B97F4A7C15) xor mix64(j + 0xD1B54A32D192ED03))

    mix64 is the finaliser of splitmix64. Sample j has the same seed in every split of the job, and jobs with
    neighbouring s share nothing. Who wants image j to have seed s + j passes that tensor instead. Raises ValueError
    unless s, n and first are integers (NumPy's too), and 0 <= first, first + n < 2^63.
    """
    for name, value in (("s", s), ("n", n), ("first", first)):
        if isinstance(value, bool) or not isinstance(value, _INTEGERS):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    s, n, first = (int(value) if isinstance(value, np.integer) else value for value in (s, n, first))
    if n < 0 or first < 0:
        raise ValueError(f"n and first must not be negative, got n={n}, first={first}")
    if first + n >= 2**63:
        raise ValueError(f"first + n must be below 2**63, got first={first}, n={n}")
    with np.errstate(over="ignore"):
        job = _mix64(np.array([s % 2**64], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        sample = np.arange(first, first + n, dtype=np.uint64) + np.uint64(0xD1B54A32D192ED03)
        mixed = _mix64(job ^ _mix64(sample))
    return torch.from_numpy(mixed.view(np.int64)).to(device)


def as_seeds(given: Seeds, n: int, device: torch.device | str | None = None) -> Tensor:
    """The seeds of n samples, int64 [n] on the device: those given, checked, or those of the job that an integer is."""
    if not isinstance(given, Tensor):
        if isinstance(given, bool) or not isinstance(given, _INTEGERS):
            raise ValueError(f"seeds must be an integer or int64 [{n}], got {given!r}")
        return seeds(given, n, device=device)
    if given.dtype != torch.int64 or given.ndim != 1 or given.shape[0] != n:
        shape = list(given.shape)
        raise ValueError(f"seeds must be an integer or int64 [{n}], got {given.dtype} of shape {shape}")
    return given.to(device)


def numbered(given: Seeds | None, *operands: Tensor | None) -> Tensor | None:
    """`as_seeds` for an op whose batch is that of its first operand; tensors are left to the op's own checks."""
    if given is None or isinstance(given, Tensor):
        return given
    like = next(t for t in operands if t is not None)
    return as_seeds(given, like.shape[0] if like.ndim else 0, like.device)


@explained("randn")
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
    if not isinstance(seeds, Tensor):
        seeds = as_seeds(seeds, shape[0] if len(shape) else 0, None if out is None else out.device)
    if out is None:
        return native.randn(list(shape), seeds, stream, torch.float32 if dtype is None else dtype)
    if list(out.shape) != list(shape):
        raise RuntimeError(f"diffkern.randn: out must have shape {list(shape)}, got {list(out.shape)}")
    if dtype is not None and dtype != out.dtype:
        raise RuntimeError(f"diffkern.randn: out must have dtype {dtype}, got {out.dtype}")
    refuse_grad("randn", out)
    native.randn_out(seeds, stream, out)
    wrote(out)
    return out


@torch.library.register_fake("diffkern::randn")
def _(size: Sequence[int], seeds: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
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
    if not isinstance(seeds, Tensor):
        seeds = as_seeds(seeds, size[0] if len(size) else 0)
    return native.noise_sum(list(size), seeds, streams, weights, dtype)


@explained("noise_sum_out")
def noise_sum_out(seeds: Seeds, streams: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """`noise_sum` into `out`, [B, ...] of any floating dtype and any strides; returns it."""
    refuse_grad("noise_sum", out)
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

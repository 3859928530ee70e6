"""The seeds of samples: given one a sample, or of an integer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.integers import as_integer

Seeds = int | Tensor
"""What every function takes as its ``seeds``: an integer, of which `seeds` makes one a sample, or int64 [B]."""


def _mix64(z: Any) -> Any:
    """A bijection of 64-bit integers with full avalanche: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)  # int64 products wrap: those of unsigned integers
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Any, bits: int) -> Any:
    """z >> bits of an unsigned integer."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of value mod 2^64."""
    return value if -(1 << 63) <= value < 1 << 63 else (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _mixed(job: Any, sample: Any, first: int) -> Any:
    """`seeds` of int64 arrays, torch's or NumPy's."""
    sample = sample + _signed(first) + _signed(0xD1B54A32D192ED03)
    return _mix64(_mix64(job + _signed(0x9E3779B97F4A7C15)) ^ _mix64(sample))


def seeds(s: int, n: int, first: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Seeds of the samples first, ..., first + n - 1 of a job with seed `s`, int64 [n].

        seed_j = mix64(mix64(s + 0x9E3779B97F4A7C15) xor mix64(j + 0xD1B54A32D192ED03))

    mix64 is the finaliser of splitmix64. Sample j has the same seed in every split of the job, and jobs with
    neighbouring s share nothing. Who wants image j to have seed s + j passes that tensor instead. Raises ValueError
    unless s, n and first are integers (NumPy's too), and 0 <= first, first + n < 2^63.
    """
    whole = []
    for name, value in (("s", s), ("n", n), ("first", first)):
        found = as_integer(value)
        if found is None:
            raise ValueError(f"{name} must be an integer, got {value!r}")
        whole.append(found)
    s, n, first = whole
    if n < 0 or first < 0:
        raise ValueError(f"n and first must not be negative, got n={n}, first={first}")
    if first + n >= 2**63:
        raise ValueError(f"first + n must be below 2**63, got first={first}, n={n}")
    if torch.compiler.is_compiling():
        job = torch.full((1,), _signed(s), dtype=torch.int64, device="cpu")
        sample = torch.arange(n, dtype=torch.int64, device="cpu")
        return _mixed(job, sample, first).to("cpu" if device is None else device)
    # NumPy takes a third of the time of as many torch ops.
    mixed = _mixed(np.array([_signed(s)], dtype=np.int64), np.arange(n, dtype=np.int64), first)
    return torch.from_numpy(mixed).to("cpu" if device is None else device)


def as_seeds(given: Seeds, n: int, device: torch.device | str | None = None) -> Tensor:
    """The seeds of n samples, int64 [n] on the device: those given, checked, or those of the job that an integer is."""
    if not isinstance(given, Tensor):
        job = as_integer(given)
        if job is None:
            raise ValueError(f"seeds must be an integer or int64 [{n}], got {given!r}")
        return seeds(job, n, device=device)
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

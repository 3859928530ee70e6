"""Calls of noise_sum."""

from __future__ import annotations

import torch
from ptx.harness import Call, seeds_for


def terms(n: int) -> tuple[list[int], list[float]]:
    """n streams with the first and the last there are, weights of both signs that float32 must round."""
    streams = [0, 2**53 - 1, *((5 << 40) + 3**k % 2**24 for k in range(2, n))][:n]
    return streams, [(-1) ** j * 1.7 ** (j % 5) / 3 for j in range(n)]


def noise_sum(layout: str, batch: int, shape: tuple[int, ...], dtype: torch.dtype, n: int = 5) -> Call:
    return Call("noise_sum", layout, batch, shape, {}, {"out": dtype}, seeds=seeds_for(batch), terms=terms(n))

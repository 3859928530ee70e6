"""Calls of forward noising."""

from __future__ import annotations

import torch
from ptx.harness import Call, seeds_for, values, with_changes


def table(rows: int, seed: int = 0) -> torch.Tensor:
    """[rows, 4] of s, n, u, v; the last rows have zeros in them."""
    t = torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if rows >= 4:
        t[-1, 1] = 0  # n = 0: noise only for the target
        t[-2, 3] = 0
        t[-3, 1] = t[-3, 3] = 0  # no noise at all
    return t


def noising(
    layout: str,
    batch: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    tensor_noise: bool = False,
    outputs: tuple[str, ...] = ("out", "target", "eps"),
    special: bool = False,
    **more: object,
) -> Call:
    inputs = {"x0": values(1, batch, shape, dtype, layout, special)}
    if tensor_noise:
        inputs["noise"] = values(2, batch, shape, dtype, layout)
    call = Call("noising", layout, batch, shape, inputs, dict.fromkeys(outputs, dtype), table=table(8), stream=1 << 40)
    call.index = torch.arange(batch, dtype=torch.int64) * 3 % 8
    call.seeds = None if tensor_noise else seeds_for(batch)
    return with_changes(call, **more)

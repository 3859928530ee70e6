"""What the strategies of calls (fuzz_calls.py, fuzz_layers.py) are made of: a `Call`, shapes, tensors, seeds, rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers.op_cases import LAYOUTS, arrange

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COEFFICIENTS = [0.0, -0.0, 1.0, -1.0, 0.5, -0.75, 2.5, 1e-3, -30.0]
STREAMS = [0, 1, 5, 2**32 - 1, 2**40, 2**53 - 1]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 12345]


@dataclass
class Call:
    op: str
    given: dict[str, Any]
    expected: Callable[[], tuple[Tensor | None, ...]]
    """The results in order, in float64; None: not compared."""
    scale: float
    """Of the terms, in units of which the arithmetic may round."""
    inner: float = 0.0
    """Of values that are rounded to the tensors' dtype on the way."""
    outs: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    """Of an op that writes into given tensors: their shapes and dtypes, in the order of ``expected``."""


@st.composite
def shapes(draw: st.DrawFn, least: int = 1, most: int = 5, channels: int | None = None, empty: bool = False) -> Any:
    """[B, ...] of at most some thousand elements; sometimes across the border of a block of 1024."""
    dims = draw(st.integers(least, most))
    batch = draw(st.integers(0 if empty else 1, 3))
    if dims == 2 and channels is None and draw(st.booleans()):
        return batch, draw(st.sampled_from([1, 63, 64, 1023, 1024, 1025, 2049]))
    inner = [draw(st.sampled_from([1, 2, 3, 5, 8, 17, *([0] if empty else [])])) for _ in range(dims - 1)]
    while math.prod(inner) > 3000:
        inner[inner.index(max(inner))] = 2
    if channels is not None:
        inner[0] = channels
    return batch, *inner


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.5) -> Tensor:
    """Numbers up to ``size`` in any layout, sometimes all zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 * size - size
    if draw(st.integers(0, 15)) == 0:
        values = torch.zeros(shape, dtype=torch.float64)
    return arrange(values.to(dtype), draw(st.sampled_from(LAYOUTS)))


@st.composite
def seeds(draw: st.DrawFn, batch: int) -> Tensor:
    return torch.tensor([draw(st.sampled_from(SEEDS)) for _ in range(batch)], dtype=torch.int64)


@st.composite
def indices(draw: st.DrawFn, batch: int, rows: int) -> Tensor:
    """The row of each sample, or one for all, in either dtype."""
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    if draw(st.booleans()):
        return torch.tensor(draw(st.integers(0, rows - 1)), dtype=dtype)
    return torch.tensor([draw(st.integers(0, rows - 1)) for _ in range(batch)], dtype=dtype)


@st.composite
def source(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """The noise of training: an address or a tensor."""
    if draw(st.booleans()):
        return {"noise": draw(tensors(shape, dtype))}
    return {"seeds": draw(seeds(shape[0])), "stream": draw(st.sampled_from(STREAMS))}


def coefficient(draw: st.DrawFn) -> float:
    return draw(st.sampled_from(COEFFICIENTS))


@st.composite
def rows_of(draw: st.DrawFn, width: int, batch: int) -> tuple[Tensor, Tensor | None]:
    """A table and the index into it."""
    count = draw(st.sampled_from([1, 2, 4, max(batch, 1)]))
    rows = torch.tensor([[coefficient(draw) for _ in range(width)] for _ in range(count)], dtype=torch.float64)
    return rows, None if count in (1, batch) and draw(st.booleans()) else draw(indices(batch, count))

"""Calls of quantile (with threshold) and moments."""

from __future__ import annotations

import math

import torch
from ptx.harness import Call, values


def quantile(
    layout: str,
    batch: int,
    shape: tuple[int, ...],
    state: torch.dtype,
    q: float = 0.9,
    maximum: float | None = 1.5,
    special: bool = False,
) -> Call:
    """The quantile; with a maximum, the thresholded sample too."""
    inputs = {"x": values(1, batch, shape, state, layout, special)}
    row = [q, math.inf if maximum is None else maximum]
    return Call(
        "quantile", layout, batch, shape, inputs, {} if maximum is None else {"out": state}, row=row, state=state
    )


def moments(layout: str, batch: int, shape: tuple[int, ...], state: torch.dtype, special: bool = False) -> Call:
    return Call(
        "moments", layout, batch, shape, {"x": values(2, batch, shape, state, layout, special)}, {}, state=state
    )

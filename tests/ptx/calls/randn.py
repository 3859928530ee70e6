"""Calls of randn."""

from __future__ import annotations

import torch
from ptx.harness import Call, seeds_for


def randn(layout: str, batch: int, shape: tuple[int, ...], dtype: torch.dtype, stream: int = 3) -> Call:
    return Call("randn", layout, batch, shape, {}, {"out": dtype}, seeds=seeds_for(batch), stream=stream)

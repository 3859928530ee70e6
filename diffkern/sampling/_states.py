"""The states of a sampling loop: their dtype, their buffers, and what a callback sees of them and writes into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the states of an x of this dtype: float32 for 16 bits, whose half unit swallows small updates."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def buffer(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor like another; it counts its writes, in inference mode too."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return torch.empty_like(like, dtype=dtype)
    return torch.empty_like(like, dtype=dtype)


def shown(state: Tensor, dtype: torch.dtype, callback: Callable[[Any], object], **info: Any) -> bool:
    """Give a callback ``info`` and as x the state (a `buffer`) in ``dtype``; whether it wrote into x. What it wrote is
    then the state.

    A state that is shown in 16 bits keeps what these do not hold wherever they are as they were.
    """
    x = state
    if dtype is not state.dtype:
        x = buffer(state, dtype).copy_(state)
    writes = x._version
    callback({**info, "x": x})
    if x._version == writes:
        return False
    if x is not state:
        state.copy_(merged(state, x))
    return True


def merged(state: Tensor, x: Tensor) -> Tensor:
    """The state, element by element where x is what it rounds to; x where it is not."""
    return torch.where(state.to(x.dtype) == x, state, x)

"""What a path gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class PathSample:
    """A sample of a path: the ends, the times and the state with its conditional velocity."""

    x_1: Tensor
    """Data, [B, ...]."""
    x_0: Tensor
    """Noise, [B, ...]."""
    t: Tensor
    """Times, [B]."""
    x_t: Tensor
    """The state at t, [B, ...]."""
    dx_t: Tensor
    """Its derivative by t, [B, ...]."""

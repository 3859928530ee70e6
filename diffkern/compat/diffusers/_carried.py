"""What 16 bits do not hold of a loop's state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def unrounded(x: Tensor, wide: Tensor) -> Tensor:
    """``wide`` where x is what it rounds to, else x in its dtype; the gradient is that of x."""
    same = x.to(wide.dtype)
    kept = (wide.to(x.dtype) == x) & x.isfinite()
    return torch.where(kept, same + (wide - same).detach(), same)


class Carried(NamedTuple):
    """What 16 bits do not hold of a loop's state: the float32 state behind the sample that a step returned.

    The next step starts from it wherever its sample is what it rounds to, element by element: where it was edited, or
    is another sample, it starts from the sample. So it is never more than half a unit away from the sample it is given.
    """

    state: Tensor
    """float32, without a graph."""
    out: Tensor
    """What the step returned; the look at each element is left out where the next step is given this, unwritten."""
    writes: int
    run: Any
    """What a run has for its own: the timesteps' host copy, or the sigmas."""
    at: int
    """The number of the step that comes next in the run."""

"""The time points of a solver, checked as torchdiffeq does."""

from __future__ import annotations

import itertools
import math

from torch import Tensor


def check_times(time_grid: Tensor) -> tuple[tuple[float, ...], bool]:
    """(the points ascending, whether they were negated for that); exceptions as torchdiffeq has them."""
    t = time_grid.detach().to("cpu")
    if not t.is_floating_point():
        raise TypeError(f"time_grid must be floating point, got {t.dtype}")
    if t.ndim != 1:
        raise AssertionError(f"time_grid must have one dimension, got shape {list(t.shape)}")
    points: list[float] = t.tolist()
    if not points:
        raise IndexError("time_grid must hold at least one time, got none")
    if not all(math.isfinite(point) for point in points):
        raise AssertionError(f"time_grid must be finite, got {points}")
    reverse = len(points) > 1 and points[0] > points[1]
    ascending = tuple(-point for point in points) if reverse else tuple(points)
    if not all(a < b for a, b in itertools.pairwise(ascending)):
        raise AssertionError(f"time_grid must be strictly increasing or decreasing, got {points}")
    return ascending, reverse

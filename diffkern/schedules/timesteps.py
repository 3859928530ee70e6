"""Grids of times and noise levels for samplers: spacing rules and checks of what a caller gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import get_args

from torch import Tensor

from diffkern.checks import unknown
from diffkern.integers import check_rows, integer
from diffkern.names import TableSpacing

SPACINGS = get_args(TableSpacing)
Numbers = Sequence[float] | Tensor
"""Times or noise levels as a caller may give them."""


def spaced_timesteps(T: int, steps: int, spacing: TableSpacing = "leading", offset: int = 0) -> list[int]:
    """``steps`` of the T table entries, from noise to data.

    ``leading``: i (T // steps) + offset, which never reaches T-1 when steps < T (diffusers' default for DDIM and DDPM).
    ``trailing``: round(T - i T/steps) - 1, lecture 000's T, T(S-1)/S, ...; starts at T-1 (arXiv 2305.08891).
    ``linspace``: round(linspace(0, T-1)), which holds both ends (T-1 alone for one step).
    Ties round to even and are made in numpy's arithmetic, so that every number of steps gives the times of other code.
    DPM-Solver and UniPC there visit ``leading`` and ``linspace`` times of one step more, without the last.
    """
    steps = check_steps(steps, T)
    if spacing == "leading":
        times = [i * (T // steps) + offset for i in reversed(range(steps))]
    elif spacing == "trailing":
        stride = (T - T / steps) - T  # numpy's arange: the difference of its first two values
        times = [round(T + i * stride) - 1 + offset for i in range(steps)]
    elif spacing == "linspace":
        times = [round(t) + offset for t in linspace(T, steps)]
    else:
        raise ValueError(unknown("spacing", spacing, SPACINGS))
    return check_timesteps(T, times)


def linspace(T: int, steps: int) -> list[float]:
    """``steps`` evenly spaced, unrounded times from T-1 down to 0; T-1 alone for one step.

    In numpy's arithmetic, a multiple of the rounded step, so that times half way between two integers round alike.
    """
    inner = [i * ((T - 1) / (steps - 1)) for i in range(steps - 2, 0, -1)]
    return [float(T - 1), *inner, 0.0][:steps]


def check_steps(steps: int, most: int | None = None, argument: str = "steps") -> int:
    """``steps``; raises ValueError unless it is an integer of at least 1, and at most ``most`` (or `MOST_ROWS`)."""
    if most is not None:
        return integer(argument, steps, 1, most, f"in 1..{most} (T = {most})")
    return check_rows(argument, integer(argument, steps), 1)


def check_timesteps(T: int, timesteps: Iterable[float]) -> list[int]:
    """``timesteps`` as integers; raises ValueError unless they fall, without repeats, inside 0..T-1."""
    times = numbers("timesteps", timesteps)
    for t in times:
        if t != int(t) or not 0 <= t < T:
            raise ValueError(f"timesteps must be integers in 0..{T - 1} (T = {T}), got {t:g}")
    return [int(t) for t in monotone("timesteps", times, rising=False, least=1)]


def numbers(argument: str, values: Iterable[float] | Tensor) -> list[float]:
    """``values`` as finite Python floats."""
    listed = [float(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]
    for i, value in enumerate(listed):
        if not math.isfinite(value):
            raise ValueError(f"{argument} must be finite, got {argument}[{i}] = {value}")
    return listed


def monotone(argument: str, values: Iterable[float] | Tensor, *, rising: bool, least: int = 2) -> list[float]:
    """``values`` as floats; raises ValueError unless at least ``least`` of them rise (or fall) strictly."""
    listed = numbers(argument, values)
    if len(listed) < least:
        raise ValueError(f"{argument} must hold at least {least} value{'s' if least > 1 else ''}, got {len(listed)}")
    for i, (here, after) in enumerate(pairwise(listed)):
        if not (after > here if rising else after < here):
            raise ValueError(
                f"{argument} must {'rise' if rising else 'fall'} strictly from noise to data, "
                f"got {argument}[{i}] = {here:g} and {argument}[{i + 1}] = {after:g}"
            )
    return listed


def noise_levels(sigmas: Numbers) -> list[float]:
    """``sigmas`` as floats; raises ValueError unless at least two of them fall strictly, to 0 at the lowest."""
    levels = monotone("sigmas", sigmas, rising=False)
    if levels[-1] < 0:
        raise ValueError(f"sigmas must not be negative, got {levels[-1]:g}")
    return levels

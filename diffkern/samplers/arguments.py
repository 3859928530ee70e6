"""Checks of the arguments that samplers take: each returns the value as it is used, or says what it must be."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from diffkern.checks import SAMPLERS_ELSEWHERE, meant, unknown, word
from diffkern.integers import integer
from diffkern.schedules.base import need_schedule as need_schedule


def bound(clip: float | None) -> float:
    """A clip as the table's entry, inf for None."""
    if clip is None:
        return math.inf
    if not clip > 0:
        raise ValueError(f"clip must be positive, or None for no clip, got {clip}")
    return float(clip)


def not_negative(argument: str, value: float) -> float:
    """``value``; raises ValueError unless it is a finite number >= 0."""
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{argument} must be a finite number >= 0, got {value}")
    return float(value)


def choice(argument: str, value: str, allowed: Sequence[str]) -> str:
    """``value``; raises ValueError unless it is one of ``allowed``."""
    if value not in allowed:
        text = f"{argument} must be {' or '.join(map(repr, allowed))}, got {value!r}"
        near = meant(value, allowed)
        raise ValueError(text if near is None else f"{text}: did you mean {near!r}?")
    return value


def sampler_name(value: str, known: Collection[str]) -> str:
    """The one of the ``known`` samplers that the value names (`names.word`); raises ValueError for any other."""
    found = word(value, known, SAMPLERS_ELSEWHERE)
    if found is None or found not in known:
        raise ValueError(unknown("sampler", value, known))
    return found


def order_in(value: int, most: int) -> int:
    """``value``; raises ValueError unless it is an integer in 1..most."""
    return integer("order", value, 1, most)

"""What rows keep for later ones: the history slots that they save."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffkern.plan import Row

HISTORIES = ("e0", "e1", "e2", "e3")
"""The columns that weigh the histories."""


@functools.lru_cache(64)
def kept_by(saves: tuple[tuple[int, str], ...]) -> tuple[frozenset[int], bool]:
    """The history slots that a row saves, and whether its s is among what it saves."""
    return frozenset(slot for slot, _ in saves), any(source == "s" for _, source in saves)


def without_zero_slopes(rows: Sequence[Row]) -> list[Row]:
    """The rows without an s that is 0 x + 0 x0 + 0 m: none is made, and none is read."""
    if not any(made.saves and _saves_nothing(made) for made in rows):
        return list(rows)
    kept = []
    zero: set[int] = set()
    for made in rows:
        if zero and not zero.isdisjoint(made.reads):
            made = made.but(**dict.fromkeys((HISTORIES[slot] for slot in zero.intersection(made.reads)), 0.0))
        if made.saves:
            zero -= {slot for slot, _ in made.saves}
            if _saves_nothing(made):
                zero |= {slot for slot, source in made.saves if source == "s"}
                made = made.but(saves=tuple(save for save in made.saves if save[1] != "s"))
        kept.append(made)
    return kept


def _saves_nothing(made: Row) -> bool:
    """Whether the row keeps an s of 0 x + 0 x0 + 0 m."""
    return made.A == made.B == made.D == 0.0 and kept_by(made.saves)[1]

"""Points and rows of many steps at once, a float64 array a field; `row` of `diffkern.samplers.nodes` for each.

Arrays do what Python's floats do, bit for bit: +, -, *, / and the root are rounded correctly by both. Other functions
are not, in arrays, and are taken of one number at a time (`each`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffkern import streams
from diffkern.plan import Row
from diffkern.samplers._histories import HISTORIES

if TYPE_CHECKING:
    from diffkern.samplers.nodes import Node

Array = NDArray[np.float64]


class Columns(NamedTuple):
    """The fields of `Node`, [n] each."""

    v: Array
    alpha: Array
    sigma: Array
    time: Array
    k: Array
    p: Array
    q: Array
    P: Array
    Q: Array
    clip: Array
    sx: Array
    s0: Array
    sm: Array

    def some(self, index: NDArray[np.int64]) -> Columns:
        """Those of the points."""
        return Columns(*(column[index] for column in self))


def columns(nodes: Sequence[Node]) -> Columns:
    """The points as columns."""
    width = len(Columns._fields)
    flat = np.fromiter(chain.from_iterable(nodes), np.float64, len(nodes) * width)
    return Columns(*np.ascontiguousarray(flat.reshape(-1, width).T))


def each(function: Callable[[float], float], values: Array) -> Array:
    """A function of Python's floats of each entry."""
    return np.array([function(value) for value in values.ravel().tolist()]).reshape(values.shape)


def exact_sum(terms: Sequence[Array]) -> Array:
    """`math.fsum` of the terms of each entry: the exact sum, rounded once, as the sum of two is anyway."""
    if len(terms) <= 2:
        return sum(terms[1:], start=terms[0])
    whole = np.stack(np.broadcast_arrays(*terms), -1)
    return np.array([math.fsum(values) for values in whole.reshape(-1, len(terms)).tolist()]).reshape(whole.shape[:-1])


def rows(
    i: NDArray[np.int64],
    at: Columns,
    to: Columns,
    *,
    e: Sequence[Array | float] = (),
    fields: Mapping[str, Sequence[Any]] | None = None,
    **more: Any,
) -> list[Row]:
    """`row` for each i, from the points ``at`` to the levels ``to``.

    ``e`` holds the histories' columns and ``fields`` those that are no numbers; ``more`` are arrays, one entry a row,
    or what all rows have.
    """
    given: dict[str, Any] = {
        **{"p": at.p, "q": at.q, "clip": at.clip, "known_s": to.alpha, "known_n": to.sigma, "time": at.time, "k": to.k},
        **{"stream": streams.STEP + i, "known_stream": streams.KNOWN + i},
        **dict(zip(HISTORIES, e, strict=False)),
        **more,
    }
    listed: dict[str, Sequence[Any]] = dict(fields or {})
    for name in [name for name, value in given.items() if isinstance(value, np.ndarray)]:
        value = given.pop(name)
        listed[name] = (value + 0.0 if name in _SIGNLESS else value).tolist()  # no -0.0 in tables
    return Row.each(listed, **given)


_SIGNLESS = frozenset(("a", "b", "d", "g", *HISTORIES))


def placed(count: int, *parts: tuple[NDArray[np.int64], Sequence[Any]]) -> list[Any]:
    """A list of ``count`` with each part's entries at its places."""
    found: list[Any] = [None] * count
    for places, entries in parts:
        for place, entry in zip(places.tolist(), entries, strict=True):
            found[place] = entry
    return found

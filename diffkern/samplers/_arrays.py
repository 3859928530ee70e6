"""Points of many steps at once, a float64 array a field.

Arrays do what Python's floats do, bit for bit: +, -, *, / and the root are rounded correctly by both. Other functions
are not, in arrays, and are taken of one number at a time (`each`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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


def placed(count: int, *parts: tuple[NDArray[np.int64], Sequence[Any]]) -> list[Any]:
    """A list of ``count`` with each part's entries at its places."""
    found: list[Any] = [None] * count
    for places, entries in parts:
        for place, entry in zip(places.tolist(), entries, strict=True):
            found[place] = entry
    return found

"""Rows of many steps at once: `row` of `diffkern.samplers.nodes` for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffkern import streams
from diffkern.plan import Row
from diffkern.samplers._arrays import Array, Columns
from diffkern.samplers._histories import HISTORIES


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

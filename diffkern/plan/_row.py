"""A row of a plan: its fields, its columns in a table, and what it must hold to run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch

from diffkern import streams

COLUMNS = (
    *("w", "p", "q", "r", "clip", "a", "b", "d", "e0", "e1", "e2", "e3", "g", "A", "B", "D", "k"),
    *("known_s", "known_n", "stream", "known_stream"),
)
"""The columns of a plan's table, in the order of `DK_STEP_COLUMNS` in csrc/core/step.h."""

LEARNED_COLUMNS = (*COLUMNS, "r0", "r1")
"""The columns of a plan of learned variance: z is multiplied by exp((r0 + r1 v)/2), v the model's second output."""

SLOTS = 4
"""A row can read this many histories."""
_READS = {
    read: tuple(itertools.compress(range(SLOTS), read)) for read in itertools.product((False, True), repeat=SLOTS)
}
SOURCES = ("x", "x0", "s")
"""What a row can save: the state it read, its x0, its second output."""
_LARGEST_TIME = {"int64": 2.0**63 - 1024, "float32": torch.finfo(torch.float32).max}  # exact in float64


@dataclass(frozen=True)
class Row:
    """One model call and the update after it; what the coefficients mean is in the docstring of `diffkern.plan`."""

    w: float = 0.0
    p: float = 0.0
    q: float = 0.0
    r: float = 0.0
    clip: float = math.inf
    a: float = 0.0
    b: float = 0.0
    d: float = 0.0
    e0: float = 0.0
    e1: float = 0.0
    e2: float = 0.0
    e3: float = 0.0
    g: float = 0.0
    A: float = 0.0
    B: float = 0.0
    D: float = 0.0
    k: float = 1.0
    known_s: float = 0.0
    known_n: float = 0.0
    stream: int = 0
    known_stream: int = 0
    r0: float = 0.0
    r1: float = 0.0
    """In a plan of learned variance: ln variance = r0 + r1 v, v from the second half of the model's channels."""
    path: tuple[float, float] | None = None
    """(s, t), 0 <= s < t <= 1: z is the increment of the sample's Brownian path from s to t over sqrt(t - s), instead
    of noise of its own (`diffkern.brownian`)."""
    time: float = 0.0
    """The time given to the model."""
    calls_model: bool = True
    saves: tuple[tuple[int, str], ...] = ()
    """(slot, "x" | "x0" | "s"): after the row, that history slot holds the state the row read, its x0 or its s."""
    ends_step: bool = True

    @cached_property
    def reads(self) -> tuple[int, ...]:
        """The history slots whose coefficient is not 0."""
        return _READS[self.e0 != 0, self.e1 != 0, self.e2 != 0, self.e3 != 0]

    @cached_property
    def draws(self) -> bool:
        """Whether the row reads z: g or r is not 0."""
        return self.g != 0 or self.r != 0

    @cached_property
    def makes_x0(self) -> bool:
        """Whether the row has an x0 formula."""
        return self.p != 0 or self.q != 0 or self.r != 0

    def but(self, **changes: Any) -> Row:
        """The row with these fields changed; `dataclasses.replace` in a tenth of the time."""
        _check_names(changes)
        made = object.__new__(Row)
        values = made.__dict__
        values.update(self.__dict__)
        values.update(changes)
        for worked_out in ("reads", "draws", "makes_x0"):
            if worked_out in values:
                del values[worked_out]
        return made

    @staticmethod
    def each(columns: Mapping[str, Iterable[Any]], **shared: Any) -> list[Row]:
        """Many rows: the i-th has the i-th entry of each of ``columns``, and all the fields ``shared``."""
        _check_names((*columns, *shared))
        rows = []
        for entries in zip(*columns.values(), strict=True):
            made = object.__new__(Row)
            values = made.__dict__  # the class has the defaults of what is not in it
            values.update(zip(columns, entries, strict=True))
            values.update(shared)
            rows.append(made)
        return rows

    def coefficients(self, columns: Sequence[str] = COLUMNS) -> tuple[float, ...]:
        """The row's entries of the table, in the order of ``columns``."""
        return tuple(float(getattr(self, name)) for name in columns)


FIELDS = frozenset(f.name for f in fields(Row))
_NUMBERS = tuple(name for name in LEARNED_COLUMNS if name not in ("clip", "stream", "known_stream"))
_numbers = attrgetter(*_NUMBERS, "time")


def _check_names(names: Iterable[str]) -> None:
    if not FIELDS.issuperset(names):
        raise TypeError(f"a row has no {', '.join(sorted(set(names) - FIELDS))}")


def check_rows(rows: Sequence[Row], time_dtype: str) -> None:
    """Raise ValueError for the first row that could not run after those before it."""
    plain = _plain(rows, time_dtype)
    saved: set[int] = set()
    for i, row in enumerate(rows):
        if not plain:
            _check_numbers(i, row, time_dtype)
        if (row.e0 or row.e1 or row.e2 or row.e3) and not saved.issuperset(row.reads):
            slot = next(slot for slot in row.reads if slot not in saved)
            raise ValueError(
                f"row {i}: history {slot} is read (e{slot} = {getattr(row, f'e{slot}')}) before any row saved it"
            )
        if row.saves:
            _check_saves(i, row)
            saved.update([slot for slot, _ in row.saves])


def _plain(rows: Sequence[Row], time_dtype: str) -> bool:
    """Whether all numbers of all rows are in their ranges, found by columns; True is sure, False may be a mistake."""
    # What has a finite sum is finite in every part.
    if not math.isfinite(sum(map(sum, map(_numbers, rows)))):
        return False
    stream, known = [row.stream for row in rows], [row.known_stream for row in rows]
    times, paths = [row.time for row in rows], [row.path for row in rows if row.path is not None]
    silent = [row for row in rows if not row.calls_model]
    return (
        {*map(type, stream), *map(type, known)} == {int}
        and {*map(type, times)} <= {int, float}
        and all(clip > 0 for clip in {row.clip for row in rows})
        and 0 <= min(min(stream), min(known)) <= max(max(stream), max(known)) < streams.LIMIT
        and all(len(path) == 2 and 0.0 <= path[0] < path[1] <= 1.0 for path in paths)
        and max(max(times), -min(times)) <= _LARGEST_TIME[time_dtype]
        and (time_dtype != "int64" or list(map(int, times)) == list(times))
        and not any((row.w, row.q, row.d, row.D) != (0, 0, 0, 0) for row in silent)
    )


def _check_numbers(i: int, row: Row, time_dtype: str) -> None:
    for name in LEARNED_COLUMNS:
        value = getattr(row, name)
        if name in ("stream", "known_stream"):
            if not 0 <= value < streams.LIMIT or value != int(value):
                raise ValueError(f"row {i}: {name} must be an integer in [0, 2**53), got {value}")
        elif name == "clip":
            if not value > 0:
                raise ValueError(f"row {i}: clip must be positive (inf for none), got {value}")
        elif not math.isfinite(value):
            raise ValueError(f"row {i}: coefficient {name} must be finite, got {value}")
    if row.path is not None and not (len(row.path) == 2 and 0.0 <= row.path[0] < row.path[1] <= 1.0):
        raise ValueError(f"row {i}: path must be (s, t) with 0 <= s < t <= 1, got {row.path}")
    if not math.isfinite(row.time):
        raise ValueError(f"row {i}: time must be finite, got {row.time}")
    if row.calls_model and time_dtype == "int64" and row.time != int(row.time):
        raise ValueError(f"row {i}: time must be an integer when time_dtype is 'int64', got {row.time}")
    if not abs(row.time) <= _LARGEST_TIME[time_dtype]:
        raise ValueError(f"row {i}: time must be a number that {time_dtype} holds, got {row.time}")
    if not row.calls_model and (row.w, row.q, row.d, row.D) != (0, 0, 0, 0):
        raise ValueError(
            f"row {i}: w, q, d and D must be 0 in a row that calls no model, got {row.w, row.q, row.d, row.D}"
        )


def _check_saves(i: int, row: Row) -> None:
    for slot, source in row.saves:
        if slot not in range(SLOTS):
            raise ValueError(f"row {i}: a history slot must lie in 0..{SLOTS - 1}, got {slot}")
        if source not in SOURCES:
            raise ValueError(f"row {i}: saves must name one of {', '.join(SOURCES)}, got {source!r}")
        if source == "x0" and not row.makes_x0:
            raise ValueError(f"row {i}: x0 is saved but the row has no x0 (p, q and r are 0)")
        if source == "s" and (row.A, row.B, row.D) == (0, 0, 0):
            raise ValueError(f"row {i}: s is saved but the row has no s (A, B and D are 0)")
    if len({slot for slot, _ in row.saves}) != len(row.saves):
        raise ValueError(f"row {i}: saves must name each history slot once, got {row.saves}")


def check_thresholded(i: int, row: Row) -> None:
    """Raise ValueError if a plan with a threshold cannot have row ``i``."""
    if not row.calls_model:
        return
    if (row.d, row.D, row.r) != (0, 0, 0) or row.clip < math.inf or not row.makes_x0:
        raise ValueError(
            f"row {i}: a threshold needs a row that reads the model through x0 alone, without a clip (make the plan "
            f"with a clip, then with_threshold), got d, D, r, clip = {row.d, row.D, row.r, row.clip}"
        )


def check_learned(i: int, row: Row) -> None:
    """Raise ValueError if a plan of learned variance cannot have row ``i``."""
    if not row.calls_model:
        raise ValueError(f"row {i}: every row of a plan with learned_variance calls the model, got calls_model=False")
    unused = ("w", "r", "e0", "e1", "e2", "e3", "A", "B", "D")
    given = [name for name in unused if getattr(row, name) != 0]
    if given:
        raise ValueError(
            f"row {i}: {', '.join(unused)} must be 0 in a plan with learned_variance (guidance: "
            f"diffkern.guidance.classifier_free), got {given[0]} = {getattr(row, given[0])}"
        )

"""A sampler as data: a plan is a list of rows of float64 coefficients that one fused kernel executes.

A row computes, from the state x, the model output m (``u`` and ``c`` are its unconditional and conditional halves),
the histories h_k and the noise z:

    m   = u + w (c - u)                              w = 0: m is taken as it is
    x0  = clamp(p x + q m + r z, -clip, clip)        clip = inf: no clamp
    x'  = a x + b x0 + d m + sum_k e_k h_k + g z
    s   = A x + B x0 + D m                           a second output, kept as history
    next = k x'                                      the next model input
    x'  = mask ? x' : known_s known + known_n z2     only where a mask is given (before ``next``)

A term whose coefficient is 0 is neither read nor drawn. z lives on the row's ``stream``, z2 on its ``known_stream``.
Two kinds of plan change what a row's noise and x0 are, with an op of their own: learned variance (`LEARNED_COLUMNS`)
and a threshold (`Plan.with_threshold`).
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from diffkern import records, streams
from diffkern.modes import neutral
from diffkern.names import Prediction, TimeDtype
from diffkern.schedules.predictions import check_prediction, with_predictions

COLUMNS = (
    *("w", "p", "q", "r", "clip", "a", "b", "d", "e0", "e1", "e2", "e3", "g", "A", "B", "D", "k"),
    *("known_s", "known_n", "stream", "known_stream"),
)
"""The columns of a plan's table, in the order of `DK_STEP_COLUMNS` in csrc/core/step.h."""

LEARNED_COLUMNS = (*COLUMNS, "r0", "r1")
"""The columns of a plan of learned variance: z is multiplied by exp((r0 + r1 v)/2), v the model's second output."""

SLOTS = 4
"""A row can read this many histories."""
SOURCES = ("x", "x0", "s")
"""What a row can save: the state it read, its x0, its second output."""
_FORMAT = 1
_LARGEST_TIME = {"int64": 2.0**63 - 1024, "float32": torch.finfo(torch.float32).max}  # exact in float64


@dataclass(frozen=True)
class Row:
    """One model call and the update after it; the coefficients' meaning is in the module's docstring."""

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
        return tuple(slot for slot, e in enumerate((self.e0, self.e1, self.e2, self.e3)) if e != 0)

    @cached_property
    def draws(self) -> bool:
        """Whether the row reads z: g or r is not 0."""
        return self.g != 0 or self.r != 0

    @cached_property
    def makes_x0(self) -> bool:
        """Whether the row has an x0 formula."""
        return self.p != 0 or self.q != 0 or self.r != 0

    def but(self, **changes: Any) -> Row:
        """The row with these fields changed; `dataclasses.replace` in a fifth of the time."""
        if unknown := changes.keys() - self.__dataclass_fields__.keys():
            raise TypeError(f"a row has no {', '.join(sorted(unknown))}")
        made = object.__new__(Row)
        made.__dict__.update(self.__dict__, **changes)
        for worked_out in ("reads", "draws", "makes_x0"):
            made.__dict__.pop(worked_out, None)
        return made

    def coefficients(self, columns: Sequence[str] = COLUMNS) -> tuple[float, ...]:
        """The row's entries of the table, in the order of ``columns``."""
        return tuple(float(getattr(self, name)) for name in columns)


_FINITE = attrgetter(*(name for name in LEARNED_COLUMNS if name not in ("clip", "stream", "known_stream")))


@dataclass(frozen=True)
class Plan:
    """A whole sampler run: immutable, comparable with ==, printable, and JSON by `to_json` / `from_json`.

    The initial state is init_scale z with z on ``streams.INITIAL``; the first model input is first_k times it.
    Raises ValueError for a coefficient that is NaN or infinite (clip may be inf), a history read before it is saved,
    and every other row that could not run.
    """

    name: str
    rows: tuple[Row, ...]
    init_scale: float = 1.0
    first_k: float = 1.0
    prediction: Prediction = "eps"
    time_dtype: TimeDtype = "float32"
    """dtype of the times the model is given: "int64" or "float32"."""
    learned_variance: bool = False
    """The model returns 2C channels, the second half its variance; its rows are run by ``ops.learned_step``."""
    threshold: tuple[float, float | None] | None = None
    """(quantile, maximum) of dynamic thresholding, see `with_threshold`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "prediction", check_prediction(self.prediction))
        if not self.rows:
            raise ValueError("rows must hold at least one row, got none")
        if self.time_dtype not in ("int64", "float32"):
            raise ValueError(f"time_dtype must be 'int64' or 'float32', got {self.time_dtype!r}")
        for argument, value in (("init_scale", self.init_scale), ("first_k", self.first_k)):
            if not math.isfinite(value):
                raise ValueError(f"{argument} must be finite, got {value}")
        if self.threshold is not None:
            object.__setattr__(self, "threshold", _check_threshold(*self.threshold))
        saved: set[int] = set()
        for i, row in enumerate(self.rows):
            _check_row(i, row, saved, self.time_dtype)
            if self.learned_variance:
                _check_learned(i, row)
            if self.threshold is not None:
                _check_thresholded(i, row)
            saved.update(slot for slot, _ in row.saves)
        if not self.rows[-1].ends_step:
            raise ValueError("the last row must end a step, got ends_step=False")

    @cached_property
    def table(self) -> Tensor:
        """[R, 21] float64 on the CPU, one row a row; do not write into it."""
        return _host_table(list(map(attrgetter(*COLUMNS), self.rows)))

    @cached_property
    def cache(self) -> dict[Any, Any]:
        """What runs work out from the plan alone and keep for the next run."""
        return {}

    @cached_property
    def learned_table(self) -> Tensor:
        """[R, 23] float64 on the CPU: `table` with the columns r0 and r1; do not write into it."""
        return _host_table([row.coefficients(LEARNED_COLUMNS) for row in self.rows])

    @cached_property
    def steps(self) -> tuple[range, ...]:
        """The rows of each step: a step is what a user counts, one row for Euler, two for Heun."""
        ends = [i + 1 for i, row in enumerate(self.rows) if row.ends_step]
        return tuple(range(first, last) for first, last in zip([0, *ends[:-1]], ends, strict=True))

    @cached_property
    def live(self) -> tuple[frozenset[int], ...]:
        """The history slots that are still read at or after each row, [R + 1]: what must be kept, and no more."""
        live: set[int] = set()
        found = [frozenset(live)]
        for row in reversed(self.rows):
            live = (live - {slot for slot, _ in row.saves}) | set(row.reads)
            found.append(frozenset(live))
        return tuple(reversed(found))

    @property
    def model_calls(self) -> int:
        """Number of rows that call the model."""
        return sum(row.calls_model for row in self.rows)

    @property
    def deterministic(self) -> bool:
        """True if no row draws noise."""
        return not any(row.draws for row in self.rows)

    def level(self, step: int) -> tuple[float, float]:
        """(signal, noise) of the state before ``step``: x = signal x0 + noise z; (0, init_scale) before step 0."""
        if not 0 <= step < len(self.steps):
            raise ValueError(
                f"step must lie in 0..{len(self.steps) - 1} ({self.name} has {len(self.steps)}), got {step}"
            )
        if step == 0:
            return 0.0, self.init_scale
        before = self.rows[self.steps[step].start - 1]
        return before.known_s, before.known_n

    def with_guidance(self, w: float | Sequence[float]) -> Plan:
        """The plan with classifier-free guidance weight ``w``: m = u + w (c - u) (arXiv 2207.12598; lectures 000, 002).

        w = 1 is the conditional model alone, w = 0 the unconditional one; a plan whose weights are all 0 is unguided.
        A sequence gives one weight a step, or one a row; interval guidance is 1 outside its interval.
        """
        if isinstance(w, numbers.Real) or (isinstance(w, Tensor) and w.ndim == 0):
            weights = [float(w)] * len(self.rows)
        else:
            if isinstance(w, str) or not isinstance(w, Iterable):
                raise ValueError(f"guidance must be a number or one a step, got {w!r}")
            weights = [float(value) for value in w]
            if len(weights) == len(self.steps):
                weights = [weights[j] for j, rows in enumerate(self.steps) for _ in rows]
            elif len(weights) != len(self.rows):
                raise ValueError(
                    f"guidance must be a number, one weight a step ({len(self.steps)}) or one a row "
                    f"({len(self.rows)}), got {len(weights)} weights"
                )
        for value in weights:
            if not math.isfinite(value):
                raise ValueError(f"guidance must be finite, got {value}")
        rows = [
            replace(row, w=value if row.calls_model else 0.0) for row, value in zip(self.rows, weights, strict=True)
        ]
        return replace(self, rows=tuple(rows))

    def with_threshold(self, quantile: float = 0.995, maximum: float | None = None) -> Plan:
        """The plan with dynamic thresholding instead of its clip: x0 -> clamp(x0, -s, s)/s.

        s is that quantile of abs(x0) over the sample, at least 1 and at most ``maximum`` (Imagen, arXiv 2205.11487,
        section 2.3; diffusers sets maximum 1 by default, which is a plain clip to [-1, 1]). Every row must take its
        direction from x0: make the plan with a ``clip``, or take a sampler that reads the model through x0 alone
        (`dpmpp_2m` and the like). Three ops a model call instead of one.
        """
        rows = tuple(replace(row, clip=math.inf) for row in self.rows)
        return replace(self, rows=rows, threshold=(quantile, maximum))

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives back an equal plan. Fields at their defaults are left out."""
        rows = [
            {f.name: getattr(row, f.name) for f in fields(Row) if getattr(row, f.name) != f.default}
            for row in self.rows
        ]
        head = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}
        return json.dumps({"diffkern_plan": _FORMAT, **head, "rows": rows}, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote; ValueError, with the field's name, for anything else."""
        data = records.parse(text, "the JSON of a plan")
        found = data.pop("diffkern_plan", None) if isinstance(data, dict) else data
        if type(found) is not int or found != _FORMAT:
            got = records.shown(found)
            raise ValueError(f"text must be the JSON of a plan with diffkern_plan = {_FORMAT}, got {got}")
        rows = data.pop("rows", None)
        if not isinstance(rows, list):
            raise ValueError(f"rows must be a list of objects, got {records.shown(rows)}")
        made = tuple(records.record(Row, row, f"row {i}: ") for i, row in enumerate(rows))
        return records.record(Plan, with_predictions(data, "prediction"), rows=made)

    def __str__(self) -> str:
        title = (
            f"{self.name}: {len(self.steps)} steps, {len(self.rows)} rows, {self.model_calls} model calls, "
            f"prediction {self.prediction}, time {self.time_dtype}, init_scale {self.init_scale:g}, "
            f"first_k {self.first_k:g}"
        )
        if self.learned_variance:
            title += ", learned variance"
        if self.threshold is not None:
            quantile, maximum = self.threshold
            title += f", threshold {quantile:g}" + (f" up to {maximum:g}" if maximum is not None else "")
        defaults = asdict(Row())
        names = [n for n in LEARNED_COLUMNS if n not in ("stream", "known_stream")]
        names = [n for n in names if any(getattr(row, n) != defaults[n] for row in self.rows)]
        cells = [["row", "time", *names, "stream", "saves"]]
        for i, row in enumerate(self.rows):
            saves = " ".join(f"h{slot}={source}" for slot, source in row.saves)
            time = f"{row.time:.7g}" if row.calls_model else "-"
            stream = streams.describe(row.stream) if row.draws else "-"
            if row.draws and row.path is not None:
                stream = f"path {row.path[0]:.4g}..{row.path[1]:.4g}"
            cells.append([f"{i}", time, *(f"{getattr(row, n):.7g}" for n in names), stream, saves])
        widths = [max(len(line[c]) for line in cells) for c in range(len(cells[0]))]
        lines = [
            "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        return "\n".join([title, *lines])


def _host_table(rows: list[tuple[float, ...]]) -> Tensor:
    with neutral():
        return torch.tensor(rows, dtype=torch.float64)


def _check_threshold(quantile: float, maximum: float | None) -> tuple[float, float | None]:
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"quantile of a threshold must lie in [0, 1], got {quantile}")
    if maximum is not None and not 1.0 <= maximum < math.inf:
        raise ValueError(f"maximum of a threshold must be a finite number >= 1, or None, got {maximum}")
    return quantile, maximum


def _check_thresholded(i: int, row: Row) -> None:
    if not row.calls_model:
        return
    if (row.d, row.D, row.r) != (0, 0, 0) or row.clip < math.inf or not row.makes_x0:
        raise ValueError(
            f"row {i}: a threshold needs a row that reads the model through x0 alone, without a clip (make the plan "
            f"with a clip, then with_threshold), got d, D, r, clip = {row.d, row.D, row.r, row.clip}"
        )


def _check_learned(i: int, row: Row) -> None:
    if not row.calls_model:
        raise ValueError(f"row {i}: every row of a plan with learned_variance calls the model, got calls_model=False")
    unused = ("w", "r", "e0", "e1", "e2", "e3", "A", "B", "D")
    given = [name for name in unused if getattr(row, name) != 0]
    if given:
        raise ValueError(
            f"row {i}: {', '.join(unused)} must be 0 in a plan with learned_variance (guidance: "
            f"diffkern.guidance.classifier_free), got {given[0]} = {getattr(row, given[0])}"
        )


def _check_row(i: int, row: Row, saved: set[int], time_dtype: str) -> None:
    """Raise ValueError if row ``i`` could not run after rows that filled the history slots ``saved``."""
    # What has a finite sum is finite in every part; what has none is looked at one by one.
    plain = math.isfinite(sum(_FINITE(row))) and row.clip > 0
    for name in ("stream", "known_stream") if plain else LEARNED_COLUMNS:
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
    for slot in row.reads:
        if slot not in saved:
            raise ValueError(
                f"row {i}: history {slot} is read (e{slot} = {getattr(row, f'e{slot}')}) before any row saved it"
            )
    if not row.calls_model and (row.w, row.q, row.d, row.D) != (0, 0, 0, 0):
        raise ValueError(
            f"row {i}: w, q, d and D must be 0 in a row that calls no model, got {row.w, row.q, row.d, row.D}"
        )
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

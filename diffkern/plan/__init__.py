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
from diffkern.plan._row import (
    COLUMNS,
    LEARNED_COLUMNS,
    SLOTS,
    SOURCES,
    Row,
    check_learned,
    check_rows,
    check_thresholded,
)
from diffkern.schedules.predictions import check_prediction, with_predictions

__all__ = ["COLUMNS", "LEARNED_COLUMNS", "SLOTS", "SOURCES", "Plan", "Row"]

_FORMAT = 1


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
        check_rows(self.rows, self.time_dtype)
        for i, row in enumerate(self.rows) if self.learned_variance or self.threshold is not None else ():
            if self.learned_variance:
                check_learned(i, row)
            if self.threshold is not None:
                check_thresholded(i, row)
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

"""Fixed steps on the grid that torchdiffeq lays through the time points: euler, midpoint, heun2, heun3, rk4 (the 3/8
rule), explicit_adams. One op a model call.

Grid and stage times are made in the dtype of ``time_grid`` with torchdiffeq's order of operations, so that the model
is given the same numbers to the last bit.

The loop is not `kit.loop`'s: every stage goes out from the step's first state, which may have a second part (the
divergence of a likelihood) and is differentiable, and states are wanted between the steps.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern import ops, tableaus
from diffkern.compat.flow_matching.solver._stages import Field, Stages, State, copied, fitted, run_stage, stages_of
from diffkern.compat.flow_matching.solver._times import check_times
from diffkern.compat.kit.rows import as_dtype, promote, row_of, table_by_rows
from diffkern.compat.kit.state import WRITES, overlap, wider
from diffkern.modes import kept

TABLEAUS: dict[str, tableaus.Tableau] = {
    "euler": tableaus.EULER,
    "midpoint": tableaus.MIDPOINT,
    "heun2": tableaus.HEUN,
    "heun3": tableaus.HEUN3,
    "rk4": tableaus.RK4_38,
}
ADAMS = "explicit_adams"
METHODS = (*TABLEAUS, ADAMS)
ADAMS_ORDER = 11
"""The highest order of torchdiffeq's explicit Adams-Bashforth method; it starts at the third step, with order 3."""


class Out(NamedTuple):
    """A time point that lies in a step: the state before, after, or the line between them."""

    point: int
    share: float
    """0 at the step's start, 1 at its end."""


class Grid(NamedTuple):
    """Steps, rows and times of a run, all on the CPU."""

    stages: Stages
    table: Tensor
    """[N S, 21]: the rows of all steps."""
    times: Tensor
    """[N S], in the dtype of the time grid."""
    outs: tuple[tuple[Out, ...], ...]
    """The time points in each step."""
    steps: tuple[float, ...]
    """The signed sizes of the steps."""


def make_grid(method: str, time_grid: Tensor, step_size: Any, every: bool) -> Grid:
    """The run of ``method``: from the first time by ``step_size`` (None: from point to point), the last step shorter.

    ``every``: states at all time points are wanted, else at the last one.
    """
    points, reverse = check_times(time_grid)
    if isinstance(step_size, Tensor):
        step_size = step_size.item()
    return _grid(method, points, time_grid.dtype, reverse, step_size, every)


@kept(64)
def _grid(
    method: str, points: tuple[float, ...], dtype: torch.dtype, reverse: bool, step_size: Any, every: bool
) -> Grid:
    return _made(method, torch.tensor(points, dtype=dtype), reverse, step_size, every)


def _made(method: str, t: Tensor, reverse: bool, step_size: Any, every: bool) -> Grid:
    grid = t if step_size is None else _spaced(t, step_size)
    start, end = grid[:-1], grid[1:]
    h = end - start
    sign = -1.0 if reverse else 1.0
    stages = _STAGES[method]
    # c = 1 is the step's end itself in the 3/8 rule and start + h in Heun's: in torchdiffeq, and so here.
    at = [start, *(end if c == 1.0 and method in ("rk4", ADAMS) else start + h * c for c in stages.nodes[1:])]
    steps = sign * h.to(torch.float64)
    outs = _outs(t, start, end, [t.shape[0] - 1] if not every else range(1, t.shape[0]))
    times = sign * torch.stack(at, 1).flatten()
    return Grid(stages, stages.rows(steps).flatten(0, 1), times, outs, tuple(steps.tolist()))


def _spaced(t: Tensor, step_size: Any) -> Tensor:
    rule = "step_size must be a positive, finite number"
    is_number: bool = isinstance(step_size, numbers.Real)  # NumPy's as well
    if not is_number:
        raise TypeError(f"{rule}, got {step_size!r}")
    try:
        count = torch.ceil((t[-1] - t[0]) / step_size + 1).item()
        grid = torch.arange(0, count, dtype=t.dtype, device="cpu") * step_size + t[0]
        grid[-1] = t[-1]
    except (RuntimeError, IndexError, ValueError) as error:  # zero, NaN, a negative one: the kinds of the original
        raise type(error)(f"{rule}, got {step_size}") from error
    if not 0.0 < step_size < math.inf or grid[0] != t[0]:
        raise AssertionError(f"{rule}, got {step_size}")
    return grid


def _outs(t: Tensor, start: Tensor, end: Tensor, wanted: Iterable[int]) -> tuple[tuple[Out, ...], ...]:
    """Which points lie in which step."""
    found: list[list[Out]] = [[] for _ in range(len(start))]
    points, at = set(wanted), t.tolist()
    j = 1
    for step, (left, right) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        while j < len(at) and right >= at[j]:
            if j in points:
                share = float(at[j] == right)
                if left < at[j] < right:
                    share = float((t[j] - start[step]) / (end[step] - start[step]))
                found[step].append(Out(j, share))
            j += 1
    return tuple(tuple(outs) for outs in found)


def run(method: str, field: Field, y: State, grid: Grid) -> dict[int, State]:
    """The states at the time points that the grid was made for, by their number.

    A state of 16 bits is float32 here, so that updates below half a unit add up; the field is given it rounded.
    """
    dtype = y[0].dtype  # of the samples as the field sees them
    y = tuple(as_dtype(part, wider(part.dtype)) for part in y)
    stages, table, ends = grid.stages.stages, grid.table, grid.times
    count = len(stages)
    found: dict[int, State] = {}
    clock: dict[torch.dtype, tuple[Tensor, ...]] = {}
    # A model may write into its input, and a step's first state is read again: it is made again then, by the op that
    # made it. Where it can not be (the caller's, writes that go uncounted) the model is given a copy.
    again: Callable[[], State] | None = None
    source: Tensor | None = None
    counts = not torch.is_inference_mode_enabled()
    remakes = counts and method != ADAMS
    adams = _Adams() if method == ADAMS else None
    for step in range(len(grid.steps)):
        state: State = y
        ks: list[State] = []
        base = y
        for i, stage in enumerate(stages):
            row = step * count + i
            if dtype not in clock:
                # A copy: the grid is kept for later runs, and a model may scale its time in place.
                clock[dtype] = ends.to(state[0].device, dtype, copy=True).unbind()
            given = as_dtype(state[0], dtype)
            if i == 0 and given is y[0]:
                given = given if again is not None else copied(given)
            writes = given._version if counts else 0
            m = field(clock[dtype][row], (given, *state[1:]))
            if i == 0 and counts and given._version != writes:
                if given is y[0]:
                    assert again is not None
                    if source is not None and isinstance(m[0], Tensor) and overlap(m[0], source):
                        raise ValueError(f"velocity_model {WRITES}")
                    base = y = again()
                    found.update((point, y) for point, was in found.items() if was[0] is given)
                remakes, again = False, None
            base, ks, m = fitted(base, ks, m)
            dtype = promote(dtype, m[0].dtype)
            if adams is not None and i == 0:
                jumped = adams.step(base, m, grid.steps[step])
                if jumped is not None:
                    state = jumped
                    break
            state, k = run_stage(stage, base, ks, m, table, row)
            if remakes and stage.ends:
                again, source = partial(_end_of, stage, base, ks, m, table, row), m[0]
            ks.append(k)
        for out in grid.outs[step]:
            found[out.point] = between(y, state, out.share)
        y = state
    return found


def _end_of(*operands: Any) -> State:
    return run_stage(*operands)[0]


def between(y: State, after: State, share: float) -> State:
    """y + share (after - y)."""
    if share in (0.0, 1.0):
        return after if share else y
    table = table_by_rows(row_of(a=1.0 - share, e0=share))
    return tuple(ops.step(a.to(b.dtype), None, None, b, table=table)[0] for a, b in zip(y, after, strict=True))


class _Adams:
    """Adams-Bashforth: y + h sum_i beta_i f_i over up to 11 slopes, newest first."""

    def __init__(self) -> None:
        self.slopes: list[State] = []

    def step(self, y: State, m: State, h: float) -> State | None:
        """The state after the step; None while there are too few slopes, and the step is one of rk4."""
        self.slopes = [m, *self.slopes[: ADAMS_ORDER - 1]]
        order = len(self.slopes)
        if order < 3:
            return None
        beta = [h * w for w in adams_bashforth(order)]
        table = table_by_rows(
            *(
                row_of(a=1.0, d=beta[first], **{f"e{k}": w for k, w in enumerate(beta[first + 1 : first + 5])})
                for first in range(0, order, 5)
            )
        )
        out = []
        for part, base in enumerate(y):
            x = base
            for row, first in enumerate(range(0, order, 5)):
                own, *older = (slope[part].to(base.dtype) for slope in self.slopes[first : first + 5])
                x = ops.step(x, own, None, *older, table=table, row=row)[0]
            out.append(x)
        return tuple(out)


@kept(ADAMS_ORDER)
def adams_bashforth(order: int) -> tuple[float, ...]:
    """beta_i = int_0^1 prod_{l != i} (s + l)/(l - i) ds, the slopes taken at 0, -1, ... (Hairer et al., III.1)."""
    found = []
    for i in range(order):
        poly = [Fraction(1)]  # coefficients of s^0, s^1, ...
        for other in range(order):
            if other != i:
                scale = Fraction(1, other - i)
                grown = [Fraction(0)] * (len(poly) + 1)
                for power, c in enumerate(poly):
                    grown[power] += c * other * scale
                    grown[power + 1] += c * scale
                poly = grown
        found.append(float(sum(c / (power + 1) for power, c in enumerate(poly))))
    return tuple(found)


_STAGES = {
    name: stages_of(tableau.nodes, [*tableau.coupling[1:], tableau.weights]) for name, tableau in TABLEAUS.items()
}
_STAGES[ADAMS] = _STAGES["rk4"]

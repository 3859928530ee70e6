"""Dormand and Prince's pair with torchdiffeq's control: one step size for the whole state, one op a stage.

Steps are not cut at the time points; the state there is Shampine's quartic through both ends, their slopes and the
middle of the step (Shampine 1986), as in torchdiffeq. One read of the device a step, for its acceptance.

`diffkern.rk45` with norm="batch" has the same control, but integrates a schedule's flow in its own coordinates into
buffers that it reuses; here it is any velocity by its own time, the state has parts, and gradients go through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffkern import ops
from diffkern.compat.flow_matching.solver._stages import Field, State, copied, fitted, run_stage, stages_of
from diffkern.compat.flow_matching.solver._times import check_times
from diffkern.compat.kit.rows import row_of, table_by_rows
from diffkern.tableaus import DORMAND_PRINCE, SHAMPINE_ERROR

_NODES = (*DORMAND_PRINCE.nodes, 1.0)
# The last stage makes the step itself; its slope is the first of the next step.
_STAGES = stages_of(_NODES[:-1], [*DORMAND_PRINCE.coupling[1:], DORMAND_PRINCE.weights])
_MIDDLE = (
    6025192743 / 30085553152 / 2,
    0.0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)
"""Weights of the slopes in the middle of a step."""
Slope = Callable[[Tensor, State], State]
_HISTORIES = (2, 3, 4, 5)
"""The slopes that error and middle read besides the first and the last."""


def run(field: Field, y: State, time_grid: Tensor, rtol: float, atol: float, every: bool) -> dict[int, State]:
    """The states at the time points of ``time_grid``, by their number; the last alone unless ``every``.

    A step is accepted if the root mean square of error/(atol + rtol max(|y|, |y'|)) is at most 1, over each part of
    the state. AssertionError for steps that shrink to nothing and states that are not finite.
    """
    at, reverse = check_times(time_grid)
    sign = -1.0 if reverse else 1.0
    dtypes = [part.dtype for part in y]
    found: dict[int, State] = {}
    if len(at) == 1:
        return found

    def slope(t: Tensor, state: State) -> State:
        m = fitted(state, [], field(t, state))[2]
        return tuple(k.to(dtype) for k, dtype in zip(m, dtypes, strict=True))  # a wider slope does not widen the state

    def clock(*times: float) -> tuple[Tensor, ...]:
        """0-dim times as the model is given them, in one upload."""
        return (sign * torch.tensor(times, dtype=torch.float64, device="cpu")).to(y[0].device, dtypes[0]).unbind()

    t, first = at[0], slope(clock(at[0])[0], _copied(y))
    h = _first_step(slope, clock, t, y, first, sign, rtol, atol)
    last = (y, y, [first] * 7, t, 1.0)
    for j, point in enumerate(at[1:], 1):
        while point > t:
            if not t + h > t or h == math.inf:
                raise AssertionError(f"the steps of dopri5 shrink to nothing at t = {sign * t:g}, got {h:g}")
            stamps = clock(*(t + node * h for node in _NODES[1:]))
            new, ks = _attempt(slope, stamps, y, first, sign * h)
            error = _error(y, new, ks, sign * h, rtol, atol)
            if error <= 1.0:
                last = (y, new, ks, t, h)
                y, first, t = new, ks[-1], t + h
            h *= _factor(error)
        if not every and j + 1 < len(at):
            continue
        before, after, ks, start, size = last
        found[j] = _dense(before, after, ks, sign * size, (point - start) / size)
    return found


def _attempt(slope: Slope, times: tuple[Tensor, ...], y: State, first: State, h: float) -> tuple[State, list[State]]:
    """(the state after h, the slopes k_1..k_7)."""
    table = _STAGES.rows(torch.tensor([h], dtype=torch.float64, device="cpu"))[0]
    ks: list[State] = []
    state, m = y, first
    for i, stage in enumerate(_STAGES.stages):
        state, k = run_stage(stage, y, ks, m, table, i)
        ks.append(k)
        m = slope(times[i], _copied(state) if stage.ends else state)
    return state, [*ks, m]


def _copied(state: State) -> State:
    """What a model may write into, while the samples are read again."""
    return (copied(state[0]), *state[1:])


def _error(y: State, new: State, ks: list[State], h: float, rtol: float, atol: float) -> float:
    """The estimated error of a step in tolerances; one op, and the norm in plain torch."""
    row = row_of(
        a=h * SHAMPINE_ERROR[0],
        d=h * SHAMPINE_ERROR[6],
        **{f"e{i}": h * SHAMPINE_ERROR[j] for i, j in enumerate(_HISTORIES)},
    )
    table = table_by_rows(row)
    with torch.no_grad():
        ratios = []
        for part, (before, after) in enumerate(zip(y, new, strict=True)):
            gap = ops.step(ks[0][part], ks[6][part], None, *(ks[j][part] for j in _HISTORIES), table=table)[0]
            ratios.append(gap / (atol + rtol * torch.maximum(before.abs(), after.abs())))
        return _norm(ratios)


def _norm(parts: Sequence[Tensor]) -> float:
    """The largest root mean square of the parts; NaN if one is."""
    squares = torch.stack([part.square().mean(dtype=torch.float64) for part in parts]).tolist()
    return math.nan if any(math.isnan(s) for s in squares) else math.sqrt(max(squares))


def _factor(error: float) -> float:
    """By which the step changes."""
    if error == 0.0:
        return 10.0
    return min(10.0, max(0.9 / error**0.2, 1.0 if error < 1.0 else 0.2)) if math.isfinite(error) else math.nan


def _first_step(
    slope: Slope,
    clock: Callable[..., tuple[Tensor, ...]],
    t: float,
    y: State,
    first: State,
    sign: float,
    rtol: float,
    atol: float,
) -> float:
    """Hairer, Norsett and Wanner, section II.4; one more model call."""
    with torch.no_grad():
        scale = [atol + rtol * part.abs() for part in y]
        d0, d1 = (_norm([part / s for part, s in zip(state, scale, strict=True)]) for state in (y, first))
        h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        if not 0.0 < h0 < math.inf:
            return math.nan
        table = table_by_rows(row_of(a=1.0, d=sign * h0))
        there = tuple(ops.step(part, k, table=table)[0] for part, k in zip(y, first, strict=True))
        gaps = [b - a for a, b in zip(first, slope(clock(t + h0)[0], there), strict=True)]
        d2 = _norm([gap / s for gap, s in zip(gaps, scale, strict=True)]) / h0
    if math.isnan(d1) or math.isnan(d2):
        return math.nan
    most = max(d1, d2)
    return min(100.0 * h0, max(1e-6, h0 * 1e-3) if most <= 1e-15 else (0.01 / most) ** 0.2)


def _dense(y: State, after: State, ks: list[State], h: float, at: float) -> State:
    """The state at the share ``at`` of a step, two ops."""
    one, two, three, four = at, at**2, at**3, at**4
    middle = 16 * two - 32 * three + 16 * four
    slopes = [h * middle * w for w in _MIDDLE]
    slopes[0] += h * (one - 4 * two + 5 * three - 2 * four)
    slopes[6] += h * (two - 3 * three + 2 * four)
    own = 1 - 11 * two + 18 * three - 8 * four + middle
    rows = [
        row_of(a=own, d=slopes[0], **{f"e{i}": slopes[j] for i, j in enumerate(_HISTORIES)}),
        row_of(a=1.0, d=slopes[6], e0=-5 * two + 14 * three - 8 * four),
    ]
    table = table_by_rows(*rows)
    found = []
    for part, (before, end) in enumerate(zip(y, after, strict=True)):
        x = ops.step(before, ks[0][part], None, *(ks[j][part] for j in _HISTORIES), table=table)[0]
        found.append(ops.step(x, ks[6][part], None, end, table=table, row=1)[0])
    return tuple(found)

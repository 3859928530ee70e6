"""The drop-ins' sampling loop: rows with the caller's own model, noise and callback, one op a model call.

k-diffusion's loops, EDM's and score_sde's run here. Others are loops of their own, for the reason that each module
gives: `diffkern.sample` (buffers reused, noise by address, a model input that is scaled), predictor-corrector and rk45
(coefficients and step sizes that depend on the samples), flow_matching's solvers (states of several parts, which
are differentiable and read between the steps), guided_diffusion's (a generator, by methods that subclasses replace).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern import ops
from diffkern.checks import returned
from diffkern.compat.kit.rows import AT, as_dtype, promote, row_of, table_by_rows
from diffkern.compat.kit.state import State, shifted
from diffkern.plan import SLOTS, Plan

Call = Callable[[Tensor, int], Tensor]
"""(state, row) -> the model's output."""
Noise = Callable[[torch.dtype, int], Tensor | None]
"""(the state's dtype, row) -> the noise or None; asked after each model call, so that it can draw what the row leaves
out."""
Seen = Callable[[Tensor, int, Tensor], None]
"""(state, step, model output), after the first model call of a step; it may write into both."""
Late = Callable[[int, Tensor, Tensor | None], Tensor | None]
"""(row, model output, noise) -> a table [1, 21] for a row that depends on them; None: the row as it was prepared."""


class Moves(NamedTuple):
    """What a row does with the histories."""

    reads: tuple[int, int, int, int] = (SLOTS, SLOTS, SLOTS, SLOTS)
    """The slots of h0..h3; SLOTS: none."""
    wants_x0: bool = False
    wants_s: bool = False
    saves: tuple[tuple[int, str], ...] = ()
    """(slot, "x" | "x0" | "s") after the row."""
    dies: tuple[int, ...] = ()
    """Slots that no later row reads."""


class Prepared(NamedTuple):
    """What a loop runs."""

    table: Tensor
    """float64 [rows, 21]."""
    moves: Sequence[Moves]
    """One a row."""
    steps: Sequence[range]
    """The rows of each step."""


def of_plan(plan: Plan) -> Prepared:
    """A plan whose model returns x0 and whose rows have no clip; worked out once a plan."""
    found: Prepared | None = plan.cache.get("compat")
    if found is None:
        moves = []
        for i, row in enumerate(plan.rows):
            a, b, c, d = (slot if slot in row.reads else SLOTS for slot in range(SLOTS))
            wanted = {source for _, source in row.saves}
            dies = tuple(slot for slot in range(SLOTS) if slot not in plan.live[i + 1])
            moves.append(Moves((a, b, c, d), "x0" in wanted, "s" in wanted, row.saves, dies))
        found = plan.cache["compat"] = Prepared(plan.table, moves, plan.steps)
    return found


def of_table(table: Tensor) -> Prepared:
    """Rows without histories, each a step."""
    return Prepared(table, [Moves()] * len(table), [range(i, i + 1) for i in range(len(table))])


def run(
    prepared: Prepared,
    x: Tensor,
    call: Call,
    noise: Noise,
    *,
    seen: Seen | None = None,
    seen_after: bool = False,
    steps: Iterable[int] | None = None,
    widening: Mapping[int, torch.dtype] = MappingProxyType({}),
    late: Late | None = None,
) -> Tensor:
    """The state after all rows; a new tensor each row, so a callback may keep what it sees.

    What the model writes into the state changes nothing (`State`); what ``seen`` writes into state or output is what
    the row is computed from. ``seen_after``: it is shown what the row has been computed from, so that its writes move
    the state and those of the rest of the step by as much, and a write into the output changes nothing. ``steps``
    counts the steps (a progress bar). The state is widened as plain torch would: by a model output of wider dtype, and
    to the dtype that ``widening`` has for a row.
    """
    table, moves, all_steps = prepared
    h: list[Tensor | None] = [None] * (SLOTS + 1)  # the last one stays empty
    shape, state = x.shape, State(x)
    for j in range(len(all_steps)) if steps is None else steps:
        for i in all_steps[j]:
            reads, wants_x0, wants_s, saves, dies = moves[i]
            m = returned(state.call(call, i), shape)
            before: Tensor | None = None
            if seen is not None and i == all_steps[j].start:
                before = state.show(partial(_show, seen, j, m.clone() if seen_after else m), keep=seen_after)
            if m.dtype is not state.dtype or widening:
                wide = promote(state.dtype, m.dtype, widening.get(i, state.dtype))
                if wide is not state.dtype:
                    state.widen(wide)
                    h = [None if t is None else as_dtype(t, state.value.dtype) for t in h]
            after = state.value
            x = after if before is None else as_dtype(before, after.dtype)
            z = noise(state.dtype, i)
            if z is not None:
                z = as_dtype(z, x.dtype)
            own = None if late is None else late(i, m, z)
            # The row's x0 is the model's output: where dtypes agree it need not be written again to be kept.
            shared = m if m.dtype is x.dtype else None
            a, b, c, d = reads
            step = partial(
                ops.step, x, m, None, h[a], h[b], h[c], h[d], table=table if own is None else own,
                row=i if own is None else 0, noise=z, want_x0=wants_x0 and shared is None, want_s=wants_s,
            )  # fmt: skip
            new, x0, s, _ = step()
            if s is not None and x is not after and round(sum(table[i, AT[c]].item() for c in ("A", "B", "D"))):
                s = shifted(s, x, after)  # it has the state beside the slope
            for slot, source in saves:
                h[slot] = after if source == "x" else s if source == "s" else x0 if shared is None else shared
            for slot in dies:
                h[slot] = None
            state.move(shifted(new, x, after), partial(_again, step, x, after), m)
    return state.end()


def _show(seen: Seen, j: int, m: Tensor, x: Tensor) -> None:
    seen(x, j, m)


def _again(step: Callable[[], tuple[Tensor, Any, Any, Any]], x: Tensor, after: Tensor) -> Tensor:
    return shifted(step()[0], x, after)


def added(x: Tensor, z: Tensor, scale: float) -> Tensor:
    """x + scale z, one op; x itself where scale is 0."""
    if scale == 0.0:
        return x
    return ops.step(x, None, table=table_by_rows(row_of(a=1.0, g=scale)), noise=z.to(x.dtype))[0]


def churn_within(churn: float, low: float, high: float) -> tuple[float, tuple[float, float]]:
    """(churn, its range): as in the originals none where no level can lie within, which our samplers refuse."""
    low = max(low, 0.0)
    return (churn, (low, high)) if low <= high else (0.0, (0.0, math.inf))


def churn_before_start(plan: Plan, sigma: float) -> float:
    """The std of the noise that the first step's churn adds to a state of level ``sigma``."""
    return math.sqrt(max(0.0, (plan.init_scale - sigma) * (plan.init_scale + sigma)))

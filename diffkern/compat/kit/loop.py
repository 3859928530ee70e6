"""The drop-ins' sampling loop: rows with the caller's own model, noise and callback, one op a model call.

k-diffusion's loops, EDM's and score_sde's run here. Others are loops of their own, for the reason that each module
gives: `diffkern.sample` (buffers reused, noise by address, a model input that is scaled), predictor-corrector and rk45
(coefficients and step sizes that depend on the samples), flow_matching's solvers (states of several parts, which
are differentiable and read between the steps), guided_diffusion's (a generator, by methods that subclasses replace).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from diffkern import ops
from diffkern.checks import returned
from diffkern.compat.kit.rows import as_dtype, promote, row_of, table_by_rows
from diffkern.plan import SLOTS, Plan

Call = Callable[[Tensor, int], Tensor]
"""(state, row) -> the model's output."""
Noise = Callable[[Tensor, int], Tensor | None]
"""(state, row) -> the noise or None; asked after each model call, so that it can draw what the row leaves out."""
Seen = Callable[[Tensor, int, Tensor], None]
"""(state, step, model output), after the first model call of a step."""
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
    steps: Iterable[int] | None = None,
    widening: Mapping[int, torch.dtype] = MappingProxyType({}),
    late: Late | None = None,
) -> Tensor:
    """The state after all rows; a new tensor each row, so a callback may keep what it sees.

    ``steps`` counts the steps (a progress bar). The state is widened as plain torch would: by a model output of wider
    dtype, and to the dtype that ``widening`` has for a row.
    """
    table, moves, all_steps = prepared
    h: list[Tensor | None] = [None] * (SLOTS + 1)  # the last one stays empty
    for j in range(len(all_steps)) if steps is None else steps:
        for i in all_steps[j]:
            reads, wants_x0, wants_s, saves, dies = moves[i]
            m = returned(call(x, i), x.shape)
            if seen is not None and i == all_steps[j].start:
                seen(x, j, m)
            if m.dtype is not x.dtype or widening:
                wide = promote(x.dtype, m.dtype, widening.get(i, x.dtype))
                if wide is not x.dtype:
                    x, h = x.to(wide), [None if t is None else t.to(wide) for t in h]
            z = noise(x, i)
            if z is not None:
                z = as_dtype(z, x.dtype)
            own = None if late is None else late(i, m, z)
            # The row's x0 is the model's output: where dtypes agree it need not be written again to be kept.
            shared = m if m.dtype is x.dtype else None
            a, b, c, d = reads
            new, x0, s, _ = ops.step(
                x, m, None, h[a], h[b], h[c], h[d], table=table if own is None else own, row=i if own is None else 0,
                noise=z, want_x0=wants_x0 and shared is None, want_s=wants_s,
            )  # fmt: skip
            for slot, source in saves:
                h[slot] = x if source == "x" else s if source == "s" else x0 if shared is None else shared
            for slot in dies:
                h[slot] = None
            x = new
    return x


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

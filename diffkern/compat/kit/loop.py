"""Runs a plan the way k-diffusion's and EDM's loops run: their model, noise and callback; one op a model call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from diffkern import ops
from diffkern.checks import returned
from diffkern.compat.kit.rows import row_of, table_by_rows
from diffkern.plan import SLOTS, Plan

Call = Callable[[Tensor, int], Tensor]
"""(state, row) -> the model's output."""
Noise = Callable[[Tensor, int], Tensor | None]
"""(state, row) -> the noise or None; asked after each model call, so that it can draw what the row leaves out."""
Seen = Callable[[Tensor, int, Tensor], None]
"""(state, step, model output), after the first model call of a step."""

Moves = tuple[tuple[int, ...], bool, bool, tuple[tuple[int, str], ...], tuple[int, ...]]
"""Of a row: the slots of h0..h3 (SLOTS: none), whether x0 and s are written, what is saved, which slots die."""


def run(
    plan: Plan,
    x: Tensor,
    call: Call,
    noise: Noise,
    *,
    seen: Seen | None = None,
    steps: Iterable[int] | None = None,
    widening: Mapping[int, torch.dtype] = MappingProxyType({}),
) -> Tensor:
    """The state after all rows; a new tensor each row, so a callback may keep what it sees.

    The plan's model returns x0 and its rows have no clip.
    ``steps`` counts the plan's steps (a progress bar). The state is widened as plain torch would: by a model output of
    wider dtype, and to the dtype that ``widening`` has for a row.
    """
    table, moves = plan.table, _moves(plan)
    h: list[Tensor | None] = [None] * (SLOTS + 1)  # the last one stays empty
    for j in range(len(plan.steps)) if steps is None else steps:
        for i in plan.steps[j]:
            reads, wants_x0, wants_s, saves, dead = moves[i]
            m = returned(call(x, i), x.shape)
            if seen is not None and i == plan.steps[j].start:
                seen(x, j, m)
            for other in (m.dtype, widening.get(i, x.dtype)):
                if other == x.dtype:
                    continue
                wide = torch.promote_types(x.dtype, other)
                x, h = x.to(wide), [None if t is None else t.to(wide) for t in h]
            z = noise(x, i)
            if z is not None and z.dtype != x.dtype:
                z = z.to(x.dtype)
            # The row's x0 is the model's output: where dtypes agree it need not be written again to be kept.
            shared = m if m.dtype == x.dtype else None
            h0, h1, h2, h3 = (h[slot] for slot in reads)
            new, x0, s, _ = ops.step(
                x, m, None, h0, h1, h2, h3, table=table, row=i, noise=z, want_x0=wants_x0 and shared is None,
                want_s=wants_s,
            )  # fmt: skip
            for slot, source in saves:
                h[slot] = x if source == "x" else s if source == "s" else x0 if shared is None else shared
            for slot in dead:
                h[slot] = None
            x = new
    return x


def _moves(plan: Plan) -> list[Moves]:
    """What each row does with the histories; worked out once a plan."""
    found: list[Moves] = plan.cache.get("compat", [])
    if not found:
        for i, row in enumerate(plan.rows):
            reads = tuple(slot if slot in row.reads else SLOTS for slot in range(SLOTS))
            wanted = {source for _, source in row.saves}
            dead = tuple(slot for slot in range(SLOTS) if slot not in plan.live[i + 1])
            found.append((reads, "x0" in wanted, "s" in wanted, row.saves, dead))
        plan.cache["compat"] = found
    return found


def added(x: Tensor, z: Tensor, scale: float) -> Tensor:
    """x + scale z, one op; x itself where scale is 0."""
    if scale == 0.0:
        return x
    table = table_by_rows(row_of(a=1.0, g=scale))
    return ops.step(x, None, table=table, noise=z.to(x.dtype))[0]


def churn_within(churn: float, low: float, high: float) -> tuple[float, tuple[float, float]]:
    """(churn, its range): as in the originals none where no level can lie within, which our samplers refuse."""
    low = max(low, 0.0)
    return (churn, (low, high)) if low <= high else (0.0, (0.0, math.inf))


def churn_before_start(plan: Plan, sigma: float) -> float:
    """The std of the noise that the first step's churn adds to a state of level ``sigma``."""
    return math.sqrt(max(0.0, (plan.init_scale - sigma) * (plan.init_scale + sigma)))

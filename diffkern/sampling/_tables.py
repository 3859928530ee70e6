"""What a run is given of its plan: the plan with its guidance, and tables. torch.compile takes them for constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffkern.checks import check_level
from diffkern.modes import untraced
from diffkern.plan import COLUMNS, Plan, Row

Guidance = float | Sequence[float]
_W = COLUMNS.index("w")


@untraced
def plan_to_run(plan: Plan, guidance: Guidance | None) -> Plan:
    """The plan with that guidance, of which the last is kept; for a graph also what plans work out on first use."""
    if guidance is not None:
        given = guidance if isinstance(guidance, int | float) else list(guidance)
        known, found = plan.cache.get("guided", (None, plan))
        if known != given:
            found = plan.with_guidance(guidance)
            plan.cache["guided"] = given, found
        plan = found
    if torch.compiler.is_compiling():
        for lazy in (plan.steps, plan.live, *((row.reads, row.draws, row.makes_x0) for row in plan.rows)):
            del lazy
    return plan


@untraced
def check_dtype(plan: Plan, dtype: torch.dtype) -> None:
    """Raise ValueError unless a state of this dtype has room for the plan's noise levels."""
    key = "largest", dtype
    if key not in plan.cache:
        levels = (plan.init_scale, *(level for row in plan.rows for level in (row.known_s, row.known_n)))
        check_level(max(map(abs, levels)), dtype, f"the noise level of {plan.name}")
        plan.cache[key] = True


@untraced
def table_of(plan: Plan, guidance: Guidance | None, *, shifts: bool, waits: bool, guided: bool) -> Tensor:
    """The table of the rows; after them the rows that leave a waiting sample as it is, where samples wait."""
    plan = plan_to_run(plan, guidance)
    if not (shifts or waits or guided) and plan.threshold is None:
        return plan.learned_table if plan.learned_variance else plan.table
    rows = list(plan.rows)
    if plan.threshold is not None:
        # The op is given the thresholded x0 in the place of m.
        rows = [replace(row, w=0.0, p=0.0, q=1.0) if row.calls_model else row for row in rows]
    if shifts and not plan.learned_variance:
        rows = [replace(row, e3=row.g * row.g) if row.draws else row for row in rows]
    if waits:
        rows += [Row(a=1.0, k=row.k) for row in plan.rows]
    if plan.learned_variance:
        return replace(plan, rows=tuple(rows), threshold=None).learned_table
    return _of_rows(rows, guided)


@untraced
def estimates_of(plan: Plan, guidance: Guidance | None, guided: bool) -> Tensor:
    """The rows that make the x0 alone, which is thresholded before the step takes it."""
    rows = plan_to_run(plan, guidance).rows
    return _of_rows([Row(w=row.w, p=row.p, q=row.q, b=1.0) for row in rows], guided)


def _of_rows(rows: Sequence[Row], guided: bool) -> Tensor:
    table = torch.tensor([row.coefficients() for row in rows], dtype=torch.float64, device="cpu")
    if guided:  # a row of weight 1 calls the conditional model alone, so its op takes m as it is
        table[table[:, _W] == 1.0, _W] = 0.0
    return table


@untraced
def row_times(plan: Plan) -> Tensor:
    """What the model is given at each row, on the CPU."""
    return torch.tensor([row.time for row in plan.rows], dtype=getattr(torch, plan.time_dtype), device="cpu")

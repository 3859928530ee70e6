"""Which buffer a row of a run reads and writes.

It depends on the plan alone: `allocate` says it once, and the loop only looks it up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from diffkern.plan import SLOTS, Plan


class Call(NamedTuple):
    """The buffers of a row: 0 is the state that the run starts from, -1 none."""

    x: int
    out: int
    x0: int
    s: int
    h: tuple[int, int, int, int]
    next: int
    """How many times the new state stands in the next model input; 0: the next row calls no model."""
    shared: bool
    """Whether the state itself can be that input."""
    seeded: bool
    """Whether it draws by address."""


def allocate(
    plan: Plan, first: int, copies: Sequence[int], *, want_x0: bool, masked: bool, converts: bool
) -> list[Call]:
    """The buffers of the rows from ``first`` on: two states, the histories that are still read, and x0 where wanted.

    ``copies`` is how many times the state stands in each row's model input, ``converts`` whether that has a dtype of
    its own.
    """
    calls = [Call(-1, -1, -1, -1, (-1, -1, -1, -1), 0, False, False)] * first
    state = 0
    held = -1  # the step's x0, which a callback may look at
    slots = [-1] * SLOTS
    starts = {step.start for step in plan.steps}
    for i in range(first, len(plan.rows)):
        row = plan.rows[i]
        if i in starts:
            held = -1
        sources = {source for _, source in row.saves}
        wanted = [True, "x0" in sources or (want_x0 and row.makes_x0), "s" in sources]
        busy = {state, held, *slots}
        taken = []
        for want in wanted:
            free = next(b for b in itertools.count(1) if b not in busy) if want else -1
            busy.add(free)
            taken.append(free)
        out, x0, s = taken
        h = [slots[k] if k in row.reads else -1 for k in range(SLOTS)]
        following = copies[i + 1] if i + 1 < len(plan.rows) and plan.rows[i + 1].calls_model else 0
        seeded = (row.draws and row.path is None) or (masked and row.known_n != 0)
        shared = following == 1 and row.k == 1.0 and not converts
        calls.append(Call(state, out, x0, s, (h[0], h[1], h[2], h[3]), following, shared, seeded))
        found = {"x": state, "x0": x0, "s": s}
        for slot, source in row.saves:
            slots[slot] = found[source]
        slots = [b if slot in plan.live[i + 1] else -1 for slot, b in enumerate(slots)]
        state = out
        if row.makes_x0:
            held = x0
    return calls

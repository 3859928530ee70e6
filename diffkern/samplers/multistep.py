"""Linear multistep methods on the probability-flow ODE: one model call a step, earlier slopes as histories."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from diffkern.modes import neutrally
from diffkern.plan import SLOTS, Plan, Row
from diffkern.samplers._arrays import columns, each, placed
from diffkern.samplers._columns import rows as rows_of
from diffkern.samplers._phi import exponential_weights
from diffkern.samplers.arguments import order_in
from diffkern.samplers.nodes import GridOptions, Node, chain, ends_on_x0, grid, row, still
from diffkern.schedules.base import Schedule
from diffkern.signatures import shows_arguments_of


@neutrally
@shows_arguments_of(grid)
def lms(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 4,
    **options: Unpack[GridOptions],
) -> Plan:
    """Adams-Bashforth on any grid: x' = x + int_v^v' P with P the polynomial through the last ``order`` slopes.

    Orders 1 (Euler) to 5, default 4; the first steps have as many slopes as there are. On even steps the weights are
    the classic ones (3/2, -1/2; 23/12, -16/12, 5/12; ...). The integrals are exact; other code ("LMS") takes them by
    quadrature. In sigma this is also rho-AB DEIS (arXiv 2204.13902). Grid and arguments as for `euler`. The first steps
    are of lower order, so the order of the whole is min(order, 2) unless they are small.
    """
    order = order_in(order, SLOTS + 1)
    space, nodes, end = grid("lms", schedule, steps, **options)
    return chain("lms", space, _rows(nodes, end, order, exponential=False), nodes)


@neutrally
@shows_arguments_of(grid)
def deis(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 3,
    **options: Unpack[GridOptions],
) -> Plan:
    """DEIS in log rho: as `lms`, with the slope eps interpolated by a polynomial in ln sigma (arXiv 2204.13902).

    x' = x + int eps(sigma) d sigma, sigma = sigma/alpha of the schedule; discrete, EDM and continuous diffusion
    schedules. A step to sigma = 0 is an Euler step. Orders 1 (Euler) to 5, default 3. Grid and arguments as for
    `euler`.
    """
    order = order_in(order, SLOTS + 1)
    space, nodes, end = grid("deis", schedule, steps, **options)
    if space.in_time:
        raise ValueError(f"deis needs a schedule that is integrated in sigma, got {schedule.name}")
    return chain("deis", space, _rows(nodes, end, order, exponential=True), nodes)


def _rows(nodes: list[Node], end: Node, order: int, *, exponential: bool) -> list[Row]:
    """The j-th step of some length saves its slope in slot j mod (order - 1) and reads those of the ones before."""
    after = [*nodes[1:], end]
    slots = max(order - 1, 1)
    at, to = columns(nodes), columns(after)
    moves = to.v != at.v
    taken, number = np.flatnonzero(moves), np.cumsum(moves) - 1  # the steps of some length, and j of each
    used = np.minimum(order, number + 1)
    if exponential:
        used[to.v == 0.0] = 1
    exact = np.array([ends_on_x0(node) for node in after]) & (at.alpha == 1.0) & (used == 1) & moves
    parts: list[tuple[NDArray[np.int64], list[Row]]] = []
    for count in range(1, order + 1):
        i = np.flatnonzero(moves & ~exact & (used == count))
        if not len(i):
            continue
        node, v, j = at.some(i), to.v[i], number[i]
        past = [at.v[taken[j - n]] for n in range(count)]  # where the slopes that are read were taken
        if exponential:
            # int sigma e^(u ln(sigma'/sigma)) du: weights e^z (int_0^1 e^((1-u)(-z)) l_j), z = ln(sigma'/sigma).
            z = each(math.log, v / node.v)
            weights = exponential_weights([each(math.log, earlier / node.v) / z for earlier in past], -z)
            weights = [v * z * w for w in weights]
        else:
            h = v - node.v
            weights = [h * w for w in exponential_weights([(earlier - node.v) / h for earlier in past], 0.0)]
        e = np.zeros((SLOTS, len(i)))
        for n, w in enumerate(weights[1:], 1):
            e[(j - n) % slots, np.arange(len(i))] = w
        w = weights[0]
        more: dict[str, Any] = {"a": 1.0 + w * node.sx, "b": w * node.s0, "d": w * node.sm, "e": list(e)}
        if order > 1:
            more |= {"A": node.sx, "B": node.s0, "D": node.sm}
            more["fields"] = {"saves": [((slot, "s"),) for slot in (j % slots).tolist()]}
        parts.append((i, rows_of(i, node, to.some(i), **more)))
    rows: list[Row] = placed(len(nodes), *parts)
    for i in np.flatnonzero(exact).tolist():
        rows[i] = row(i, nodes[i], after[i], b=1.0)
    for i in np.flatnonzero(~moves).tolist():
        rows[i] = still(i, nodes[i], after[i])
    return rows

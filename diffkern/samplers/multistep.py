"""Linear multistep methods on the probability-flow ODE: one model call a step, earlier slopes as histories."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from diffkern.modes import neutrally
from diffkern.plan import SLOTS, Plan, Row
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
    rows = []
    slots = max(order - 1, 1)
    before: list[float] = []  # where the slopes that are kept were taken
    for i, (node, to) in enumerate(zip(nodes, [*nodes[1:], end], strict=True)):
        h = to.v - node.v
        if h == 0.0:
            rows.append(still(i, node, to))
            continue
        j = len(before)
        before.append(node.v)
        used = min(order, j + 1)
        if exponential and to.v == 0.0:
            used = 1
        if used == 1 and ends_on_x0(to) and node.alpha == 1.0:
            rows.append(row(i, node, to, b=1.0))
            continue
        past = before[j - used + 1 :][::-1]
        if exponential:
            # int sigma e^(u ln(sigma'/sigma)) du: weights e^z (int_0^1 e^((1-u)(-z)) l_j), z = ln(sigma'/sigma).
            z = math.log(to.v / node.v)
            points = [math.log(v / node.v) / z for v in past]
            weights = [to.v * z * w for w in exponential_weights(points, -z)]
        else:
            weights = [h * w for w in exponential_weights([(v - node.v) / h for v in past], 0.0)]
        e = [0.0] * SLOTS
        for n in range(1, used):
            e[(j - n) % slots] = weights[n]
        w = weights[0]
        more: dict[str, Any] = {}
        if order > 1 and i + 1 < len(nodes):
            more = {"A": node.sx, "B": node.s0, "D": node.sm, "saves": ((j % slots, "s"),)}
        rows.append(row(i, node, to, a=1.0 + w * node.sx, b=w * node.s0, d=w * node.sm, e=e, **more))
    return rows

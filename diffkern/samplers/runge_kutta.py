"""Explicit Runge-Kutta methods on the probability-flow ODE, all from one builder and a Butcher tableau.

A stage is one row: it calls the model at the stage's point and leaves the state of the next stage, or of the next step.
Stage j of step v -> v' = v + h has X_j = x + h sum_l A_jl k_l with k_l the slope at stage l; the step ends on
x + h sum_l b_l k_l. The state x and the slopes are histories; where one combination of x and k_1 is all that later
stages read, that alone is kept (Heun, midpoint).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from diffkern.modes import kept, neutrally
from diffkern.plan import Plan, Row
from diffkern.samplers._arrays import Array, columns, placed
from diffkern.samplers._churn import churned_nodes
from diffkern.samplers._columns import rows as rows_of
from diffkern.samplers.nodes import Coordinates, GridOptions, Node, chain, ends_on_x0, grid, row, still
from diffkern.schedules.base import Schedule
from diffkern.signatures import shows_arguments_of
from diffkern.tableaus import EULER, HEUN, MIDPOINT, RK4, RK4_38, Tableau


@neutrally
@shows_arguments_of(grid)
def euler(
    schedule: Schedule,
    steps: int | None = None,
    *,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    **options: Unpack[GridOptions],
) -> Plan:
    """Euler's method on the probability-flow ODE: x' = x + (v' - v) slope(x), one model call a step, order 1.

    Discrete, EDM and continuous diffusion schedules integrate the state x0 + sigma eps over v = sigma with slope
    eps = (x - x0)/sigma (arXiv 2011.13456, 2206.00364; lecture 001). The noise levels are, from noise to data,

    - discrete: of ``steps`` times (``spacing`` "linspace": evenly spaced in [0, T-1], fractional; or "leading",
      "trailing" as for `ddim`) or of the ``timesteps`` given (fractional ones allowed), and then 0;
    - EDM: ``schedule.sigmas(steps)``, which ends in 0;
    - VP, sub-VP, VE and other continuous ones: of ``steps`` times evenly from noise to the schedule's `time_eps` before
      data, or of the ``timesteps`` given, and then 0;
    - all: `schedules.grids.levels` for the spacings "karras", "log_snr", "exponential", "polyexponential", "beta"; or
      ``sigmas``, every level including the one to end at, which is usually 0.

    Flow schedules and user paths integrate alpha x0 + sigma eps over v = t with slope dx/dt (arXiv 2210.02747;
    lectures 000, 003), on ``steps`` even steps from noise to data or on ``timesteps``, every point including the last.
    ``prediction`` defaults to the schedule's: eps, edm or velocity. With a ``clip`` the slope follows the clipped x0.

    ``churn`` is S_churn of EDM's stochastic sampler (arXiv 2206.00364, algorithm 2): before a step from a level in
    ``churn_range`` (S_tmin, S_tmax) noise is added, which raises it to sigma^ = sigma (1 + min(churn/n, sqrt(2) - 1))
    in n steps, with std sqrt(sigma^^2 - sigma^2) times ``churn_noise`` (S_noise). The row before does that, in the same
    op (the initial noise before the first step), so states in between are those after the noise.
    """
    space, nodes, end = grid("euler", schedule, steps, **options)
    return tableau_plan("euler", EULER, space, nodes, end, (churn, churn_range, churn_noise), end_stage=False)


@neutrally
@shows_arguments_of(grid)
def heun(
    schedule: Schedule,
    steps: int | None = None,
    *,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    **options: Unpack[GridOptions],
) -> Plan:
    """Heun's method: an Euler step to x~, then x' = x + (v' - v)/2 (slope(x) + slope(x~)); arguments as for `euler`.

    Two model calls a step, except in the last, which is an Euler step (the slope at sigma = 0 does not exist), so
    2 steps - 1 calls; the global error is still of second order. The first row saves x + (v' - v)/2 slope(x), so the
    second reads one history. arXiv 2206.00364, algorithm 1, and 2 with ``churn``; lecture 001.
    """
    space, nodes, end = grid("heun", schedule, steps, **options)
    return tableau_plan("heun", HEUN, space, nodes, end, (churn, churn_range, churn_noise), end_stage=False)


@neutrally
@shows_arguments_of(grid)
def midpoint(
    schedule: Schedule,
    steps: int | None = None,
    **options: Unpack[GridOptions],
) -> Plan:
    """The midpoint rule: x' = x + h slope(x + h/2 slope(x)) with h = v' - v; arguments as for `euler`, order 2.

    Two model calls a step; a step in sigma that ends at 0 is an Euler step. (k-diffusion's dpm_2 takes the geometric
    middle of two levels, this the arithmetic one.)
    """
    space, nodes, end = grid("midpoint", schedule, steps, **options)
    return tableau_plan("midpoint", MIDPOINT, space, nodes, end)


@neutrally
@shows_arguments_of(grid)
def rk4(
    schedule: Schedule,
    steps: int | None = None,
    **options: Unpack[GridOptions],
) -> Plan:
    """The classic Runge-Kutta method, slopes at v, v + h/2 twice and v + h; arguments as for `euler`, order 4.

    Four model calls a step. A step that ends where the slope does not exist is an Euler step: at sigma = 0, in a flow
    only for predictions other than the velocity or with a clip. There the order is that of the Euler step's own error,
    2; for the full order end at a level > 0.
    """
    space, nodes, end = grid("rk4", schedule, steps, **options)
    return tableau_plan("rk4", RK4, space, nodes, end)


@neutrally
@shows_arguments_of(grid)
def rk4_38(
    schedule: Schedule,
    steps: int | None = None,
    **options: Unpack[GridOptions],
) -> Plan:
    """The 3/8 rule, slopes at v, v + h/3, v + 2h/3 and v + h: what torchdiffeq calls rk4; otherwise as `rk4`."""
    space, nodes, end = grid("rk4_38", schedule, steps, **options)
    return tableau_plan("rk4_38", RK4_38, space, nodes, end)


def tableau_plan(
    name: str,
    tableau: Tableau,
    space: Coordinates,
    nodes: list[Node],
    end: Node,
    churn: tuple[float, tuple[float, float], float] = (0.0, (0.0, math.inf), 1.0),
    end_stage: bool = True,
) -> Plan:
    """The plan of a tableau over these points: how a method of one's own is made.

    ``nodes`` are the points before each step, ``end`` that after the last (`diffkern.samplers.nodes.grid` makes both),
    ``churn`` is (S_churn, its range, S_noise) of `euler`, ``end_stage`` whether the last step may call the model at its
    end. Raises ValueError for a churn that is negative or in a time.
    """
    churned, noises = churned_nodes(space, nodes, *churn)
    after, reached = [*nodes[1:], end], [*churned[1:], end]
    g = [*noises[1:], 0.0]
    direct = space.prediction == "velocity" and space.clip == math.inf and space.in_time
    whole: list[int] = []
    short: list[int] = []
    others: list[int] = []
    for j, (node, to) in enumerate(zip(churned, after, strict=True)):
        at_end = end_stage or j + 1 < len(churned)
        no_slope = (to.sigma == 0.0 and not (direct and at_end)) or (tableau.nodes[-1] == 1.0 and not at_end)
        if node.v == to.v or ((no_slope or len(tableau.nodes) == 1) and ends_on_x0(to) and node.alpha == 1.0):
            others.append(j)
        else:
            (short if no_slope else whole).append(j)
    sizes = np.ones(len(churned), np.int64)
    sizes[whole] = len(tableau.nodes)
    first = np.cumsum(sizes) - sizes
    parts: list[tuple[NDArray[np.int64], list[Row], list[Node]]] = []
    for method, found in ((tableau, whole), (EULER, short)):
        if found:
            starts, ends, levels = ([listed[j] for j in found] for listed in (churned, after, reached))
            parts += _steps(method, space, end, first[found], starts, ends, levels, np.array([g[j] for j in found]))
    for j in others:
        node, i = churned[j], int(first[j])
        still_there = node.v == after[j].v  # else sigma = 0: the step ends on x0 exactly
        made = still(i, node, reached[j], g[j]) if still_there else row(i, node, reached[j], b=1.0)
        parts.append((first[j : j + 1], [made], [node]))
    count = int(sizes.sum())
    rows = placed(count, *((i, made) for i, made, _ in parts))
    at = placed(count, *((i, nodes) for i, _, nodes in parts))
    return chain(name, space, rows, at, math.hypot(nodes[0].sigma, noises[0]))


def _steps(
    tableau: Tableau,
    space: Coordinates,
    end: Node,
    first: NDArray[np.int64],
    nodes: list[Node],
    to: list[Node],
    reached: list[Node],
    g: Array,
) -> list[tuple[NDArray[np.int64], list[Row], list[Node]]]:
    """The rows of steps, by stage: their places, the first of each step at ``first``, and their points."""
    inner = sorted({c for c in tableau.nodes if 0.0 < c < 1.0})
    values = [node.v + c * (target.v - node.v) for c in inner for node, target in zip(nodes, to, strict=True)]
    points, count = space.nodes(values), len(nodes)
    called = {0.0: nodes, **{c: points[n * count : (n + 1) * count] for n, c in enumerate(inner)}}
    if tableau.nodes[-1] == 1.0:
        called[1.0] = [space.node(target.v) if target is end else target for target in to]
    at = {c: columns(listed) for c, listed in called.items()}
    h = columns(to).v - at[0.0].v
    found = []
    for j, (c, stage) in enumerate(zip(tableau.nodes, _stages(tableau), strict=True)):
        node, last = at[c], j + 1 == len(tableau.nodes)
        more: dict[str, Any] = {"saves": stage.saves, "ends_step": last}
        if stage.slope:
            kept = h * stage.share if stage.start else 1.0
            more |= {"A": stage.start + kept * node.sx, "B": kept * node.s0 + 0.0, "D": kept * node.sm + 0.0}
        own = h * stage.own
        more |= {"a": own * node.sx + (j == 0), "b": own * node.s0, "d": own * node.sm}
        e: list[Array | float] = [1.0, *(h * value for value in stage.reads)] if j > 0 else []
        following = columns(reached) if last else at[tableau.nodes[j + 1]]
        made = rows_of(first + j, node, following, e=e, g=g if last else 0.0, **more)
        found.append((first + j, made, called[c]))
    return found


class _Stage(NamedTuple):
    """A stage's row: x' = h0 + h (own k + sum of reads times slopes); it may save k, or start x + h share k."""

    own: float
    reads: tuple[float, ...]
    saves: tuple[tuple[int, str], ...]
    slope: bool
    start: float = 0.0
    share: float = 0.0


@kept(64)
def _stages(tableau: Tableau) -> tuple[_Stage, ...]:
    """What the rows of a step have in common, whatever its size."""
    weights = [*tableau.coupling[1:], tableau.weights]
    # Row j leaves the state with weights[j]; what it reads of the rows before are x and the slopes 0..j-1.
    base = {w[0] for w in weights[1:]}
    shared = len(base) == 1  # x + h w k_0 with one w is all that is read of the first row
    found = []
    for j, w in enumerate(weights):
        reads = w[1 if shared else 0 : j]
        if j == 0 and shared:
            share = next(iter(base))
            found.append(_Stage(w[0], (), ((0, "s" if share else "x"),), share != 0.0, 1.0, share))
        elif j == 0 and len(weights) > 1:
            found.append(_Stage(w[0], (), ((0, "x"), (1, "s")), True))
        else:
            slope = any(len(later) > j and later[j] != 0.0 for later in weights[j + 1 :])
            found.append(_Stage(w[j], reads, ((j if shared else j + 1, "s"),) if slope else (), slope))
    return tuple(found)

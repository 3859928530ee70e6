"""DPM-Solver++ (arXiv 2211.01095): exponential integrators of the estimate of x0, deterministic and stochastic.

With lambda = ln(alpha/sigma), h = lambda' - lambda, k = 1 + eta and the polynomial D(u), u from 0 to 1, through the
latest estimates of x0,

    x' = sigma'/sigma e^(-eta h) x + alpha' k h int_0^1 e^(-(1-u) k h) D(u) du + noise sigma' sqrt(1 - e^(-2 eta h)) z

eta = 0 is the probability-flow ODE, eta = 1 the reverse SDE (eta as in k-diffusion: churn g sqrt(eta)). Where sigma' is
0 (h infinite) the step ends on x0. ``noise_path="brownian"`` draws each z from one Brownian path a sample, the same for
every number of steps (`diffkern.samplers._noise_path`); "independent" draws noise of its own for each row.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from diffkern.modes import neutrally
from diffkern.names import MultistepSolver, NoisePath
from diffkern.plan import Plan, Row
from diffkern.samplers._arrays import Array, placed
from diffkern.samplers._columns import rows as rows_of
from diffkern.samplers._histories import HISTORIES
from diffkern.samplers._jump import Jumps, jumps
from diffkern.samplers._noise_path import Clock, clock
from diffkern.samplers.arguments import choice, not_negative
from diffkern.samplers.nodes import (
    Coordinates,
    GridOptions,
    Node,
    chain,
    ends_on_x0,
    grid,
    native_scale,
    own_grid,
    row,
    still,
)
from diffkern.schedules.base import Schedule
from diffkern.signatures import shows_arguments_of


class StochasticOptions(GridOptions, total=False):
    """Arguments of `dpmpp_1s`, but for eta."""

    noise: float
    noise_path: NoisePath


class SecondOrderOptions(StochasticOptions, total=False):
    """Arguments of `dpmpp_2m`, but for eta."""

    solver: MultistepSolver
    lower_order_final: bool


class ThirdOrderOptions(SecondOrderOptions, total=False):
    """Arguments of `dpmpp_3m`, but for eta."""

    compat: bool


class MiddleOptions(StochasticOptions, total=False):
    """Arguments of `dpmpp_2s`, but for eta."""

    r: float


@neutrally
@shows_arguments_of(grid)
def dpmpp_1s(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    noise: float = 1.0,
    noise_path: NoisePath = "independent",
    **options: Unpack[GridOptions],
) -> Plan:
    """DPM-Solver++ of first order: x' = (sigma'/sigma) e^(-eta h) x + alpha' (1 - e^(-(1 + eta) h)) x0 + noise.

    One model call a step, order 1. eta = 0 is `ddim` with eta = 0, eta = 1 diffusers' sde-dpmsolver++ of order 1. The
    state is the schedule's own, alpha x0 + sigma eps; grid and arguments as for `euler`. arXiv 2211.01095, eq. 9 and
    18.
    """
    space, points = own_grid("dpmpp_1s", schedule, steps, **options)
    return _multistep("dpmpp_1s", 1, space, points, eta, noise, noise_path, "midpoint", False, False)


@neutrally
@shows_arguments_of(grid)
def dpmpp_2m(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    noise: float = 1.0,
    noise_path: NoisePath = "independent",
    solver: MultistepSolver = "midpoint",
    lower_order_final: bool = False,
    **options: Unpack[GridOptions],
) -> Plan:
    """DPM-Solver++(2M): the line through this and the last estimate of x0; one model call a step, order 2.

    ``solver`` "midpoint" takes that line at the middle of the step, x0 + (x0 - x0_last) h/(2 h_last), as the paper and
    k-diffusion's dpmpp_2m do; "heun" integrates it exactly. eta = 1 is `dpmpp_2m_sde`. The first step, and one that
    ends at sigma = 0, are of first order; ``lower_order_final`` makes the last one so at every level (diffusers does
    below 15 steps). The state is the schedule's own; grid and arguments as for `euler`. arXiv 2211.01095, algorithm 2.
    """
    space, points = own_grid("dpmpp_2m", schedule, steps, **options)
    return _multistep("dpmpp_2m", 2, space, points, eta, noise, noise_path, solver, lower_order_final, False)


@neutrally
@shows_arguments_of(dpmpp_2m)
def dpmpp_2m_sde(
    schedule: Schedule, steps: int | None = None, *, eta: float = 1.0, **options: Unpack[SecondOrderOptions]
) -> Plan:
    """`dpmpp_2m` with eta = 1: the reverse SDE, new noise each step; other arguments are `dpmpp_2m`'s."""
    return replace(dpmpp_2m(schedule, steps, eta=eta, **options), name="dpmpp_2m_sde")


@neutrally
@shows_arguments_of(grid)
def dpmpp_3m(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    noise: float = 1.0,
    noise_path: NoisePath = "independent",
    solver: MultistepSolver = "heun",
    lower_order_final: bool = False,
    compat: bool = False,
    **options: Unpack[GridOptions],
) -> Plan:
    """DPM-Solver++(3M): the parabola through the last three estimates of x0, integrated exactly; order 3.

    One model call a step. The first step and one that ends at sigma = 0 are of first order, the second of second order
    (which leaves the whole at order 2 to 3). ``compat`` gives the formula of the authors' code, k-diffusion and
    diffusers, whose curvature term has half the right weight, so that its order is 2. ``lower_order_final`` is
    diffusers' below 15 steps: the last step of first order, the one before of second; ``solver`` is that of
    second-order steps. eta = 1 is `dpmpp_3m_sde` (diffusers' sde form of order 3 has the curvature with the wrong sign
    and size and is not offered). State, grid and arguments as for `dpmpp_2m`.
    """
    space, points = own_grid("dpmpp_3m", schedule, steps, **options)
    return _multistep("dpmpp_3m", 3, space, points, eta, noise, noise_path, solver, lower_order_final, compat)


@neutrally
@shows_arguments_of(dpmpp_3m)
def dpmpp_3m_sde(
    schedule: Schedule, steps: int | None = None, *, eta: float = 1.0, **options: Unpack[ThirdOrderOptions]
) -> Plan:
    """`dpmpp_3m` with eta = 1: the reverse SDE, new noise each step; other arguments are `dpmpp_3m`'s."""
    return replace(dpmpp_3m(schedule, steps, eta=eta, **options), name="dpmpp_3m_sde")


@neutrally
@shows_arguments_of(grid)
def dpmpp_2s(
    schedule: Schedule,
    steps: int | None = None,
    *,
    r: float = 0.5,
    eta: float = 0.0,
    noise: float = 1.0,
    noise_path: NoisePath = "independent",
    **options: Unpack[GridOptions],
) -> Plan:
    """DPM-Solver++(2S): a first-order step to lambda + r h, then the whole one with the x0 extrapolated through both.

    x' = a x + alpha' (1 - e^(-k h)) ((1 - 1/(2r)) x0 + 1/(2r) x0_mid) + noise, r in (0, 1]. Two model calls a step,
    order 2; a step that ends at sigma = 0, or starts where alpha is 0, has one call and is of first order. eta > 0
    draws noise in both rows, the second for the whole step: at eta = 1 the form of k-diffusion's dpmpp_sde. The two
    are independent, or with ``noise_path="brownian"`` of one path over nested intervals, as with k-diffusion's
    BrownianTreeNoiseSampler. State, grid and arguments as for `dpmpp_2m`. arXiv 2211.01095, algorithm 1.
    """
    space, points = own_grid("dpmpp_2s", schedule, steps, **options)
    _check(eta, noise)
    path = clock(noise_path)
    if not 0.0 < r <= 1.0:
        raise ValueError(f"r must lie in (0, 1], got {r}")
    whole = jumps(points[:-1], points[1:], eta)
    single = whole.sharp | whole.still
    two = np.flatnonzero(~single)
    sizes = np.where(single, 1, 2)
    first = np.cumsum(sizes) - sizes
    nodes, ends = ([listed[j] for j in two] for listed in (points, points[1:]))
    middles = _middles(space, nodes, ends, whole.h[two], r)
    half, full = jumps(nodes, middles, eta), whole.some(two)
    # s holds all that the second row needs of x and the first x0.
    share = full.to.alpha * full.weight(0)
    more: dict[str, Any] = {"A": full.a, "B": share * (1.0 - 0.5 / r), "saves": ((0, "s"),), "ends_step": False}
    g = noise * half.g
    more |= {"a": half.a, "b": half.to.alpha * half.weight(0), "g": g, "fields": _spans(path, nodes, middles, g)}
    begun = rows_of(first[two], half.node, half.to, **more)
    g = noise * full.g  # of the whole step: on a path its first part is the noise of the first row
    more = {"b": share * 0.5 / r, "e": (1.0,), "g": g, "fields": _spans(path, nodes, ends, g)}
    ended = rows_of(first[two] + 1, half.to, full.to, **more)
    one = np.flatnonzero(single)
    others, lower = [points[j] for j in one], [points[j + 1] for j in one]
    last = _first_order(first[one], others, lower, whole.some(one), noise, path)
    count = int(sizes.sum())
    rows = placed(count, (first[two], begun), (first[two] + 1, ended), (first[one], last))
    at = placed(count, (first[two], nodes), (first[two] + 1, middles), (first[one], others))
    return chain("dpmpp_2s", space, rows, at, native_scale(space, points[0]))


def _middles(space: Coordinates, nodes: list[Node], ends: list[Node], h: Array, r: float) -> list[Node]:
    """The points at lambda + r h of these steps."""
    if r == 1.0:  # a flow may end above sigma = 0, at a point that has no model call of its own
        return [to if to.p or to.q else space.native(space.node(to.v)) for to in ends]
    lengths = h.tolist()
    return space.native_at_log_ratios([node.log_ratio + r * h for node, h in zip(nodes, lengths, strict=True)])


@neutrally
@shows_arguments_of(dpmpp_2s)
def dpmpp_sde(
    schedule: Schedule, steps: int | None = None, *, eta: float = 1.0, **options: Unpack[MiddleOptions]
) -> Plan:
    """`dpmpp_2s` with eta = 1: the reverse SDE, two model calls a step; other arguments are `dpmpp_2s`'s."""
    return replace(dpmpp_2s(schedule, steps, eta=eta, **options), name="dpmpp_sde")


def _check(eta: float, noise: float) -> None:
    not_negative("eta", eta)
    not_negative("noise", noise)


def _spans(path: Clock, nodes: list[Node], to: list[Node], g: Array) -> dict[str, list[Any]]:
    """The field ``path`` of rows whose noise spans these levels."""
    return {"path": [path(*line) for line in zip(nodes, to, g.tolist(), strict=True)]}


def _first_order(
    i: NDArray[np.int64], nodes: list[Node], to: list[Node], jump: Jumps, noise: float, path: Clock
) -> list[Row]:
    """First-order rows; on clean data x0 itself, between equal levels x."""
    exact = [ends_on_x0(after) for after in to]
    g = np.where(jump.still | np.array(exact, bool), 0.0, noise * jump.g)
    more: dict[str, Any] = {"a": jump.a, "b": jump.to.alpha * jump.weight(0), "g": g}
    made = rows_of(i, jump.node, jump.to, fields=_spans(path, nodes, to, g), **more)
    for k in np.flatnonzero(exact).tolist():
        made[k] = row(int(i[k]), nodes[k], to[k], b=1.0)
    for k in np.flatnonzero(jump.still).tolist():
        made[k] = still(int(i[k]), nodes[k], to[k])
    return made


def _multistep(
    name: str,
    order: int,
    space: Coordinates,
    points: list[Node],
    eta: float,
    noise: float,
    noise_path: NoisePath,
    solver: MultistepSolver,
    lower_order_final: bool,
    compat: bool,
) -> Plan:
    """The j-th step of some length saves its x0 in slot j mod (order - 1) and reads those of the ones before."""
    _check(eta, noise)
    choice("solver", solver, get_args(MultistepSolver))
    path = clock(noise_path)
    nodes, to = points[:-1], points[1:]
    whole = jumps(nodes, to, eta)
    taken = np.flatnonzero(~whole.still)
    number = np.cumsum(~whole.still) - 1  # j
    past = np.zeros(len(nodes), np.int64)  # finite steps before each, as many as its order needs
    finite = 0
    for j, (place, h) in enumerate(zip(taken.tolist(), whole.h[taken].tolist(), strict=True)):
        used = min(order - 1, finite)
        if lower_order_final:
            used = min(used, len(taken) - 1 - j)
        past[place] = 0 if whole.sharp[place] else used
        finite = finite + 1 if h < math.inf else 0
    parts: list[tuple[NDArray[np.int64], list[Row]]] = []
    for used in range(order):
        at = np.flatnonzero((past == used) & (~whole.still | (used == 0)))
        if not len(at):
            continue
        jump, step = whole.some(at), number[at]
        starts, ends = [nodes[k] for k in at], [to[k] for k in at]
        if used == 0:
            parts.append((at, _first_order(at, starts, ends, jump, noise, path)))
            continue
        weights = _weights(jump, [whole.h[taken[step - n]] for n in range(1, used + 1)], solver, compat)
        e = np.zeros((len(HISTORIES), len(at)))
        for n, w in enumerate(weights[1:], 1):
            e[(step - n) % (order - 1), np.arange(len(at))] = jump.to.alpha * w
        g = noise * jump.g
        more: dict[str, Any] = {"a": jump.a, "b": jump.to.alpha * weights[0], "e": list(e), "g": g}
        parts.append((at, rows_of(at, jump.node, jump.to, fields=_spans(path, starts, ends, g), **more)))
    rows = placed(len(nodes), *parts)
    for j, place in enumerate(taken.tolist() if order > 1 else ()):
        rows[place] = rows[place].but(saves=((j % (order - 1), "x0"),))
    return chain(name, space, rows, nodes, native_scale(space, points[0]))


def _weights(jump: Jumps, lengths: list[Array], solver: MultistepSolver, compat: bool) -> list[Array]:
    """Weights of x0 and the one or two estimates before it, ``lengths`` ago in lambda, the latest first."""
    first = jump.weight(0)
    r0, slope = lengths[0] / jump.h, jump.weight(1)
    if len(lengths) == 1:
        slope = 0.5 * first if solver == "midpoint" else slope
        return [first + slope / r0, -slope / r0]
    # D(u) = D0 + u D1 + u^2 D2 with the divided differences D1 and D2.
    r1 = lengths[1] / jump.h
    curve = jump.weight(2) * (0.5 if compat else 1.0)
    whole = r0 + r1
    one = [1.0 / r0, -1.0 / r0, np.zeros_like(r0)]
    two = [1.0 / (r0 * whole), -1.0 / (r0 * r1), 1.0 / (r1 * whole)]
    total = [slope * (x + r0 * y) + curve * y for x, y in zip(one, two, strict=True)]
    return [first + total[0], total[1], total[2]]

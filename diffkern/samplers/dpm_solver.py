"""DPM-Solver++ (arXiv 2211.01095): exponential integrators of the estimate of x0, deterministic and stochastic.

With lambda = ln(alpha/sigma), h = lambda' - lambda, k = 1 + eta and the polynomial D(u), u from 0 to 1, through the
latest estimates of x0,

    x' = sigma'/sigma e^(-eta h) x + alpha' k h int_0^1 e^(-(1-u) k h) D(u) du + noise sigma' sqrt(1 - e^(-2 eta h)) z

eta = 0 is the probability-flow ODE, eta = 1 the reverse SDE (eta as in k-diffusion: churn g sqrt(eta)). Where sigma' is
0 (h infinite) the step ends on x0. ``noise_path="brownian"`` draws each z from one Brownian path a sample, the same for
every number of steps (`diffkern.samplers._noise_path`); "independent" draws noise of its own for each row.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, get_args

from typing_extensions import Unpack

from diffkern.modes import neutrally
from diffkern.names import MultistepSolver, NoisePath
from diffkern.plan import Plan, Row
from diffkern.samplers._jump import Jump
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
    jumps = [Jump(node, to, eta) for node, to in itertools.pairwise(points)]
    whole = [not (jump.sharp or jump.still) for jump in jumps]
    middles = iter(_middles(space, list(itertools.compress(zip(points, points[1:], jumps, strict=False), whole)), r))
    rows: list[Row] = []
    at: list[Node] = []
    for node, to, jump, two in zip(points, points[1:], jumps, whole, strict=False):
        if not two:
            rows.append(_last(len(rows), node, to, jump, noise, path))
            at.append(node)
            continue
        middle = next(middles)
        half = Jump(node, middle, eta)
        a, b = half.a, half.alpha * half.weight(0)
        # s holds all that the second row needs of x and the first x0.
        share = jump.alpha * jump.weight(0)
        g = noise * half.g
        more: dict[str, Any] = {"A": jump.a, "B": share * (1.0 - 0.5 / r), "saves": ((0, "s"),), "ends_step": False}
        rows.append(row(len(rows), node, middle, a=a, b=b, g=g, path=path(node, middle, g), **more))
        g = noise * jump.g  # of the whole step: on a path its first part is the noise of the first row
        rows.append(row(len(rows), middle, to, b=share * 0.5 / r, e=(1.0,), g=g, path=path(node, to, g)))
        at += [node, middle]
    return chain("dpmpp_2s", space, rows, at, native_scale(space, points[0]))


def _middles(space: Coordinates, steps: list[tuple[Node, Node, Jump]], r: float) -> list[Node]:
    """The points at lambda + r h of these steps."""
    if r == 1.0:  # a flow may end above sigma = 0, at a point that has no model call of its own
        return [to if to.p or to.q else space.native(space.node(to.v)) for _, to, _ in steps]
    return space.natives(space.at_log_ratios([node.log_ratio + r * jump.h for node, _, jump in steps]))


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


def _last(i: int, node: Node, to: Node, jump: Jump, noise: float, path: Clock) -> Row:
    """A first-order row; on clean data x0 itself, between equal levels x."""
    if jump.still:
        return still(i, node, to)
    if ends_on_x0(to):
        return row(i, node, to, b=1.0)
    g = noise * jump.g
    return row(i, node, to, a=jump.a, b=to.alpha * jump.weight(0), g=g, path=path(node, to, g))


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
    jumps = [Jump(node, to, eta) for node, to in itertools.pairwise(points)]
    count = sum(not jump.still for jump in jumps)
    rows: list[Row] = []
    lengths: list[float] = []
    for i, (node, to, jump) in enumerate(zip(points, points[1:], jumps, strict=False)):
        if jump.still:
            rows.append(still(i, node, to))
            continue
        j = len(lengths)
        past = 0  # finite steps before this one, as many as its order needs
        while past < min(order - 1, j) and lengths[j - 1 - past] < math.inf:
            past += 1
        if lower_order_final:
            past = min(past, count - 1 - j)
        if jump.sharp or past == 0:
            made = _last(i, node, to, jump, noise, path)
        else:
            weights = _weights(jump, lengths[j - past : j][::-1], solver, compat)
            e = [0.0] * 4
            for n, w in enumerate(weights[1:], 1):
                e[(j - n) % (order - 1)] = to.alpha * w
            g = noise * jump.g
            made = row(i, node, to, a=jump.a, b=to.alpha * weights[0], e=e, g=g, path=path(node, to, g))
        rows.append(made.but(saves=((j % (order - 1), "x0"),)) if order > 1 else made)
        lengths.append(jump.h)
    return chain(name, space, rows, points[:-1], native_scale(space, points[0]))


def _weights(jump: Jump, lengths: list[float], solver: MultistepSolver, compat: bool) -> list[float]:
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
    one = [1.0 / r0, -1.0 / r0, 0.0]
    two = [1.0 / (r0 * whole), -1.0 / (r0 * r1), 1.0 / (r1 * whole)]
    total = [slope * (x + r0 * y) + curve * y for x, y in zip(one, two, strict=True)]
    return [first + total[0], total[1], total[2]]

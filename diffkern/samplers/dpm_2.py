"""k-diffusion's two-stage samplers: DPM-Solver-2, and ancestral forms of it and of DPM-Solver++(2S).

All step in the state x0 + sigma eps and take their second slope or estimate at the geometric middle of two levels.
"""

from __future__ import annotations

import math
from itertools import compress

from typing_extensions import Unpack

from diffkern.modes import neutrally
from diffkern.plan import Plan, Row
from diffkern.samplers._churn import churned_nodes
from diffkern.samplers.arguments import not_negative
from diffkern.samplers.nodes import Coordinates, GridOptions, Node, chain, grid, row, still
from diffkern.schedules.base import Schedule
from diffkern.signatures import shows_arguments_of


@neutrally
@shows_arguments_of(grid)
def dpm_2(
    schedule: Schedule,
    steps: int | None = None,
    *,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    **options: Unpack[GridOptions],
) -> Plan:
    """DPM-Solver-2 as in k-diffusion: x_m = x + (sigma_m - sigma) slope(x), x' = x + (sigma' - sigma) slope(x_m).

    sigma_m = sqrt(sigma sigma'), where `midpoint` has the arithmetic middle. Two model calls a step, order 2; a step to
    sigma = 0 is an Euler step. Grid, churn and other arguments as for `euler`; not for flows. arXiv 2206.00927 (its
    algorithm 1 keeps the exponential form); arXiv 2206.00364.
    """
    space, nodes, end = _grid("dpm_2", schedule, steps, **options)
    churned, noises = churned_nodes(space, nodes, churn, churn_range, churn_noise)
    downs = [to.sigma for to in (*nodes[1:], end)]
    rows, at = _two_slopes(space, churned, downs, [*churned[1:], end], [*noises[1:], 0.0])
    return chain("dpm_2", space, rows, at, math.hypot(nodes[0].sigma, noises[0]))


@neutrally
@shows_arguments_of(grid)
def dpm_2_ancestral(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    noise: float = 1.0,
    **options: Unpack[GridOptions],
) -> Plan:
    """`dpm_2` to a lower level and noise back up: to sigma_down, then + noise sigma_up z, as `euler_ancestral`.

    sigma_up = min(sigma', eta sigma' sqrt(1 - sigma'^2/sigma^2)), sigma_down = sqrt(sigma'^2 - sigma_up^2), the middle
    is that of sigma and sigma_down. Two model calls a step; eta = 0 is `dpm_2`. Arguments as for `euler_ancestral`; not
    for flows. k-diffusion's sample_dpm_2_ancestral.
    """
    not_negative("eta", eta)
    not_negative("noise", noise)
    space, nodes, end = _grid("dpm_2_ancestral", schedule, steps, **options)
    after = [*nodes[1:], end]
    levels = [ancestral_levels(node.sigma, to.sigma, eta) for node, to in zip(nodes, after, strict=True)]
    rows, at = _two_slopes(space, nodes, [down for down, _ in levels], after, [noise * up for _, up in levels])
    return chain("dpm_2_ancestral", space, rows, at)


@neutrally
@shows_arguments_of(grid)
def dpmpp_2s_ancestral(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    noise: float = 1.0,
    **options: Unpack[GridOptions],
) -> Plan:
    """DPM-Solver++(2S) to a lower level and noise back up.

        x_m = (sigma_m/sigma) x + (1 - sigma_m/sigma) x0,    x' = (sigma_down/sigma) x + (1 - sigma_down/sigma) x0_m
              + noise sigma_up z

    with sigma_m = sqrt(sigma sigma_down) and the levels of `dpm_2_ancestral`. Two model calls a step; a step to sigma =
    0 has one and ends on x0. eta = 0 is of order 2 (`dpmpp_2s`, which extrapolates x0 instead, in the schedule's own
    state). Arguments as for `euler_ancestral`; not for flows. k-diffusion's sample_dpmpp_2s_ancestral; arXiv
    2211.01095.
    """
    not_negative("eta", eta)
    not_negative("noise", noise)
    space, nodes, end = _grid("dpmpp_2s_ancestral", schedule, steps, **options)
    after = [*nodes[1:], end]
    levels = [ancestral_levels(node.sigma, to.sigma, eta) for node, to in zip(nodes, after, strict=True)]
    middles = _middles(space, nodes, [down for down, _ in levels])
    rows: list[Row] = []
    at: list[Node] = []
    for node, to, middle, (down, up) in zip(nodes, after, middles, levels, strict=True):
        if middle is None:
            rows.append(_one(len(rows), node, to, down, noise * up))
            at.append(node)
            continue
        half, whole = middle.sigma / node.sigma, down / node.sigma
        rows.append(_first(row(len(rows), node, middle, a=half, b=1.0 - half)))
        rows.append(row(len(rows), middle, to, b=1.0 - whole, e=(whole,), g=noise * up))
        at += [node, middle]
    return chain("dpmpp_2s_ancestral", space, rows, at)


def _two_slopes(
    space: Coordinates, nodes: list[Node], downs: list[float], reached: list[Node], noises: list[float]
) -> tuple[list[Row], list[Node]]:
    """The rows of steps to the levels ``downs``, each with noise that leaves it at ``reached``, and their points."""
    rows: list[Row] = []
    at: list[Node] = []
    middles = _middles(space, nodes, downs)
    for node, middle, down, to, g in zip(nodes, middles, downs, reached, noises, strict=True):
        if middle is None:
            rows.append(_one(len(rows), node, to, down, g))
            at.append(node)
            continue
        half, whole = middle.sigma - node.sigma, down - node.sigma
        first = row(len(rows), node, middle, a=1.0 + half * node.sx, b=half * node.s0, d=half * node.sm)
        rows.append(_first(first))
        a, b, d = (whole * c for c in (middle.sx, middle.s0, middle.sm))
        rows.append(row(len(rows), middle, to, a=a, b=b, d=d, e=(1.0,), g=g))
        at += [node, middle]
    return rows, at


def _middles(space: Coordinates, nodes: list[Node], downs: list[float]) -> list[Node | None]:
    """The geometric middles of steps from these points to these levels; None for a step that has none."""
    two = [0.0 < down != node.sigma for node, down in zip(nodes, downs, strict=True)]
    levels = [math.sqrt(node.sigma * down) for node, down in zip(nodes, downs, strict=True)]
    found = iter(space.nodes(list(compress(levels, two))))
    return [next(found) if has else None for has in two]


def _one(i: int, node: Node, to: Node, down: float, g: float) -> Row:
    """A step with one model call: to sigma_down = 0, where it ends on x0, or of no length."""
    return still(i, node, to, g) if down == node.sigma else row(i, node, to, b=1.0, g=g)


def _first(made: Row) -> Row:
    """The first row of a step, which keeps the state it started from."""
    return made.but(saves=((0, "x"),), ends_step=False)


def ancestral_levels(sigma: float, to: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up) of an ancestral step from the level ``sigma`` to ``to``; see `dpm_2_ancestral`."""
    up = min(to, eta * to * math.sqrt(max(0.0, 1.0 - (to / sigma) ** 2)))
    return math.sqrt(to * to - up * up), up


def _grid(
    sampler: str,
    schedule: Schedule,
    steps: int | None,
    **options: Unpack[GridOptions],
) -> tuple[Coordinates, list[Node], Node]:
    space, nodes, end = grid(sampler, schedule, steps, **options)
    if space.in_time:
        raise ValueError(f"{sampler} needs a schedule that is integrated in sigma, got {schedule.name}")
    return space, nodes, end

"""k-diffusion's two-stage samplers: DPM-Solver-2, and ancestral forms of it and of DPM-Solver++(2S).

All step in the state x0 + sigma eps and take their second slope or estimate at the geometric middle of two levels.
"""

from __future__ import annotations

import math
from dataclasses import replace

from typing_extensions import Unpack

from diffkern.plan import Plan, Row
from diffkern.samplers.arguments import not_negative
from diffkern.samplers.nodes import Coordinates, GridOptions, Node, chain, churned_nodes, grid, row
from diffkern.schedules.base import Schedule
from diffkern.signatures import shows_arguments_of


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
    rows: list[Row] = []
    at: list[Node] = []
    for j, node in enumerate(churned):
        last = j + 1 == len(churned)
        to, reached = (end, end) if last else (nodes[j + 1], churned[j + 1])
        _two_slopes(rows, at, space, node, to.sigma, reached, 0.0 if last else noises[j + 1])
    return chain("dpm_2", space, rows, at, math.hypot(nodes[0].sigma, noises[0]))


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
    rows: list[Row] = []
    at: list[Node] = []
    for node, to in zip(nodes, [*nodes[1:], end], strict=True):
        down, up = ancestral_levels(node.sigma, to.sigma, eta)
        _two_slopes(rows, at, space, node, down, to, noise * up)
    return chain("dpm_2_ancestral", space, rows, at)


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
    rows: list[Row] = []
    at: list[Node] = []
    for node, to in zip(nodes, [*nodes[1:], end], strict=True):
        down, up = ancestral_levels(node.sigma, to.sigma, eta)
        if down == 0.0:
            rows.append(row(len(rows), node, to, b=1.0, g=noise * up))
            at.append(node)
            continue
        middle = space.node(math.sqrt(node.sigma * down))
        half, whole = middle.sigma / node.sigma, down / node.sigma
        rows.append(_first(row(len(rows), node, middle, a=half, b=1.0 - half)))
        rows.append(row(len(rows), middle, to, b=1.0 - whole, e=(whole,), g=noise * up))
        at += [node, middle]
    return chain("dpmpp_2s_ancestral", space, rows, at)


def _two_slopes(
    rows: list[Row], at: list[Node], space: Coordinates, node: Node, down: float, reached: Node, g: float
) -> None:
    """The rows of one step to the level ``down``, and noise that leaves it at ``reached``."""
    if down == 0.0:
        rows.append(row(len(rows), node, reached, b=1.0, g=g))
        at.append(node)
        return
    middle = space.node(math.sqrt(node.sigma * down))
    half, whole = middle.sigma - node.sigma, down - node.sigma
    first = row(len(rows), node, middle, a=1.0 + half * node.sx, b=half * node.s0, d=half * node.sm)
    rows.append(_first(first))
    a, b, d = (whole * c for c in (middle.sx, middle.s0, middle.sm))
    rows.append(row(len(rows), middle, reached, a=a, b=b, d=d, e=(1.0,), g=g))
    at += [node, middle]


def _first(made: Row) -> Row:
    """The first row of a step, which keeps the state it started from."""
    return replace(made, saves=((0, "x"),), ends_step=False)


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

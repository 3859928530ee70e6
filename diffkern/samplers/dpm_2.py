"""k-diffusion's two-stage samplers: DPM-Solver-2, and ancestral forms of it and of DPM-Solver++(2S).

All step in the state x0 + sigma eps and take their second slope or estimate at the geometric middle of two levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from typing_extensions import Unpack

from diffkern.modes import neutrally
from diffkern.plan import Plan, Row
from diffkern.samplers._arrays import Array, Columns, columns, placed
from diffkern.samplers._churn import churned_nodes
from diffkern.samplers._columns import rows as rows_of
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
    rows, at = _two_stages(space, churned, downs, [*churned[1:], end], [*noises[1:], 0.0], _two_slopes)
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
    downs, noises = [down for down, _ in levels], [noise * up for _, up in levels]
    rows, at = _two_stages(space, nodes, downs, after, noises, _two_slopes)
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
    downs, noises = [down for down, _ in levels], [noise * up for _, up in levels]

    def stages(node: Columns, middle: Columns, down: Array) -> tuple[dict[str, Any], dict[str, Any]]:
        half, whole = middle.sigma / node.sigma, down / node.sigma
        return {"a": half, "b": 1.0 - half}, {"b": 1.0 - whole, "e": (whole,)}

    rows, at = _two_stages(space, nodes, downs, after, noises, stages)
    return chain("dpmpp_2s_ancestral", space, rows, at)


def _two_slopes(node: Columns, middle: Columns, down: Array) -> tuple[dict[str, Any], dict[str, Any]]:
    """The coefficients of both rows of steps along a slope."""
    half, whole = middle.sigma - node.sigma, down - node.sigma
    first = {"a": 1.0 + half * node.sx, "b": half * node.s0, "d": half * node.sm}
    return first, {"a": whole * middle.sx, "b": whole * middle.s0, "d": whole * middle.sm, "e": (1.0,)}


def _two_stages(
    space: Coordinates,
    nodes: list[Node],
    downs: list[float],
    reached: list[Node],
    noises: list[float],
    stages: Callable[[Columns, Columns, Array], tuple[dict[str, Any], dict[str, Any]]],
) -> tuple[list[Row], list[Node]]:
    """The rows of steps to the levels ``downs``, each with noise that leaves it at ``reached``, and their points.

    ``stages`` gives the coefficients of the two rows of steps with a geometric middle; the first keeps the state it
    started from. A step without has one row.
    """
    down, noise = np.array(downs), np.array(noises)
    sigma = np.array([node.sigma for node in nodes])
    double = (down > 0.0) & (down != sigma)
    first = np.cumsum(1 + double) - 1 - double
    (two,), (one,) = np.nonzero(double), np.nonzero(~double)
    middles = space.nodes(np.sqrt(sigma * down)[two].tolist())
    starts = [nodes[j] for j in two]
    node, middle, to = columns(starts), columns(middles), columns([reached[j] for j in two])
    begin, end = stages(node, middle, down[two])
    begun = rows_of(first[two], node, middle, **begin, saves=((0, "x"),), ends_step=False)
    ended = rows_of(first[two] + 1, middle, to, **end, g=noise[two])
    single = [_one(int(first[j]), nodes[j], reached[j], downs[j], noises[j]) for j in one]
    count = len(nodes) + len(two)
    rows = placed(count, (first[two], begun), (first[two] + 1, ended), (first[one], single))
    at = placed(count, (first[two], starts), (first[two] + 1, middles), (first[one], [nodes[j] for j in one]))
    return rows, at


def _one(i: int, node: Node, to: Node, down: float, g: float) -> Row:
    """A step with one model call: to sigma_down = 0, where it ends on x0, or of no length."""
    return still(i, node, to, g) if down == node.sigma else row(i, node, to, b=1.0, g=g)


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

"""DDPM, DDIM and its inversion, Euler ancestral: steps between two levels of x = alpha x0 + sigma eps.

Each of them re-noises the estimate of x0: x' = alpha' x0 + sqrt(sigma'^2 - g^2) eps + g z.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from diffkern.modes import neutrally
from diffkern.names import EpsFrom, LearnedVariance, NoisePath, Prediction, Spacing
from diffkern.plan import Plan
from diffkern.samplers._noise_path import clock
from diffkern.samplers.arguments import choice, need_schedule, not_negative
from diffkern.samplers.nodes import (
    Coordinates,
    GridOptions,
    Node,
    chain,
    coordinates,
    grid,
    native_scale,
    own_grid,
    row,
    still,
)
from diffkern.schedules import predictions
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule, mixed_variance
from diffkern.schedules.grids import table_times
from diffkern.schedules.timesteps import Numbers
from diffkern.signatures import names_the_nearest, shows_arguments_of


@names_the_nearest
@neutrally
def ddpm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    timesteps: Numbers | None = None,
    spacing: Spacing | None = None,
    variance: LearnedVariance | float = "beta_tilde",
    prediction: Prediction | None = None,
    clip: float | None = None,
    sigmas: Numbers | None = None,
) -> Plan:
    """Ancestral sampling: x_s = mu~(x_t, x0) + sqrt(variance) z, no noise in the last step.

    On a table all T steps by default, or ``steps`` of them by a ``spacing`` of `schedules.grids` ("leading"), or the
    ``timesteps`` given (falling, the last one steps to clean data); on a sub-sequence beta is 1 - abar_t/abar_s. Every
    other schedule, and a table with ``sigmas``, takes the grid of `euler` (and its spacing "linspace"): a step between
    two levels of a path is exact whatever they are, with the `predictions.bridge` of its alpha and sigma. ``variance``
    is "beta", "beta_tilde", or v in [0, 1] for exp(v ln beta + (1-v) ln beta_tilde); the lectures that print mu~ +
    beta~ z, or sigma_t = beta~, mean sqrt(beta~). "learned" is that formula with v = (o + 1)/2, o the second half of
    the channels that the model returns, element by element (arXiv 2102.09672, eq. 15); a step of no length has none.
    ``clip`` clamps x0 to [-clip, clip]. arXiv 2006.11239, arXiv 2102.09672; lectures 000, 001, 002.
    """
    need_schedule(schedule)
    if steps is None and timesteps is None and sigmas is None and isinstance(schedule, DiscreteSchedule):
        steps = schedule.T
    run = _run("ddpm", schedule, steps, prediction, sigmas, timesteps, spacing, clip)
    if variance == "learned":
        none = run.beta == 0.0
        high = torch.where(none, 1.0, run.beta)
        low = torch.where(run.beta_tilde > 0.0, run.beta_tilde, high)  # 0 in the last step, which does not draw
        bounds = 0.5 * (high.log() + low.log()), 0.5 * (high.log() - low.log())
        r0, r1 = ((bound + 0.0).tolist() for bound in bounds)
        g = torch.where(none, 0.0, 1.0)
    else:
        r0 = r1 = [0.0] * len(run.at)
        g = mixed_variance(run.beta, run.beta_tilde, variance).sqrt()
    g[-1] = 0.0
    plan = run.plan("ddpm", run.coef_xt, run.coef_x0, torch.zeros_like(g), g, r0, r1)
    return replace(plan, learned_variance=True) if variance == "learned" else plan


@names_the_nearest
@neutrally
def ddim(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    prediction: Prediction | None = None,
    clip: float | None = None,
    timesteps: Numbers | None = None,
    spacing: Spacing | None = None,
    eps_from: EpsFrom | None = None,
    sigmas: Numbers | None = None,
) -> Plan:
    """x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - sd^2) eps + sd z with sd = eta sqrt(beta_tilde).

    beta_tilde = (1-abar_s)/(1-abar_t) (1 - abar_t/abar_s) is the posterior variance of the step t -> s; on any other
    path alpha_s x0 + sqrt(sigma_s^2 - sd^2) eps + sd z, with the beta_tilde of `predictions.bridge`.
    50 steps by default: on a table by a ``spacing`` of `schedules.grids` ("leading"), or ``timesteps``, any falling
    sub-sequence, the last one stepping to clean data; every other schedule, and a table with ``sigmas``, takes the grid
    of `euler` (and its spacing "linspace"). eta = 0 is deterministic; eta = 1 is `ddpm` with beta_tilde. ``clip``
    clamps x0 to [-clip, clip]. A path that starts where alpha is 0 (`cosine_vp`, a flow, a table with zero terminal
    SNR) starts there with a prediction that says something of x0 there, such as v or x0.
    ``eps_from`` says which eps points the direction: "x0" derives it from the (clipped) x0, "model" takes the model's
    own; the default is "x0" with a clip and "model" without one, where both are equal but for rounding.
    arXiv 2010.02502, eq. 12 and 16; lecture 000.
    """
    need_schedule(schedule)
    if steps is None and timesteps is None and sigmas is None:
        steps = min(50, schedule.T) if isinstance(schedule, DiscreteSchedule) else 50
    run = _run("ddim", schedule, steps, prediction, sigmas, timesteps, spacing, clip)
    if eps_from is None:
        eps_from = "model" if run.space.clip == math.inf else "x0"
    choice("eps_from", eps_from, get_args(EpsFrom))
    if not 0.0 <= eta < math.inf:
        raise ValueError(f"eta must be a finite number >= 0, got {eta}")
    g = eta * run.beta_tilde.sqrt()
    left = run.to_variance - g * g
    if bool((left < -1e-12 * run.to_variance).any()):
        i = int((left < -1e-12 * run.to_variance).nonzero()[0])
        t, s = (run.points[j].time for j in (i, i + 1))
        raise ValueError(f"eta must leave 1 - abar_s - sd^2 >= 0, got eta = {eta} at the step t={t:g} -> s={s:g}")
    along = left.clamp(min=0.0).sqrt()
    if eps_from == "model":
        P, Q = torch.tensor([(n.P, n.Q) for n in run.at], dtype=torch.float64, device="cpu").T
        return run.plan("ddim", along * P, run.to_alpha, along * Q, g)
    turn = along / run.sigma
    return run.plan("ddim", turn, run.to_alpha - along * run.alpha / run.sigma, torch.zeros_like(along), g)


class _Steps(NamedTuple):
    """Steps t -> s of the own state, as tensors [n]; ``points`` [n + 1] holds every t and the end."""

    space: Coordinates
    points: list[Node]
    alpha: Tensor
    sigma: Tensor
    to_alpha: Tensor
    to_variance: Tensor
    coef_x0: Tensor
    coef_xt: Tensor
    beta_tilde: Tensor
    beta: Tensor

    @property
    def at(self) -> list[Node]:
        """Where the model is called."""
        return self.points[:-1]

    def plan(
        self, name: str, a: Tensor, b: Tensor, d: Tensor, g: Tensor, r0: Sequence[float] = (), r1: Sequence[float] = ()
    ) -> Plan:
        """x' = a x + b x0 + d m + g z, a row a step."""
        none = [0.0] * len(self.at)
        columns = (*(column.tolist() for column in (a, b, d, g)), r0 or none, r1 or none, self.beta.tolist())
        rows = []
        for i, (node, to, a_, b_, d_, g_, r0_, r1_, beta) in enumerate(
            zip(self.at, self.points[1:], *columns, strict=True)
        ):
            if beta == 0.0 and math.isnan(node.p):  # needs no x0 to stay where it is
                rows.append(still(i, node, to))
            else:
                rows.append(row(i, node, to, a=a_, b=b_, d=d_, g=g_, r0=r0_, r1=r1_))
        return chain(name, self.space, rows, self.at, native_scale(self.space, self.points[0]))


def _run(
    name: str,
    schedule: Schedule,
    steps: int | None,
    prediction: Prediction | None,
    sigmas: Numbers | None,
    timesteps: Numbers | None,
    spacing: Spacing | None,
    clip: float | None,
) -> _Steps:
    """The steps of `ddpm` and `ddim`: between entries of a table, else on the grid of `euler`."""
    if not isinstance(schedule, DiscreteSchedule) or sigmas is not None:
        spacing = "linspace" if spacing is None else spacing
        space, points = own_grid(name, schedule, steps, prediction, sigmas, timesteps, spacing, clip)
        rates = torch.tensor([(n.alpha, n.sigma) for n in points], dtype=torch.float64, device="cpu").T
        alpha, sigma, to_alpha, to_sigma = rates[0, :-1], rates[1, :-1], rates[0, 1:], rates[1, 1:]
        bridge = predictions.bridge(alpha, sigma, to_alpha, to_sigma)
        return _Steps(space, points, alpha, sigma, to_alpha, to_sigma**2, *bridge)
    times = table_times(schedule, steps, timesteps, "leading" if spacing is None else spacing)
    space = coordinates(schedule, prediction, clip)
    t, s = (torch.tensor(listed, device="cpu") for listed in (times, [*times[1:], -1]))
    alpha, sigma, abar = schedule.alpha(t), schedule.sigma(t), schedule.abar(s)
    said = predictions.estimates(alpha, sigma, *predictions.target_coefficients(schedule, space.prediction, t))
    columns = (alpha, sigma, schedule.model_time(space.prediction, t).double(), *said)
    points = [
        Node(float(time), a, n, known, 1.0, p, q, P, Q, space.clip)
        for time, a, n, known, p, q, P, Q in zip(times, *(column.tolist() for column in columns), strict=True)
    ]
    posterior, beta = schedule.posterior(t, s), schedule.beta(t, s)
    end = Node(-1.0, 1.0, 0.0, -1.0)
    return _Steps(space, [*points, end], alpha, sigma, abar.sqrt(), 1.0 - abar, *posterior, beta)


@neutrally
@shows_arguments_of(grid)
def euler_ancestral(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    noise: float = 1.0,
    noise_path: NoisePath = "independent",
    **options: Unpack[GridOptions],
) -> Plan:
    """Euler to a lower level and noise back up: x' = alpha' x0 + sigma_down eps + noise sigma_up z, order 1 as an SDE.

    sigma_up = min(sigma', eta sigma' sqrt(1 - (alpha sigma'/(alpha' sigma))^2)), sigma_down = sqrt(sigma'^2 -
    sigma_up^2). In the state x0 + sigma eps (alpha = 1) that is x + (sigma_down - sigma) eps, with eta = 1 the
    ancestral sampler of k-diffusion and diffusers; the same formula holds for flows. eta = 0 is `euler` in sigma, and
    `ddim`(eta) is the same sampler on the state of a table. Grid and arguments as for `euler`; no noise in a step that
    ends at sigma = 0. With a ``clip`` eps follows the clipped x0. ``noise_path="brownian"`` takes every z from one
    Brownian path a sample, the same for every number of steps: strong order 1 with eta = 1. arXiv 2011.13456, appendix
    F; arXiv 2010.02502, eq. 12.
    """
    not_negative("eta", eta)
    not_negative("noise", noise)
    path = clock(noise_path)
    space, nodes, end = grid("euler_ancestral", schedule, steps, **options)
    rows = []
    for i, (node, to) in enumerate(zip(nodes, [*nodes[1:], end], strict=True)):
        if node.v == to.v:
            rows.append(still(i, node, to))
            continue
        ratio = node.alpha * to.sigma / (to.alpha * node.sigma)
        up = min(to.sigma, eta * to.sigma * math.sqrt(max(0.0, 1.0 - ratio * ratio)))
        down = math.sqrt(to.sigma**2 - up**2)
        a, b, d = down * node.P, to.alpha, down * node.Q
        if space.clip < math.inf:
            a, b, d = down / node.sigma, to.alpha - down * node.alpha / node.sigma, 0.0
        g = noise * up
        rows.append(row(i, node, to, a=a, b=b, d=d, g=g, path=path(node, to, g)))
    return chain("euler_ancestral", space, rows, nodes)


@names_the_nearest
@neutrally
def ddim_inversion(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: Prediction | None = None,
    sigmas: Numbers | None = None,
    timesteps: Numbers | None = None,
    spacing: Spacing | None = None,
) -> Plan:
    """From data to noise along the probability flow: `ddim`'s steps, each solved for the state it started from.

    x_t = (alpha_t/alpha_s) x_s + (sigma_t - alpha_t sigma_s/alpha_s) eps, s the level nearer to the data.
    A `ddim` step t -> s solved for x_t, with eps taken at x_s and the time t (what diffusers' inverse does; x_t itself
    is not known yet), so inversion and sampling on one grid return the start within an error of first order. ``x`` of
    `sample` is the data; the result is the state that `ddim` (tables), `dpmpp_1s` or `euler_ancestral` with eta = 0
    (flows, EDM) starts from. A flow is stepped back in t by Euler's method, each slope at the time of its state.
    Grid and arguments as for `euler`, on a table by default with `ddim`'s spacing "leading". arXiv 2010.02502, section
    4.3; arXiv 2105.05233, appendix F.
    """
    need_schedule(schedule)
    if isinstance(schedule, DiscreteSchedule) and sigmas is None and spacing in (None, "leading", "trailing"):
        if (steps is None) == (timesteps is None):
            raise ValueError("ddim_inversion needs exactly one of steps, sigmas and timesteps, got none or two")
        whole = table_times(schedule, steps, timesteps, spacing or "leading")
        steps, timesteps = None, [float(t) for t in whole]
    space, points = own_grid(
        "ddim_inversion", schedule, steps, prediction, sigmas, timesteps, spacing or "linspace", None
    )
    points.reverse()
    rows = []
    if space.in_time:
        points[0] = space.node(points[0].v)
        for i, (node, to) in enumerate(itertools.pairwise(points)):
            h = to.v - node.v
            rows.append(row(i, node, to, a=1.0 + h * node.sx, d=h * node.sm))
        return chain("ddim_inversion", space, rows, points[:-1], 0.0)
    for i, (before, to) in enumerate(itertools.pairwise(points)):
        if before.v == to.v:
            rows.append(still(i, to, to))
            continue
        ratio = to.alpha / before.alpha
        turn = to.sigma - ratio * before.sigma
        rows.append(row(i, to, to, a=ratio + turn * to.P, d=turn * to.Q))
    return chain("ddim_inversion", space, rows, points[1:], 0.0)

"""DDPM, DDIM and its inversion, Euler ancestral: steps between two levels of x = alpha x0 + sigma eps.

Each of them re-noises the estimate of x0: x' = alpha' x0 + sqrt(sigma'^2 - g^2) eps + g z.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from diffkern import streams
from diffkern.names import Prediction, Spacing
from diffkern.plan import Plan, Row
from diffkern.samplers._noise_path import clock
from diffkern.samplers.arguments import bound, need_discrete, need_schedule, not_negative
from diffkern.samplers.nodes import GridOptions, chain, grid, row
from diffkern.schedules import predictions
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.grids import table_times
from diffkern.schedules.timesteps import Numbers
from diffkern.signatures import names_the_nearest, shows_arguments_of


@names_the_nearest
def ddpm(
    schedule: DiscreteSchedule,
    steps: int | None = None,
    *,
    timesteps: Iterable[int] | None = None,
    spacing: Spacing = "leading",
    variance: str | float = "beta_tilde",
    prediction: Prediction = "eps",
    clip: float | None = None,
) -> Plan:
    """Ancestral sampling: x_s = mu~(x_t, x0) + sqrt(variance) z, no noise in the last step.

    All T steps by default, or ``steps`` of them by a ``spacing`` of `schedules.grids`, or the ``timesteps`` given
    (falling, the last one steps to clean data); on a sub-sequence beta is 1 - abar_t/abar_s. ``variance`` is "beta",
    "beta_tilde", or v in [0, 1] for exp(v ln beta + (1-v) ln beta_tilde); the lectures that print mu~ + beta~ z, or
    sigma_t = beta~, mean sqrt(beta~). "learned" is that formula with v = (o + 1)/2, o the second half of the channels
    that the model returns, element by element (arXiv 2102.09672, eq. 15).
    ``clip`` clamps x0 to [-clip, clip]. arXiv 2006.11239, arXiv 2102.09672; lectures 000, 001, 002.
    """
    need_discrete("ddpm", schedule)
    if steps is None and timesteps is None:
        steps = schedule.T
    times = table_times(schedule, steps, timesteps, spacing)
    t, s = torch.tensor(times), torch.tensor([*times[1:], -1])
    coef_x0, coef_xt, _ = schedule.posterior(t, s)
    p, q, _, _ = predictions.to_x0_eps(schedule, prediction, t)
    columns = {"p": p, "q": q, "a": coef_xt, "b": coef_x0}
    learned = variance == "learned"
    if learned:
        low, high = schedule.variance(t, s, "beta_tilde"), schedule.variance(t, s, "beta")
        low[-1] = high[-1]  # not drawn from; beta_tilde is 0 there
        columns |= {"r0": 0.5 * (high.log() + low.log()), "r1": 0.5 * (high.log() - low.log())}
        g = torch.ones_like(low)
    else:
        g = schedule.variance(t, s, variance).sqrt()
    g[-1] = 0.0
    plan = _vp_plan("ddpm", schedule, times, prediction, bound(clip), g=g, **columns)
    return replace(plan, learned_variance=True) if learned else plan


@names_the_nearest
def ddim(
    schedule: DiscreteSchedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    prediction: Prediction = "eps",
    clip: float | None = None,
    timesteps: Iterable[int] | None = None,
    spacing: Spacing = "leading",
    eps_from: str | None = None,
) -> Plan:
    """x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - sd^2) eps + sd z with sd = eta sqrt(beta_tilde).

    beta_tilde = (1-abar_s)/(1-abar_t) (1 - abar_t/abar_s) is the posterior variance of the step t -> s.
    50 steps by default, by a ``spacing`` of `schedules.grids`; or ``timesteps``, any falling sub-sequence, the last one
    stepping to clean data. eta = 0 is deterministic; eta = 1 is `ddpm` with beta_tilde. ``clip`` clamps x0 to [-clip,
    clip].
    ``eps_from`` says which eps points the direction: "x0" derives it from the (clipped) x0, "model" takes the model's
    own; the default is "x0" with a clip and "model" without one, where both are equal but for rounding.
    arXiv 2010.02502, eq. 12 and 16; lecture 000.
    """
    need_discrete("ddim", schedule)
    if steps is None and timesteps is None:
        steps = min(50, schedule.T)
    times = table_times(schedule, steps, timesteps, spacing)
    most = bound(clip)
    if eps_from is None:
        eps_from = "model" if most == math.inf else "x0"
    if eps_from not in ("model", "x0"):
        raise ValueError(f"eps_from must be 'model' or 'x0', got {eps_from!r}")
    if not 0.0 <= eta < math.inf:
        raise ValueError(f"eta must be a finite number >= 0, got {eta}")
    t, s = torch.tensor(times), torch.tensor([*times[1:], -1])
    p, q, P, Q = predictions.to_x0_eps(schedule, prediction, t)
    alpha, sigma, to_alpha, to_variance = (
        schedule.alpha(t),
        schedule.sigma(t),
        schedule.alpha(s),
        1.0 - schedule.abar(s),
    )
    g = eta * schedule.variance(t, s).sqrt()
    left = to_variance - g * g
    if bool((left < -1e-12 * to_variance).any()):
        i = int((left < -1e-12 * to_variance).nonzero()[0])
        raise ValueError(
            f"eta must leave 1 - abar_s - sd^2 >= 0, got eta = {eta} at the step t={int(t[i])} -> s={int(s[i])}"
        )
    along = left.clamp(min=0.0).sqrt()
    if eps_from == "model":
        a, b, d = along * P, to_alpha, along * Q
    else:
        a, b, d = along / sigma, to_alpha - along * alpha / sigma, torch.zeros_like(along)
    return _vp_plan("ddim", schedule, times, prediction, most, p=p, q=q, a=a, b=b, d=d, g=g)


@shows_arguments_of(grid)
def euler_ancestral(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    noise: float = 1.0,
    noise_path: str = "independent",
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
    space, nodes, end = grid(
        "ddim_inversion", schedule, steps, prediction, sigmas, timesteps, spacing or "linspace", None
    )
    rows = []
    if space.in_time:
        points = [space.node(end.v), *reversed(nodes)]
        for i, (node, to) in enumerate(itertools.pairwise(points)):
            h = to.v - node.v
            rows.append(row(i, node, to, a=1.0 + h * node.sx, d=h * node.sm))
        return chain("ddim_inversion", space, rows, points[:-1], 0.0)
    points = [space.native(node) for node in (end, *reversed(nodes))]
    for i, (before, to) in enumerate(itertools.pairwise(points)):
        ratio = to.alpha / before.alpha
        turn = to.sigma - ratio * before.sigma
        rows.append(row(i, to, to, a=ratio + turn * to.P, d=turn * to.Q))
    return chain("ddim_inversion", space, rows, points[1:], 0.0)


def _vp_plan(
    name: str, schedule: DiscreteSchedule, times: list[int], prediction: str, clip: float, **columns: Tensor
) -> Plan:
    """A plan on the state sqrt(abar) x0 + sqrt(1-abar) eps from its columns, one entry a row; the last ends on data."""
    abar = schedule.abar(torch.tensor([*times[1:], -1]))
    columns |= {"known_s": abar.sqrt(), "known_n": (1.0 - abar).sqrt()}
    names = list(columns)
    # "+ 0.0": no -0.0 in tables.
    lines = (torch.stack([columns[n] for n in names], dim=-1) + 0.0).tolist()
    rows = []
    for i, (t, line) in enumerate(zip(times, lines, strict=True)):
        time = float(schedule.model_time(prediction, t))
        row = Row(clip=clip, stream=streams.STEP + i, known_stream=streams.KNOWN + i, time=time)
        rows.append(replace(row, **dict(zip(names, line, strict=True))))
    return Plan(name, tuple(rows), prediction=prediction, time_dtype="int64")

"""Samplers: functions that return a `Plan`. Everything here runs once, on the host, in float64.

| sampler | schedules | state | model calls | noise |
|---|---|---|---|---|
| `ddpm` | discrete | x = sqrt(abar) x0 + sqrt(1-abar) eps | one a step | every step but the last |
| `ddim` | discrete | the same | one a step | eta > 0: every step but the last |
| `euler` | discrete, EDM | x0 + sigma eps, the model sees x/sqrt(sigma^2+1) or c_in x | one a step | none |
| `euler` | flow | t x0 + (1-(1-sigma_min)t) eps | one a step | none |
| `heun` | as `euler` | as `euler` | two a step, one in the last | none |

Row k draws its noise on ``streams.STEP + k``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffkern import predictions, streams
from diffkern._grids import monotone, noise_levels
from diffkern.grids import (
    LEVELS,
    Numbers,
    check_spacing,
    check_steps,
    levels,
    linspace,
    spaced_timesteps,
    table_times,
)
from diffkern.plan import Plan, Row
from diffkern.schedules import DiscreteSchedule, EDMSchedule, FlowSchedule, Schedule

__all__ = ["SAMPLERS", "ddim", "ddpm", "euler", "get_sampler", "heun", "spaced_timesteps"]


def ddpm(
    schedule: DiscreteSchedule,
    steps: int | None = None,
    *,
    timesteps: Iterable[int] | None = None,
    spacing: str = "leading",
    variance: str | float = "beta_tilde",
    prediction: str = "eps",
    clip: float | None = None,
) -> Plan:
    """Ancestral sampling: x_s = mu~(x_t, x0) + sqrt(variance) z, no noise in the last step.

    All T steps by default, or ``steps`` of them by a ``spacing`` of `diffkern.grids`, or the ``timesteps`` given
    (falling, the last one steps to clean data); on a sub-sequence beta is 1 - abar_t/abar_s. ``variance`` is "beta",
    "beta_tilde", or v in [0, 1] for exp(v ln beta + (1-v) ln beta_tilde); the lectures that print mu~ + beta~ z, or
    sigma_t = beta~, mean sqrt(beta~).
    ``clip`` clamps x0 to [-clip, clip]. Lectures 000, 001, 002; arXiv 2006.11239, arXiv 2102.09672.
    """
    _need_discrete("ddpm", schedule)
    if steps is None and timesteps is None:
        steps = schedule.T
    times = table_times(schedule, steps, timesteps, spacing)
    t, s = torch.tensor(times), torch.tensor([*times[1:], -1])
    coef_x0, coef_xt, _ = schedule.posterior(t, s)
    p, q, _, _ = predictions.to_x0_eps(schedule, prediction, t)
    g = schedule.variance(t, s, variance).sqrt()
    g[-1] = 0.0
    return _vp_plan("ddpm", schedule, times, prediction, _clip(clip), p=p, q=q, a=coef_xt, b=coef_x0, g=g)


def ddim(
    schedule: DiscreteSchedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    prediction: str = "eps",
    clip: float | None = None,
    timesteps: Iterable[int] | None = None,
    spacing: str = "leading",
    eps_from: str | None = None,
) -> Plan:
    """x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - sd^2) eps + sd z with sd = eta sqrt(beta_tilde).

    beta_tilde = (1-abar_s)/(1-abar_t) (1 - abar_t/abar_s) is the posterior variance of the step t -> s.
    50 steps by default, by a ``spacing`` of `diffkern.grids`; or ``timesteps``, any falling sub-sequence, the last one
    stepping to clean data. eta = 0 is deterministic; eta = 1 is `ddpm` with beta_tilde. ``clip`` clamps x0 to [-clip,
    clip].
    ``eps_from`` says which eps points the direction: "x0" derives it from the (clipped) x0, "model" takes the model's
    own; the default is "x0" with a clip and "model" without one, where both are equal but for rounding.
    Lecture 000; arXiv 2010.02502, eq. 12 and 16.
    """
    _need_discrete("ddim", schedule)
    if steps is None and timesteps is None:
        steps = min(50, schedule.T)
    times = table_times(schedule, steps, timesteps, spacing)
    bound = _clip(clip)
    if eps_from is None:
        eps_from = "model" if bound == math.inf else "x0"
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
    return _vp_plan("ddim", schedule, times, prediction, bound, p=p, q=q, a=a, b=b, d=d, g=g)


def euler(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str | None = None,
    sigmas: Numbers | None = None,
    timesteps: Numbers | None = None,
    spacing: str = "linspace",
    clip: float | None = None,
) -> Plan:
    """Euler's method on the probability-flow ODE: x' = x + (v' - v) slope(x), one model call a step.

    Discrete and EDM schedules integrate the state x0 + sigma eps over v = sigma with slope eps = (x - x0)/sigma
    (lecture 001; arXiv 2011.13456, 2206.00364). The noise levels are, from noise to data,

    - discrete: of ``steps`` times (``spacing`` "linspace": evenly spaced in [0, T-1], fractional; or "leading",
      "trailing" as for `ddim`) or of the ``timesteps`` given (fractional ones allowed), and then 0;
    - EDM: ``schedule.sigmas(steps)``, which ends in 0;
    - both: `diffkern.grids.levels` for the spacings "karras", "log_snr", "exponential", "polyexponential", "beta"; or
      ``sigmas``, every level including the one to end at, which is usually 0.

    Flow schedules integrate t x0 + sigma eps over v = t with slope dx/dt (lectures 000, 003; arXiv 2210.02747), on
    ``steps`` even steps from 0 to 1 or on ``timesteps``, every grid point including the last.
    ``prediction`` defaults to the schedule's: eps, edm or velocity. With a ``clip`` the slope follows the clipped x0.
    """
    nodes, end = _grid("euler", schedule, steps, prediction, sigmas, timesteps, spacing, clip)
    rows = [_euler_row(i, node, after) for i, (node, after) in enumerate(zip(nodes, [*nodes[1:], end], strict=True))]
    return _ode_plan("euler", schedule, prediction, nodes, rows, [node.k for node in nodes])


def heun(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str | None = None,
    sigmas: Numbers | None = None,
    timesteps: Numbers | None = None,
    spacing: str = "linspace",
    clip: float | None = None,
) -> Plan:
    """Heun's method: an Euler step to x~, then x' = x + (v' - v)/2 (slope(x) + slope(x~)); arguments as for `euler`.

    Two model calls a step, except in the last, which is an Euler step (the slope at sigma = 0 does not exist), so
    2 steps - 1 calls; the global error is still of second order. The first row saves x + (v' - v)/2 slope(x), so the
    second reads one history. arXiv 2206.00364, algorithm 1 without churn; lecture 001.
    """
    nodes, end = _grid("heun", schedule, steps, prediction, sigmas, timesteps, spacing, clip)
    rows: list[Row] = []
    for i, node in enumerate(nodes[:-1]):
        after = nodes[i + 1]
        half = 0.5 * (after.v - node.v)
        first = _euler_row(len(rows), node, after)
        A, B, D = 1.0 + half * node.sx, half * node.s0, half * node.sm
        rows.append(replace(first, A=A, B=B + 0.0, D=D, saves=((0, "s"),), ends_step=False))
        a, b, d = half * after.sx, half * after.s0, half * after.sm
        rows.append(_slope_row(len(rows), after, after, e0=1.0, a=a, b=b, d=d))
    rows.append(_euler_row(len(rows), nodes[-1], end))
    return _ode_plan("heun", schedule, prediction, nodes, rows, [node.k for node in nodes for _ in range(2)][1:])


SAMPLERS: dict[str, Callable[..., Plan]] = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun}


def get_sampler(name: str) -> Callable[..., Plan]:
    """The sampler of that name; raises ValueError with the known names."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    return SAMPLERS[name]


class _Node(NamedTuple):
    """A point of an ODE grid: slope = sx x + s0 x0 + sm m; (level) = (signal, noise) of the state there."""

    v: float
    level: tuple[float, float]
    time: float = 0.0
    k: float = 1.0
    p: float = 0.0
    q: float = 0.0
    clip: float = math.inf
    sx: float = 0.0
    s0: float = 0.0
    sm: float = 0.0


def _grid(
    sampler: str,
    schedule: Schedule,
    steps: int | None,
    prediction: str | None,
    sigmas: Numbers | None,
    timesteps: Numbers | None,
    spacing: str,
    clip: float | None,
) -> tuple[list[_Node], _Node]:
    """The points where the model is called, from noise to data, and the point where the sampler ends."""
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be a diffkern Schedule, got {type(schedule).__name__}")
    given = [n for n, value in (("steps", steps), ("sigmas", sigmas), ("timesteps", timesteps)) if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{sampler} needs exactly one of steps, sigmas and timesteps, got {' and '.join(given) or 'none'}"
        )
    chosen = predictions.check_prediction(schedule.default_prediction if prediction is None else prediction)
    bound = _clip(clip)
    if isinstance(schedule, FlowSchedule):
        if sigmas is not None:
            raise ValueError("a flow schedule takes steps or timesteps, got sigmas")
        if steps is not None:
            check_steps(steps)
            grid = [i / steps for i in range(steps + 1)]
        else:
            assert timesteps is not None
            grid = monotone("timesteps", timesteps, rising=True)
        flow_nodes = [_flow_node(schedule, chosen, t, bound) for t in grid[:-1]]
        return flow_nodes, _Node(grid[-1], _level(schedule, grid[-1]))
    if isinstance(schedule, EDMSchedule):
        if timesteps is not None:
            raise ValueError("an EDM schedule takes steps or sigmas, its time is sigma, got timesteps")
        if steps is not None:
            check_steps(steps)
            sigmas = levels(schedule, steps, spacing) if spacing in LEVELS else schedule.sigmas(steps)
        assert sigmas is not None
        grid = noise_levels(sigmas)
        times: list[float] = grid[:-1]
    elif isinstance(schedule, DiscreteSchedule):
        if steps is not None and check_spacing(spacing) in LEVELS:
            check_steps(steps)
            sigmas = levels(schedule, steps, spacing)
        if sigmas is not None:
            grid = noise_levels(sigmas)
            times = [float(schedule.time_of_sigma(level)) for level in grid[:-1]]
        else:
            times = _table_times(schedule, steps, timesteps, spacing)
            grid = [*(float(schedule.sigma_ve(t)) for t in times), 0.0]
    else:
        raise ValueError(f"{sampler} knows discrete, EDM and flow schedules, got {type(schedule).__name__}")
    nodes = [_ve_node(schedule, chosen, t, level, bound) for t, level in zip(times, grid[:-1], strict=True)]
    return nodes, _Node(grid[-1], (1.0, grid[-1]))


def _table_times(schedule: DiscreteSchedule, steps: int | None, timesteps: Numbers | None, spacing: str) -> list[float]:
    if timesteps is not None:
        times = monotone("timesteps", timesteps, rising=False, least=1)
    elif spacing == "linspace":
        assert steps is not None
        check_steps(steps, schedule.T)
        times = linspace(schedule.T, steps)
    else:
        assert steps is not None
        times = [float(t) for t in spaced_timesteps(schedule.T, steps, spacing)]
    for t in times:
        if not 0 <= t <= schedule.T - 1:
            raise ValueError(f"timesteps must lie in 0..{schedule.T - 1} (T = {schedule.T}), got {t}")
    return times


def _ve_node(schedule: Schedule, prediction: str, t: float, sigma: float, clip: float) -> _Node:
    """A point of the ODE in sigma; its state is x_t / alpha = x0 + sigma eps."""
    if not 0.0 < sigma < math.inf:
        raise ValueError(
            f"the ODE in sigma needs a finite sigma > 0 at each model call, got {sigma} at t={t} ({schedule.name})"
        )
    if isinstance(schedule, DiscreteSchedule):
        k = alpha = 1.0 / math.sqrt(1.0 + sigma * sigma)
        time = float(schedule.model_time(prediction, t))
        p, q, P, Q = predictions.solve(alpha, sigma * alpha, *_target_at_level(schedule, prediction, t, alpha, sigma))
    else:
        alpha, k = 1.0, float(schedule.input_scale(prediction, sigma))
        time = float(schedule.model_time(prediction, sigma))
        p, q, P, Q = (float(c) for c in predictions.to_x0_eps(schedule, prediction, sigma))
    if clip == math.inf:
        sx, s0, sm = P * alpha, 0.0, Q
    else:
        sx, s0, sm = 1.0 / sigma, -1.0 / sigma, 0.0
    return _Node(sigma, (1.0, sigma), time, k, p * alpha, q, clip, sx, s0, sm)


def _flow_node(schedule: FlowSchedule, prediction: str, t: float, clip: float) -> _Node:
    """A point of the ODE in t; slope dx/dt = alpha_dot x0 + sigma_dot eps."""
    p, q, P, Q = (float(c) for c in predictions.to_x0_eps(schedule, prediction, t))
    (alpha, sigma), alpha_dot, sigma_dot = _level(schedule, t), 1.0, float(schedule.sigma_dot(t))
    if clip == math.inf:
        # dx/dt in x and m; for the prediction "velocity" this is m itself, without rounding.
        direct = prediction == "velocity"
        sx = 0.0 if direct else alpha_dot * p + sigma_dot * P
        s0, sm = 0.0, 1.0 if direct else alpha_dot * q + sigma_dot * Q
    else:
        sx, s0, sm = sigma_dot / sigma, alpha_dot - sigma_dot * alpha / sigma, 0.0
    return _Node(t, (alpha, sigma), t, 1.0, p, q, clip, sx, s0, sm)


def _slope_row(i: int, at: _Node, to: _Node, *, a: float = 0.0, b: float = 0.0, d: float = 0.0, e0: float = 0.0) -> Row:
    """Row i, which calls the model at ``at`` and leaves a state at the level of ``to``."""
    return Row(
        p=at.p,
        q=at.q,
        clip=at.clip,
        a=a + 0.0,  # no -0.0 in tables
        b=b + 0.0,
        d=d + 0.0,
        e0=e0,
        known_s=to.level[0],
        known_n=to.level[1],
        stream=streams.STEP + i,
        known_stream=streams.KNOWN + i,
        time=at.time,
    )


def _euler_row(i: int, node: _Node, to: _Node) -> Row:
    if to.level == (1.0, 0.0) and node.level[0] == 1.0:
        return _slope_row(i, node, to, b=1.0)  # sigma = 0: the step ends on x0 exactly
    h = to.v - node.v
    return _slope_row(i, node, to, a=1.0 + h * node.sx, b=h * node.s0, d=h * node.sm)


def _ode_plan(
    name: str, schedule: Schedule, prediction: str | None, nodes: list[_Node], rows: list[Row], scales: list[float]
) -> Plan:
    """The plan of these rows; ``scales`` holds each row's own input scale, which the row before it applies."""
    chained = [replace(row, k=k) for row, k in zip(rows, [*scales[1:], 1.0], strict=True)]
    whole = isinstance(schedule, DiscreteSchedule) and all(node.time == int(node.time) for node in nodes)
    return Plan(
        name,
        tuple(chained),
        init_scale=nodes[0].level[1],
        first_k=scales[0],
        prediction=schedule.default_prediction if prediction is None else prediction,
        time_dtype="int64" if whole else "float32",
    )


def _target_at_level(
    schedule: DiscreteSchedule, prediction: str, t: float, alpha: float, sigma: float
) -> tuple[float, float]:
    """(u, v) at the level sigma: noise levels need not be those of the table, times then only label them."""
    fixed = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-sigma * alpha, alpha), "score": (0.0, -1.0 / (sigma * alpha))}
    if prediction in fixed:
        return fixed[prediction]
    u, v = predictions.target_coefficients(schedule, prediction, int(t) if t == int(t) else t)
    return float(u), float(v)


def _level(schedule: Schedule, t: float) -> tuple[float, float]:
    return float(schedule.alpha(t)), float(schedule.sigma(t))


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


def _clip(clip: float | None) -> float:
    if clip is None:
        return math.inf
    if not clip > 0:
        raise ValueError(f"clip must be positive, or None for no clip, got {clip}")
    return float(clip)


def _need_discrete(sampler: str, schedule: object) -> None:
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(
            f"{sampler} needs a discrete schedule (a table of alphas_cumprod), got {type(schedule).__name__}"
        )

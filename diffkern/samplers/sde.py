"""Stochastic simulation: Euler-Maruyama on reverse SDEs and on the SDE extension of a flow, Langevin dynamics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from diffkern.integers import check_rows
from diffkern.modes import neutrally
from diffkern.names import NoisePath, Prediction
from diffkern.plan import Plan, Row
from diffkern.samplers._noise_path import Span, clock
from diffkern.samplers.arguments import bound, need_schedule, not_negative
from diffkern.samplers.nodes import Coordinates, Node, chain, row, time_grid
from diffkern.samplers.points import filled
from diffkern.schedules import predictions
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule
from diffkern.schedules.timesteps import Numbers, check_steps, linspace, monotone
from diffkern.signatures import names_the_nearest


@names_the_nearest
@neutrally
def euler_maruyama(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    noise_path: NoisePath = "independent",
    prediction: Prediction | None = None,
    timesteps: Numbers | None = None,
    clip: float | None = None,
) -> Plan:
    """Euler-Maruyama on the reverse SDE dx = (f x - (1 + eta^2)/2 g^2 score) dtau + eta g dw, in the schedule's time.

        x' = x - |dt| (f x - (1 + eta^2)/2 g^2 score) + eta g sqrt(|dt|) z,     score = -eps/sigma

    with the schedule's `drift` f and `diffusion` g: VP, sub-VP, VE, every path and table. eta = 1 is the reverse SDE of
    the forward one, eta = 0 Euler on the probability-flow ODE in t. One model call a step, weak order 1; no noise in
    the last step. ``steps`` are even in time from the noise end to the schedule's `time_eps` before data; on a table
    from T-1 to -1, so that T steps are the single ones; on EDM between ``schedule.sigmas``. Or ``timesteps``, every
    point including the last. f and g are infinite where alpha is 0 (a flow's noise end): start after it.
    ``noise_path="brownian"``: z is the increment of one Brownian path a sample, the same for every number of steps, and
    the sampler converges path by path (strong order 1); "independent" noise agrees in law alone.
    arXiv 2011.13456, eq. 6; lectures 001, 003. (score_sde steps 1/N on a grid whose points are (1 - eps)/(N - 1)
    apart.)
    """
    not_negative("eta", eta)
    path = clock(noise_path)
    walk = Walk("euler_maruyama", schedule, prediction, clip)
    times = _times("euler_maruyama", schedule, steps, timesteps)
    rows, at = [], walk.nodes(times[:-1])
    rates = walk.rates(schedule.drift, schedule.diffusion_squared, times=times[:-1])
    for i, (t, s, to, (f, g2)) in enumerate(zip(times, times[1:], walk.ends(times[1:]), rates, strict=False)):
        node, h = at[i], abs(s - t)
        if not (math.isfinite(f) and math.isfinite(g2)):
            raise ValueError(
                f"euler_maruyama needs a finite drift and diffusion at each model call, got {f:g} and {g2:g} at "
                f"t={t:g} ({schedule.name}): give timesteps that begin later, or take ddpm or dpmpp_2m_sde"
            )
        pull = 0.5 * (1.0 + eta * eta) * g2 * h
        noise = eta * math.sqrt(g2 * h) if i + 1 < len(at) else 0.0
        rows.append(walk.row(i, node, to, keep=1.0 - h * f, pull=pull, g=noise, path=path(node, to, noise)))
    return walk.plan(rows, at)


@names_the_nearest
@neutrally
def flow_sde(
    schedule: Schedule,
    steps: int | None = None,
    *,
    sigma_t: float | Callable[[float], float] = 1.0,
    prediction: Prediction | None = None,
    timesteps: Numbers | None = None,
    clip: float | None = None,
) -> Plan:
    """The SDE extension of a flow by any sigma_t: dx = (u + sigma_t^2/2 score) dt + sigma_t dw keeps every marginal.

        x' = x + dt u + |dt| sigma_t^2/2 score + sigma_t sqrt(|dt|) z,     u = dx/dt, score = -eps/sigma

    ``sigma_t`` is a number or a function of the schedule's time; 0 is Euler's method on the flow. Flows, user paths and
    continuous diffusion schedules, whose time runs the other way (dt < 0). One model call a step, weak order 1; no
    noise in the last step. Grid as for `euler_maruyama`. A large sigma_t where sigma is small needs small steps: |dt|
    sigma_t^2/2 should stay below sigma^2. arXiv 2209.15571, 2401.08740; lecture 003.
    """
    walk = Walk("flow_sde", schedule, prediction, clip)
    if isinstance(schedule, DiscreteSchedule | EDMSchedule):
        raise ValueError(f"flow_sde needs a continuous schedule of t in [0, 1], got {schedule.name}")
    times = _times("flow_sde", schedule, steps, timesteps)
    rows, at = [], walk.nodes(times[:-1])
    dots = walk.rates(schedule.alpha_dot, schedule.sigma_dot, times=times[:-1])
    for i, (t, s, to) in enumerate(zip(times, times[1:], walk.ends(times[1:]), strict=False)):
        if callable(sigma_t):
            size = not_negative(f"sigma_t({t:g})", float(sigma_t(t)))
        else:
            size = not_negative("sigma_t", sigma_t)
        node, h = at[i], abs(s - t)
        noise = size * math.sqrt(h) if i + 1 < len(at) else 0.0
        rows.append(walk.flow_row(i, node, to, dots[i], s - t, 0.5 * size * size * h, noise))
    return walk.plan(rows, at)


@names_the_nearest
@neutrally
def langevin(
    schedule: Schedule,
    steps: int,
    *,
    t: float,
    step_size: float,
    prediction: Prediction | None = None,
) -> Plan:
    """Langevin dynamics at one level t of noise: x' = x + step_size score + sqrt(2 step_size) z.

    Tends to the marginal at ``t`` (up to a bias of order step_size: for N(0, V) the variance is V/(1 -
    step_size/(2V))). Noise in every step. Lecture 000 prints this form and, in its algorithm, alpha/2 score +
    sqrt(alpha) z: the same with step_size = alpha/2. arXiv 1907.05600, eq. 4.
    """
    steps = check_steps(steps)
    return replace(_langevin("langevin", schedule, [t], steps, step_size, prediction, False), name="langevin")


@names_the_nearest
@neutrally
def annealed_langevin(
    schedule: Schedule,
    levels: int | None = None,
    *,
    each: int = 100,
    step_size: float = 1e-5,
    timesteps: Numbers | None = None,
    prediction: Prediction | None = None,
    denoise: bool = False,
) -> Plan:
    """NCSN's sampler: ``each`` Langevin steps at each of falling noise levels.

    Their size is step_size (sigma_i/sigma_last)^2. The ``levels`` are at even times of the schedule (geometric for
    `ve`) from noise to its `time_eps` before data, or at ``timesteps``. With one level it is `langevin`. arXiv
    1907.05600, algorithm 1, has alpha_i/2 score + sqrt(alpha_i) z with alpha_i = epsilon sigma_i^2/sigma_last^2:
    step_size = epsilon/2. ``denoise`` ends on the estimate of x0, one more model call at the last level (arXiv
    2006.09011). A step of the plan is one Langevin step.
    """
    need_schedule(schedule)
    each = check_steps(each, argument="each")
    if (levels is None) == (timesteps is None):
        raise ValueError("annealed_langevin needs exactly one of levels and timesteps, got none or both")
    if timesteps is not None:
        times = monotone("timesteps", timesteps, rising=schedule.direction < 0, least=1)
    else:
        assert levels is not None
        levels = check_steps(levels, schedule.T if isinstance(schedule, DiscreteSchedule) else None)
        if isinstance(schedule, DiscreteSchedule):
            times = linspace(schedule.T, levels)
        elif levels == 1:
            times = [schedule.noise_end]
        else:
            times = _times("annealed_langevin", schedule, levels - 1, None)
    return _langevin("annealed_langevin", schedule, times, each, step_size, prediction, denoise)


def _langevin(
    name: str,
    schedule: Schedule,
    times: list[float],
    each: int,
    size: float,
    prediction: Prediction | None,
    denoise: bool,
) -> Plan:
    if not 0.0 < size < math.inf:
        raise ValueError(f"step_size must be positive, got {size}")
    walk = Walk(name, schedule, prediction, None)
    check_rows("steps" if name == "langevin" else "each", each, len(times))
    points = walk.nodes(times)
    rows: list[Row] = []
    at: list[Node] = []
    for node in points:
        eps = size * (node.sigma / points[-1].sigma) ** 2
        for _ in range(each):
            rows.append(walk.row(len(rows), node, node, keep=1.0, pull=eps, g=math.sqrt(2.0 * eps)))
            at.append(node)
    if denoise:
        rows.append(row(len(rows), points[-1], Node(0.0, 1.0, 0.0), b=1.0))
        at.append(points[-1])
    return walk.plan(rows, at)


class Walk:
    """Rows of a schedule's own state in its own time."""

    def __init__(self, name: str, schedule: Schedule, prediction: Prediction | None, clip: float | None) -> None:
        need_schedule(schedule)
        chosen = predictions.prediction_of(schedule, prediction)
        self.name, self.schedule, self.prediction, self.clip = name, schedule, chosen, bound(clip)

    def nodes(self, times: list[float]) -> list[Node]:
        """The points of model calls at these times; ValueError where sigma is 0."""
        schedule, t = self.schedule, filled(times)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        if bool((sigma == 0.0).any()):
            at = t[sigma == 0.0][0].item()
            raise ValueError(
                f"{self.name} needs sigma > 0 at each model call, got 0 at t={at:g} ({schedule.name}): give timesteps "
                "that leave it out"
            )
        said = predictions.estimates(alpha, sigma, *predictions.target_coefficients(schedule, self.prediction, t))
        given = (f(self.prediction, t) for f in (schedule.model_time, schedule.input_scale))
        columns = (column.tolist() for column in (alpha, sigma, *given, *said))
        return [Node._make([*line, self.clip, 0.0, 0.0, 0.0]) for line in zip(times, *columns, strict=False)]

    def ends(self, times: list[float]) -> list[Node]:
        """The points at these times where the model is not called."""
        rates = self.rates(self.schedule.alpha, self.schedule.sigma, times=times)
        return [Node(t, alpha, sigma) for t, (alpha, sigma) in zip(times, rates, strict=True)]

    def rates(self, *functions: Callable[[Tensor], Tensor], times: list[float]) -> list[tuple[float, ...]]:
        """The values of functions of the schedule at each time."""
        t = filled(times)
        return list(zip(*(f(t).tolist()[: len(times)] for f in functions), strict=True))

    def row(
        self,
        i: int,
        node: Node,
        to: Node,
        *,
        keep: float,
        pull: float,
        g: float,
        path: Span = None,
    ) -> Row:
        """x' = keep x + pull score + g z."""
        if pull == 0.0:
            return row(i, node, to, a=keep, g=g, path=path)
        a, b, d = self._eps(node)
        weight = -pull / node.sigma
        return row(i, node, to, a=keep + weight * a, b=weight * b, d=weight * d, g=g, path=path)

    def flow_row(self, i: int, node: Node, to: Node, dots: tuple[float, ...], dt: float, pull: float, g: float) -> Row:
        """x' = x + dt (alpha_dot x0 + sigma_dot eps) + pull score + g z."""
        alpha_dot, sigma_dot = dots
        a, b, d = self._eps(node)
        weight = dt * sigma_dot - pull / node.sigma
        if self.clip < math.inf:
            return row(i, node, to, a=1.0 + weight * a, b=dt * alpha_dot + weight * b, g=g)
        if self.prediction == "velocity":
            weight = -pull / node.sigma
            if weight == 0.0:
                return row(i, node, to, a=1.0, d=dt, g=g)
            return row(i, node, to, a=1.0 + weight * a, d=dt + weight * d, g=g)
        if alpha_dot == 0.0:  # no x0 is needed
            return row(i, node, to, a=1.0 + weight * a, d=weight * d, g=g)
        return row(
            i, node, to, a=1.0 + dt * alpha_dot * node.p + weight * a, d=dt * alpha_dot * node.q + weight * d, g=g
        )

    def _eps(self, node: Node) -> tuple[float, float, float]:
        """eps as weights of x, x0 and m; of the clipped x0 where there is a clip."""
        if self.clip < math.inf:
            return 1.0 / node.sigma, -node.alpha / node.sigma, 0.0
        return node.P, 0.0, node.Q

    def plan(self, rows: list[Row], at: list[Node]) -> Plan:
        """The plan of these rows; ``at`` holds the point of each row's model call."""
        first = at[0]
        start = 1.0 if isinstance(self.schedule, DiscreteSchedule) else first.sigma
        return chain(self.name, Coordinates(self.schedule, self.prediction, self.clip, False), rows, at, start)


def _times(sampler: str, schedule: Schedule, steps: int | None, timesteps: Numbers | None) -> list[float]:
    """Every point of a grid in the schedule's own time, the last included."""
    if (steps is None) == (timesteps is None):
        raise ValueError(f"{sampler} needs exactly one of steps and timesteps, got none or both")
    if timesteps is not None:
        return monotone("timesteps", timesteps, rising=schedule.direction < 0)
    assert steps is not None
    steps = check_steps(steps, schedule.T if isinstance(schedule, DiscreteSchedule) else None)
    if isinstance(schedule, EDMSchedule):
        return [float(v) for v in schedule.sigmas(steps + 1)[:-1]]
    if isinstance(schedule, DiscreteSchedule):
        last = schedule.T - 1
        return [last - (last + 1) * i / steps for i in range(steps + 1)]
    return time_grid(schedule, steps)

"""Points of a sampler's grid: where the model is called, what its output says there, and rows between points.

Two coordinates. Diffusion schedules are integrated in v = sigma, the noise level of the state x0 + sigma eps, whose
slope is eps; flows and user paths in their own time v = t, with slope dx/dt. `Coordinates.native` turns a point of the
first kind into one of the schedule's own state alpha x0 + sigma eps, which exponential integrators step in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict

from diffkern import streams
from diffkern.names import Prediction, Spacing
from diffkern.plan import Plan, Row
from diffkern.samplers.arguments import bound, need_schedule, not_negative
from diffkern.schedules import predictions
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule
from diffkern.schedules.grids import LEVELS, check_spacing, levels
from diffkern.schedules.paths import FlowSchedule, PathSchedule
from diffkern.schedules.timesteps import Numbers, check_steps, linspace, monotone, noise_levels, spaced_timesteps


class Node(NamedTuple):
    """A point of a grid: x0 = p x + q m, eps = P x + Q m, slope = sx x + s0 x0 + sm m.

    x is alpha x0 + sigma eps there, and the model is given k x and the time.
    """

    v: float
    alpha: float
    sigma: float
    time: float = 0.0
    k: float = 1.0
    p: float = 0.0
    q: float = 0.0
    P: float = 0.0
    Q: float = 0.0
    clip: float = math.inf
    sx: float = 0.0
    s0: float = 0.0
    sm: float = 0.0

    @property
    def log_ratio(self) -> float:
        """ln(alpha/sigma), half the log-SNR: the lambda of the papers on DPM-Solver; infinite at an end."""
        if self.alpha == 0.0:
            return -math.inf
        return math.inf if self.sigma == 0.0 else math.log(self.alpha) - math.log(self.sigma)


@dataclass(frozen=True)
class Coordinates:
    """What turns a value of v into a `Node`."""

    schedule: Schedule
    prediction: str
    clip: float
    in_time: bool

    def node(self, v: float, time: float | None = None, *, clamp: bool = False) -> Node:
        """The point at v; ``time`` is the schedule's time there where it is known, ``clamp`` keeps it in a table."""
        return self._flow_node(v) if self.in_time else self._level_node(v, time, clamp)

    def end(self, v: float) -> Node:
        """The point at v for a sampler that does not call the model there."""
        if self.in_time:
            return Node(v, float(self.schedule.alpha(v)), float(self.schedule.sigma(v)))
        return Node(v, 1.0, v)

    def native(self, node: Node) -> Node:
        """The point in the schedule's own state, alpha times the state x0 + v eps (the same for a flow)."""
        if self.in_time:
            return node
        alpha = self._alpha_at(node.v)
        k, p, P = node.k / alpha, node.p / alpha, node.P / alpha
        return node._replace(alpha=alpha, sigma=alpha * node.v, k=k, p=p, P=P, sx=0.0, s0=0.0, sm=0.0)

    def at_log_ratio(self, value: float) -> Node:
        """The point where ln(alpha/sigma) is ``value``."""
        if self.in_time:
            return self.node(float(self.schedule.time_of_log_snr(2.0 * value)))
        return self.node(math.exp(-value))

    def _time_at(self, sigma: float, clamp: bool = False) -> float:
        if isinstance(self.schedule, DiscreteSchedule) and clamp:
            low, high = (float(self.schedule.sigma_ve(t)) for t in (0, self.schedule.T - 1))
            sigma = min(max(sigma, low), high)
        return sigma if isinstance(self.schedule, EDMSchedule) else float(self.schedule.time_of_sigma(sigma))

    def _alpha_at(self, sigma: float) -> float:
        if isinstance(self.schedule, DiscreteSchedule):
            return 1.0 / math.sqrt(1.0 + sigma * sigma)
        if isinstance(self.schedule, EDMSchedule) or sigma == 0.0:
            return 1.0
        return float(self.schedule.alpha(self._time_at(sigma)))

    def _level_node(self, sigma: float, time: float | None, clamp: bool) -> Node:
        """A point of the ODE in sigma; its state is x_t / alpha = x0 + sigma eps."""
        schedule, prediction = self.schedule, self.prediction
        t = self._time_at(sigma, clamp) if time is None else time
        if not 0.0 < sigma < math.inf:
            raise ValueError(
                f"the ODE in sigma needs a finite sigma > 0 at each model call, got {sigma} at t={t} ({schedule.name})"
            )
        if isinstance(schedule, DiscreteSchedule):
            k = alpha = 1.0 / math.sqrt(1.0 + sigma * sigma)
            p, q, P, Q = predictions.solve(
                alpha, sigma * alpha, *_target_at_level(schedule, prediction, t, alpha, sigma)
            )
        else:
            alpha = float(schedule.alpha(t))
            k = alpha * float(schedule.input_scale(prediction, t))
            p, q, P, Q = (float(c) for c in predictions.to_x0_eps(schedule, prediction, t))
        time = float(schedule.model_time(prediction, t))
        if self.clip == math.inf:
            sx, s0, sm = P * alpha, 0.0, Q
        else:
            sx, s0, sm = 1.0 / sigma, -1.0 / sigma, 0.0
        return Node(sigma, 1.0, sigma, time, k, p * alpha, q, P * alpha, Q, self.clip, sx, s0, sm)

    def _flow_node(self, t: float) -> Node:
        """A point of the ODE in t; slope dx/dt = alpha_dot x0 + sigma_dot eps."""
        schedule = self.schedule
        p, q, P, Q = (float(c) for c in predictions.to_x0_eps(schedule, self.prediction, t))
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        alpha_dot, sigma_dot = float(schedule.alpha_dot(t)), float(schedule.sigma_dot(t))
        if self.clip == math.inf:
            # dx/dt in x and m; for the prediction "velocity" this is m itself, without rounding.
            direct = self.prediction == "velocity"
            sx = 0.0 if direct else alpha_dot * p + sigma_dot * P
            s0, sm = 0.0, 1.0 if direct else alpha_dot * q + sigma_dot * Q
        else:
            sx, s0, sm = sigma_dot / sigma, alpha_dot - sigma_dot * alpha / sigma, 0.0
        return Node(t, alpha, sigma, t, 1.0, p, q, P, Q, self.clip, sx, s0, sm)


def coordinates(schedule: Schedule, prediction: str | None, clip: float | None) -> Coordinates:
    """The coordinates that a schedule is integrated in."""
    need_schedule(schedule)
    chosen = predictions.check_prediction(schedule.default_prediction if prediction is None else prediction)
    return Coordinates(schedule, chosen, bound(clip), isinstance(schedule, FlowSchedule | PathSchedule))


class GridOptions(TypedDict, total=False):
    """Arguments of every sampler that makes its points by `grid`, which has their defaults; `euler` explains them."""

    prediction: Prediction | None
    sigmas: Numbers | None
    timesteps: Numbers | None
    spacing: Spacing
    clip: float | None


def grid(
    sampler: str,
    schedule: Schedule,
    steps: int | None,
    prediction: Prediction | None = None,
    sigmas: Numbers | None = None,
    timesteps: Numbers | None = None,
    spacing: Spacing = "linspace",
    clip: float | None = None,
) -> tuple[Coordinates, list[Node], Node]:
    """The points where the model is called, from noise to data, and the point where the sampler ends."""
    need_schedule(schedule)
    given = [n for n, value in (("steps", steps), ("sigmas", sigmas), ("timesteps", timesteps)) if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{sampler} needs exactly one of steps, sigmas and timesteps, got {' and '.join(given) or 'none'}"
        )
    space = coordinates(schedule, prediction, clip)
    if steps is not None:
        steps = check_steps(steps, schedule.T if isinstance(schedule, DiscreteSchedule) else None)
    if space.in_time:
        if sigmas is not None:
            raise ValueError(f"a {schedule.name} schedule takes steps or timesteps, got sigmas")
        times = time_grid(schedule, steps) if timesteps is None else _given_times(schedule, timesteps, least=2)
        return space, [space.node(t) for t in times[:-1]], space.end(times[-1])
    if steps is not None:
        check_spacing(spacing)
        if spacing in LEVELS:
            sigmas = levels(schedule, steps, spacing)
        elif isinstance(schedule, EDMSchedule):
            sigmas = schedule.sigmas(steps)
    if isinstance(schedule, EDMSchedule) and timesteps is not None:
        raise ValueError("an EDM schedule takes steps or sigmas, its time is sigma, got timesteps")
    if sigmas is not None:
        listed = noise_levels(sigmas)
        return space, [space.node(sigma) for sigma in listed[:-1]], space.end(listed[-1])
    times = call_times(schedule, steps, timesteps, spacing)
    return space, [space.node(float(schedule.sigma_ve(t)), t) for t in times], space.end(0.0)


def time_grid(schedule: Schedule, steps: int | None) -> list[float]:
    """``steps`` even steps in time from the noise end to the end of the range that samplers stay in, [steps + 1]."""
    assert steps is not None
    steps = check_steps(steps)
    begin, stop = schedule.noise_end, schedule.data_end + schedule.direction * schedule.time_eps
    return [begin + (stop - begin) * (i / steps) for i in range(steps)] + [stop]


def _given_times(schedule: Schedule, timesteps: Numbers, least: int) -> list[float]:
    return monotone("timesteps", timesteps, rising=schedule.direction < 0, least=least)


def call_times(schedule: Schedule, steps: int | None, timesteps: Numbers | None, spacing: str) -> list[float]:
    """The times of the model calls, from noise to data, for a sampler that ends on clean data after the last."""
    if not isinstance(schedule, DiscreteSchedule):
        if timesteps is not None:
            return _given_times(schedule, timesteps, least=1)
        if spacing != "linspace":
            raise ValueError(
                f"spacing must be linspace or one of {', '.join(LEVELS)} for {schedule.name}, got {spacing!r}"
            )
        assert steps is not None
        if steps == 1:
            return [schedule.noise_end]
        return time_grid(schedule, steps - 1)
    if timesteps is not None:
        times = monotone("timesteps", timesteps, rising=False, least=1)
    elif spacing == "linspace":
        assert steps is not None
        times = linspace(schedule.T, steps)
    else:
        assert steps is not None
        times = [float(t) for t in spaced_timesteps(schedule.T, steps, spacing)]
    for t in times:
        if not 0 <= t <= schedule.T - 1:
            raise ValueError(f"timesteps must lie in 0..{schedule.T - 1} (T = {schedule.T}), got {t}")
    return times


def _target_at_level(
    schedule: DiscreteSchedule, prediction: str, t: float, alpha: float, sigma: float
) -> tuple[float, float]:
    """(u, v) at the level sigma: noise levels need not be those of the table, times then only label them."""
    fixed = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-sigma * alpha, alpha), "score": (0.0, -1.0 / (sigma * alpha))}
    if prediction in fixed:
        return fixed[prediction]
    u, v = predictions.target_coefficients(schedule, prediction, int(t) if t == int(t) else t)
    return float(u), float(v)


def row(
    i: int,
    at: Node,
    to: Node,
    *,
    a: float = 0.0,
    b: float = 0.0,
    d: float = 0.0,
    e: Sequence[float] = (),
    g: float = 0.0,
    **more: Any,
) -> Row:
    """Row i, which calls the model at ``at`` and leaves a state at the level of ``to``."""
    histories: dict[str, Any] = {f"e{slot}": value + 0.0 for slot, value in enumerate(e)}
    made = Row(
        p=at.p,
        q=at.q,
        clip=at.clip,
        a=a + 0.0,  # no -0.0 in tables
        b=b + 0.0,
        d=d + 0.0,
        g=g + 0.0,
        known_s=to.alpha,
        known_n=to.sigma,
        stream=streams.STEP + i,
        known_stream=streams.KNOWN + i,
        time=at.time,
    )
    return replace(made, **histories, **more)


def chain(
    name: str,
    space: Coordinates,
    rows: Sequence[Row],
    at: Sequence[Node],
    init_scale: float | None = None,
) -> Plan:
    """The plan of these rows; ``at`` holds the point of each row's model call, whose scale the row before applies."""
    scales = [node.k for node in at]
    rows = _without_dead_saves(rows)
    chained = [replace(made, k=k) for made, k in zip(rows, [*scales[1:], 1.0], strict=True)]
    whole = isinstance(space.schedule, DiscreteSchedule) and all(node.time == int(node.time) for node in at)
    return Plan(
        name,
        tuple(chained),
        init_scale=at[0].sigma if init_scale is None else init_scale,
        first_k=scales[0],
        prediction=space.prediction,
        time_dtype="int64" if whole else "float32",
    )


def _without_dead_saves(rows: Sequence[Row]) -> list[Row]:
    """The rows without histories that no later row reads, and without an s that is not saved."""
    kept: list[Row] = []
    live: set[int] = set()
    for made in reversed(rows):
        saves = tuple((slot, source) for slot, source in made.saves if slot in live)
        if "s" not in {source for _, source in saves}:
            made = replace(made, A=0.0, B=0.0, D=0.0)
        kept.append(replace(made, saves=saves))
        live = (live - {slot for slot, _ in saves}) | set(made.reads)
    return kept[::-1]


def churned_nodes(
    space: Coordinates, nodes: list[Node], churn: float, limits: tuple[float, float], noise: float
) -> tuple[list[Node], list[float]]:
    """The points after the noise of the churn, and the std of that noise before each step."""
    not_negative("churn", churn)
    not_negative("churn_noise", noise)
    if len(limits) != 2 or not 0.0 <= limits[0] <= limits[1]:
        raise ValueError(f"churn_range must be two levels, 0 <= lowest <= highest, got {limits}")
    if churn == 0.0:
        return nodes, [0.0] * len(nodes)
    if space.in_time:
        raise ValueError(f"churn needs a schedule that is integrated in sigma, got {space.schedule.name}")
    gamma = min(churn / len(nodes), math.sqrt(2.0) - 1.0)
    raised, noises = [], []
    for node in nodes:
        inside = limits[0] <= node.v <= limits[1]
        raised.append(space.node(node.v * (1.0 + gamma), clamp=True) if inside else node)
        noises.append(noise * math.sqrt(raised[-1].v ** 2 - node.v**2))
    return raised, noises


def native_scale(space: Coordinates, first: Node) -> float:
    """Standard deviation of the initial noise in the schedule's own state: 1 for a table, else sigma."""
    return 1.0 if isinstance(space.schedule, DiscreteSchedule) else first.sigma


def ends_on_x0(to: Node) -> bool:
    """Whether the point is clean data: sigma = 0 and alpha = 1."""
    return to.sigma == 0.0 and to.alpha == 1.0

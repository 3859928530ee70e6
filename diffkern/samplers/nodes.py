"""Points of a sampler's grid: where the model is called, what its output says there, and rows between points.

Two coordinates. Diffusion schedules are integrated in v = sigma, the noise level of the state x0 + sigma eps, whose
slope is eps; flows and user paths in their own time v = t, with slope dx/dt. `Coordinates.native` turns a point of the
first kind into one of the schedule's own state alpha x0 + sigma eps, which exponential integrators step in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple, TypedDict, cast

import torch

from diffkern import streams
from diffkern.names import LevelSpacing, Prediction, Spacing, TableSpacing
from diffkern.plan import Plan, Row
from diffkern.samplers._histories import HISTORIES, kept_by, without_zero_slopes
from diffkern.samplers.arguments import bound, need_schedule
from diffkern.samplers.points import filled, in_sigma, in_time, times_of, undetermined
from diffkern.schedules import predictions
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule
from diffkern.schedules.grids import LEVELS, check_spacing, levels
from diffkern.schedules.paths import FlowSchedule, PathSchedule
from diffkern.schedules.timesteps import Numbers, check_steps, linspace, monotone, noise_levels, spaced_timesteps

_EMPTY = Row()


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
    prediction: Prediction
    clip: float
    in_time: bool

    def node(self, v: float, time: float | None = None, *, clamp: bool = False) -> Node:
        """The point at v; ``time`` is the schedule's time there where it is known, ``clamp`` keeps it in a table."""
        return self.nodes([v], None if time is None else [time], clamp=clamp)[0]

    def nodes(
        self, values: Sequence[float], times: Sequence[float] | None = None, *, clamp: bool = False
    ) -> list[Node]:
        """`node` of many values, in one pass over the schedule."""
        if not values:
            return []
        v = filled(values)
        if self.in_time:
            said = in_time(self, v)
        else:
            alpha = filled(_table_alphas(values)) if isinstance(self.schedule, DiscreteSchedule) else None
            said = in_sigma(self, v, None if times is None else filled(times), clamp=clamp, alpha=alpha)
        columns: list[Iterable[float]] = [column.tolist() for column in said]
        columns.insert(-3, repeat(self.clip))
        return [Node._make(line) for line in zip(values, *columns, strict=False)]

    def end(self, v: float) -> Node:
        """The point at v for a sampler that does not call the model there."""
        if self.in_time:
            return Node(v, float(self.schedule.alpha(v)), float(self.schedule.sigma(v)))
        return Node(v, 1.0, v)

    def native(self, node: Node) -> Node:
        """The point in the schedule's own state, alpha times the state x0 + v eps (the same for a flow)."""
        return self.natives([node])[0]

    def natives(self, nodes: Sequence[Node]) -> list[Node]:
        """`native` of many points."""
        if self.in_time:
            return list(nodes)
        return [
            Node(n.v, alpha, alpha * n.v, n.time, n.k / alpha, n.p / alpha, n.q, n.P / alpha, n.Q, n.clip)
            for n, alpha in zip(nodes, self._alphas([n.v for n in nodes]), strict=True)
        ]

    def pure_noise(self, time: float) -> Node:
        """The point of the own state at a time where alpha is 0, which x0 + v eps has none for."""
        schedule, t = self.schedule, torch.tensor([time], dtype=torch.float64, device="cpu")
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        said = predictions.estimates(alpha, sigma, *predictions.target_coefficients(schedule, self.prediction, t))
        given = (f(self.prediction, t) for f in (schedule.model_time, schedule.input_scale))
        return Node._make([math.inf, 0.0, *(float(c) for c in (sigma, *given, *said)), self.clip, 0.0, 0.0, 0.0])

    def at_log_ratios(self, values: Sequence[float]) -> list[Node]:
        """The points where ln(alpha/sigma) has these values."""
        if self.in_time:
            times = self.schedule.time_of_log_snr(2.0 * filled(values)) if values else torch.empty(0)
            return self.nodes(times.tolist()[: len(values)])
        return self.nodes([math.exp(-value) for value in values])

    def native_at_log_ratios(self, values: Sequence[float]) -> list[Node]:
        """`native` of `at_log_ratios`."""
        return self.natives(self.at_log_ratios(values))

    def _alphas(self, sigmas: Sequence[float]) -> list[float]:
        """alpha at levels sigma/alpha."""
        schedule = self.schedule
        if isinstance(schedule, DiscreteSchedule):
            return _table_alphas(sigmas)
        inside = [sigma for sigma in sigmas if sigma != 0.0]
        if isinstance(schedule, EDMSchedule) or not inside:
            return [1.0] * len(sigmas)
        found = iter(schedule.alpha(times_of(schedule, filled(inside))).tolist())
        return [next(found) if sigma != 0.0 else 1.0 for sigma in sigmas]


def _table_alphas(sigmas: Sequence[float]) -> list[float]:
    """alpha of a table at its levels sigma/alpha; by math.sqrt, which rounds correctly where vectors may not."""
    return [1.0 / math.sqrt(1.0 + sigma * sigma) for sigma in sigmas]


def coordinates(schedule: Schedule, prediction: Prediction | None, clip: float | None) -> Coordinates:
    """The coordinates that a schedule is integrated in."""
    need_schedule(schedule)
    chosen = predictions.prediction_of(schedule, prediction)
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
    space, values, times, end = _placed(sampler, schedule, steps, prediction, sigmas, timesteps, spacing, clip)
    return space, space.nodes(values, times), space.end(end)


def own_grid(
    sampler: str,
    schedule: Schedule,
    steps: int | None,
    prediction: Prediction | None = None,
    sigmas: Numbers | None = None,
    timesteps: Numbers | None = None,
    spacing: Spacing = "linspace",
    clip: float | None = None,
) -> tuple[Coordinates, list[Node]]:
    """The points of `grid` in the schedule's own state, the end the last of them; the first may be pure noise."""
    space, values, times, end = _placed(sampler, schedule, steps, prediction, sigmas, timesteps, spacing, clip)
    if times is None or values[0] < math.inf:
        return space, space.natives([*space.nodes(values, times), space.end(end)])
    rest = space.nodes(values[1:], times[1:])
    return space, [space.pure_noise(times[0]), *space.natives([*rest, space.end(end)])]


def _placed(
    sampler: str,
    schedule: Schedule,
    steps: int | None,
    prediction: Prediction | None,
    sigmas: Numbers | None,
    timesteps: Numbers | None,
    spacing: Spacing,
    clip: float | None,
) -> tuple[Coordinates, list[float], list[float] | None, float]:
    """The values of the coordinate where the model is called, their times where known, and the value at the end."""
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
        return space, times[:-1], None, times[-1]
    if steps is not None:
        check_spacing(spacing)
        if spacing in LEVELS:
            sigmas = levels(schedule, steps, cast(LevelSpacing, spacing))
        elif isinstance(schedule, EDMSchedule):
            sigmas = schedule.sigmas(steps)
    if isinstance(schedule, EDMSchedule) and timesteps is not None:
        raise ValueError("an EDM schedule takes steps or sigmas, its time is sigma, got timesteps")
    if sigmas is not None:
        listed = noise_levels(sigmas)
        return space, listed[:-1], None, listed[-1]
    times = call_times(schedule, steps, timesteps, spacing)
    return space, schedule.sigma_ve(filled(times)).tolist()[: len(times)], times, 0.0


def time_grid(schedule: Schedule, steps: int | None) -> list[float]:
    """``steps`` even steps in time from the noise end to the end of the range that samplers stay in, [steps + 1]."""
    assert steps is not None
    steps = check_steps(steps)
    begin, stop = schedule.noise_end, schedule.data_end + schedule.direction * schedule.time_eps
    return [begin + (stop - begin) * (i / steps) for i in range(steps)] + [stop]


def _given_times(schedule: Schedule, timesteps: Numbers, least: int) -> list[float]:
    return monotone("timesteps", timesteps, rising=schedule.direction < 0, least=least)


def call_times(schedule: Schedule, steps: int | None, timesteps: Numbers | None, spacing: Spacing) -> list[float]:
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
        times = [float(t) for t in spaced_timesteps(schedule.T, steps, cast(TableSpacing, spacing))]
    for t in times:
        if not 0 <= t <= schedule.T - 1:
            raise ValueError(f"timesteps must lie in 0..{schedule.T - 1} (T = {schedule.T}), got {t}")
    return times


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
    if e:
        more |= {name: value + 0.0 for name, value in zip(HISTORIES, e, strict=False)}
    return _EMPTY.but(
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
        k=to.k,
        **more,
    )


def still(i: int, at: Node, to: Node, g: float = 0.0) -> Row:
    """A step of no length, between equal levels: x' = x (+ g z). It saves nothing, so histories stay as they are.

    The model is called as at every step, and the next step, from the same level, has its estimate.
    """
    return row(i, at, to, a=1.0, g=g)


def chain(
    name: str,
    space: Coordinates,
    rows: Sequence[Row],
    at: Sequence[Node],
    init_scale: float | None = None,
) -> Plan:
    """The plan of these rows; ``at`` holds the point of each row's model call, whose scale the row before applies.

    Raises ValueError where a row needs what the prediction does not determine at its time.
    """
    scales = [node.k for node in at]
    rows = without_zero_slopes(rows)
    chained: list[Row] = []
    live: set[int] = set()
    # From the last row to the first: no histories that no later row reads, and no s that is not saved.
    for made, node, k in zip(reversed(rows), reversed(at), [1.0, *scales[:0:-1]], strict=True):
        saves = made.saves
        slots, slope = kept_by(saves)
        if saves and not live.issuperset(slots):
            saves = tuple(save for save in saves if save[0] in live)
            slots, slope = kept_by(saves)
        if made.k != k or saves is not made.saves:
            made = made.but(k=k, saves=saves)
        if not slope and (made.A or made.B or made.D):
            made = made.but(A=0.0, B=0.0, D=0.0)
        if math.isnan(made.p + made.a + made.d + made.A + made.D):
            made = _without_x0(made, space, node)
        if saves:
            live -= slots
        if made.e0 or made.e1 or made.e2 or made.e3:
            live.update(made.reads)
        chained.append(made)
    whole = isinstance(space.schedule, DiscreteSchedule) and all(node.time == int(node.time) for node in at)
    return Plan(
        name,
        tuple(reversed(chained)),
        init_scale=at[0].sigma if init_scale is None else init_scale,
        first_k=scales[0],
        prediction=space.prediction,
        time_dtype="int64" if whole else "float32",
    )


def _without_x0(made: Row, space: Coordinates, node: Node) -> Row:
    """The row where the prediction does not determine x0, if it does without; else ValueError."""
    needs = made.b != 0.0 or made.B != 0.0 or any(source == "x0" for _, source in made.saves)
    if needs or any(math.isnan(c) for c in (made.a, made.d, made.A, made.D)):
        raise ValueError(undetermined(space.schedule, space.prediction, node.time))
    return made.but(p=0.0, q=0.0, clip=math.inf)


def native_scale(space: Coordinates, first: Node) -> float:
    """Standard deviation of the initial noise in the schedule's own state: 1 for a table, else sigma."""
    return 1.0 if isinstance(space.schedule, DiscreteSchedule) else first.sigma


def ends_on_x0(to: Node) -> bool:
    """Whether the point is clean data: sigma = 0 and alpha = 1."""
    return to.sigma == 0.0 and to.alpha == 1.0

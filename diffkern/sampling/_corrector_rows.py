"""Rows of predictor and corrector; `diffkern.predictor_corrector`, the function, has the formulas."""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

from diffkern.integers import check_rows, integer
from diffkern.modes import neutrally
from diffkern.names import Corrector, Prediction, Predictor, ReverseVariance, Spacing
from diffkern.plan import Plan, Row
from diffkern.samplers.arguments import choice, need_schedule
from diffkern.samplers.nodes import Node, call_times, time_grid
from diffkern.samplers.sde import Walk
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule
from diffkern.schedules.paths import FlowSchedule, PathSchedule
from diffkern.schedules.timesteps import Numbers, check_steps

PREDICTORS = get_args(Predictor)
CORRECTORS = get_args(Corrector)


class Score(NamedTuple):
    """score = on_x x + on_m m at a Langevin row, whose step is size (norm(z)/norm(score))^2."""

    on_x: float
    on_m: float
    size: float

    def square(self) -> tuple[float, float, float]:
        """The row of `ops.loss` whose value is the mean square of the score, given m and x (x and x if on_m is 0)."""
        if self.on_m == 0.0:
            return 0.0, 0.0, self.on_x**2
        return -self.on_x / self.on_m, 0.0, self.on_m**2


@neutrally
def rows_of(
    schedule: Schedule,
    steps: int | None,
    *,
    corrector: Corrector,
    predictor: Predictor = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    variance: ReverseVariance | None = None,
    dt: float | None = None,
    denoise: bool = True,
    prediction: Prediction | None = None,
    timesteps: Numbers | None = None,
    spacing: Spacing = "linspace",
) -> tuple[Plan, dict[int, Score]]:
    """All rows, and what the langevin rows still need."""
    need_schedule(schedule)
    choice("predictor", predictor, PREDICTORS)
    choice("corrector", corrector, CORRECTORS)
    if predictor == corrector == "none":
        raise ValueError("predictor and corrector must not both be 'none', got both")
    corrector_steps = integer("corrector_steps", corrector_steps)
    if not 0.0 < snr < math.inf:
        raise ValueError(f"snr must be positive, got {snr}")
    if variance is not None:
        choice("variance", variance, get_args(ReverseVariance))
        if predictor != "ancestral":
            raise ValueError(f"variance belongs to the ancestral predictor, got it for {predictor!r}")
    if dt is not None:
        if predictor != "euler_maruyama":
            raise ValueError(f"dt belongs to the euler_maruyama predictor, got it for {predictor!r}")
        if not 0.0 < dt < math.inf:
            raise ValueError(f"dt must be positive, got {dt}")
    walk = Walk("predictor_corrector", schedule, prediction, None)
    times = _times(schedule, steps, timesteps, spacing)
    if corrector != "none":
        check_rows("corrector_steps", corrector_steps, len(times))
    nodes = walk.nodes(times)
    rates = walk.rates(schedule.drift, schedule.diffusion_squared, times=times) if predictor == "euler_maruyama" else []
    rows: list[Row] = []
    at: list[Node] = []
    scores: dict[int, Score] = {}
    for j, (node, to) in enumerate(zip(nodes, [*nodes[1:], Node(schedule.data_end, 1.0, 0.0)], strict=True)):
        r = node.alpha / to.alpha
        v = max(0.0, node.sigma**2 - (r * to.sigma) ** 2)
        last = to.sigma == 0.0 and denoise
        for _ in range(corrector_steps if corrector != "none" else 0):
            size = 2.0 * r * r * snr * snr
            e = size * node.sigma**2
            made = walk.row(len(rows), node, node, keep=1.0, pull=e, g=math.sqrt(2.0 * e))
            if corrector == "langevin":
                scores[len(rows)] = Score(-node.P / node.sigma, -node.Q / node.sigma, size)
                made = made.but(g=1.0)  # its coefficients are made after the model call
            rows.append(made.but(ends_step=False))
            at.append(node)
        if predictor == "none":
            rows[-1] = rows[-1].but(ends_step=True)
            continue
        if predictor == "reverse_diffusion":
            keep, pull, g = 2.0 - r, v, math.sqrt(v)
        elif predictor == "ancestral":
            if r == 0.0:
                raise ValueError(f"the ancestral predictor needs alpha > 0, got 0 at t={node.v:g} ({schedule.name})")
            tilde = r == 1.0 if variance is None else variance == "beta_tilde"
            keep, pull, g = 1.0 / r, v / r, math.sqrt(v) * (to.sigma / node.sigma if tilde else 1.0)
        else:
            f, g2 = rates[j]
            if not (math.isfinite(f) and math.isfinite(g2)):
                raise ValueError(
                    f"the euler_maruyama predictor needs a finite drift and diffusion at each model call, got {f:g} "
                    f"and {g2:g} at t={node.v:g} ({schedule.name})"
                )
            h = abs(to.v - node.v) if dt is None else dt
            keep, pull, g = 1.0 - h * f, h * g2, math.sqrt(h * g2)
        rows.append(walk.row(len(rows), node, to, keep=keep, pull=pull, g=0.0 if last else g))
        at.append(node)
    return walk.plan(rows, at), scores


def _times(schedule: Schedule, steps: int | None, timesteps: Numbers | None, spacing: Spacing) -> list[float]:
    """The times of the model calls, from noise to data; after the last one comes clean data."""
    if (steps is None) == (timesteps is None):
        raise ValueError("predictor_corrector needs exactly one of steps and timesteps, got none or both")
    if steps is not None:
        steps = check_steps(steps, schedule.T if isinstance(schedule, DiscreteSchedule) else None)
        if isinstance(schedule, EDMSchedule):
            return [float(sigma) for sigma in schedule.sigmas(steps)[:-1]]
        if isinstance(schedule, FlowSchedule | PathSchedule):
            return time_grid(schedule, steps)[:-1]
    return call_times(schedule, steps, timesteps, spacing)

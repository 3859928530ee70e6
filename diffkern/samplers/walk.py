"""Rows of stochastic samplers, which step in a schedule's own state and time: drift, pull along the score, noise."""

from __future__ import annotations

import math

from diffkern.plan import Plan, Row
from diffkern.samplers.arguments import bound, need_schedule
from diffkern.samplers.nodes import Coordinates, Node, chain, row
from diffkern.schedules import predictions
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule


class Walk:
    """Rows of a schedule's own state in its own time."""

    def __init__(self, name: str, schedule: Schedule, prediction: str | None, clip: float | None) -> None:
        need_schedule(schedule)
        chosen = predictions.check_prediction(schedule.default_prediction if prediction is None else prediction)
        self.name, self.schedule, self.prediction, self.clip = name, schedule, chosen, bound(clip)

    def node(self, t: float) -> Node:
        """The point of a model call at t; ValueError where sigma is 0."""
        schedule = self.schedule
        when = int(t) if isinstance(schedule, DiscreteSchedule) and t == int(t) else t
        alpha, sigma = float(schedule.alpha(when)), float(schedule.sigma(when))
        if sigma == 0.0:
            raise ValueError(f"{self.name} needs sigma > 0 at each model call, got 0 at t={t:g} ({schedule.name})")
        p, q, P, Q = (float(c) for c in predictions.to_x0_eps(schedule, self.prediction, when))
        time, k = (float(f(self.prediction, when)) for f in (schedule.model_time, schedule.input_scale))
        return Node(t, alpha, sigma, time, k, p, q, P, Q, self.clip)

    def end(self, t: float) -> Node:
        """The point at t where the model is not called."""
        when = int(t) if isinstance(self.schedule, DiscreteSchedule) and t == int(t) else t
        return Node(t, float(self.schedule.alpha(when)), float(self.schedule.sigma(when)))

    def row(self, i: int, node: Node, to: Node, *, keep: float, pull: float, g: float) -> Row:
        """x' = keep x + pull score + g z."""
        a, b, d = self._eps(node)
        weight = -pull / node.sigma
        return row(i, node, to, a=keep + weight * a, b=weight * b, d=weight * d, g=g)

    def flow_row(self, i: int, node: Node, to: Node, t: float, dt: float, pull: float, g: float) -> Row:
        """x' = x + dt (alpha_dot x0 + sigma_dot eps) + pull score + g z."""
        schedule = self.schedule
        alpha_dot, sigma_dot = float(schedule.alpha_dot(t)), float(schedule.sigma_dot(t))
        a, b, d = self._eps(node)
        weight = dt * sigma_dot - pull / node.sigma
        if self.clip < math.inf:
            return row(i, node, to, a=1.0 + weight * a, b=dt * alpha_dot + weight * b, g=g)
        if self.prediction == "velocity":
            weight = -pull / node.sigma
            return row(i, node, to, a=1.0 + weight * a, d=dt + weight * d, g=g)
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

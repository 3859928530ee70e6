"""EDM's churn: noise before a step, which raises its level (arXiv 2206.00364, algorithm 2)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffkern.samplers.arguments import not_negative

if TYPE_CHECKING:
    from diffkern.samplers.nodes import Coordinates, Node


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
    inside = [limits[0] <= node.v <= limits[1] for node in nodes]
    hats = [node.v * (1.0 + gamma) for node, within in zip(nodes, inside, strict=True) if within]
    above = iter(space.nodes(hats, clamp=True))
    raised = [next(above) if within else node for node, within in zip(nodes, inside, strict=True)]
    return raised, [noise * math.sqrt(hat.v**2 - node.v**2) for hat, node in zip(raised, nodes, strict=True)]

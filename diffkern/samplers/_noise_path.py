"""The option ``noise_path``: where a stochastic row's noise comes from.

"independent": noise of its own, on the row's stream. "brownian": the increment of the sample's Brownian path between
the two levels that the noise spans, over the root of its length: the noise of a whole step is that of its halves
added up. The path's clock is `brownian.position` of the level, the same for every schedule, sampler and number of
steps; k-diffusion's runs in sigma, or what its ``transform`` makes of it, between the two ends of the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

from diffkern import brownian
from diffkern.names import NoisePath
from diffkern.samplers.arguments import choice

if TYPE_CHECKING:
    from diffkern.samplers.nodes import Node

Span = tuple[float, float] | None
Clock = Callable[["Node", "Node", float], Span]


def clock(noise_path: NoisePath) -> Clock:
    """A function from the two levels that a row's noise spans, and its g, to the row's ``path``."""
    if choice("noise_path", noise_path, get_args(NoisePath)) == "independent":
        return lambda _node, _to, _g: None
    return _span


def _span(node: Node, to: Node, g: float) -> Span:
    if g == 0.0:
        return None
    s, t = (brownian.position(level.alpha, level.sigma) for level in (node, to))
    try:
        brownian.increment(s, t, normalised=True)
    except ValueError:
        raise ValueError(
            f"noise_path='brownian' needs alpha/sigma to rise in every step with noise, by 2^-{brownian.LEVELS} of the "
            f"path at least, got the positions {s:.9g} and {t:.9g}"
        ) from None
    return s, t

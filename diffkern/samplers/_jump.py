"""Steps of an exponential integrator (arXiv 2211.01095, eq. 9), which DPM-Solver++ and UniPC are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffkern.samplers._arrays import Array, Columns, columns, each
from diffkern.samplers._phi import phi

if TYPE_CHECKING:
    from diffkern.samplers.nodes import Node


class Jumps(NamedTuple):
    """Exponential steps between points: x' = a x + alpha' (sum of weights times estimates of x0) + g z, [n] each.

    With k = 1 + eta. ``still``: h is 0, the levels are equal. ``sharp``: alpha is 0 before the step, or sigma after it.
    """

    node: Columns
    to: Columns
    sharp: NDArray[np.bool_]
    still: NDArray[np.bool_]
    h: Array
    a: Array
    g: Array
    rate: Array
    """k h."""

    def some(self, index: NDArray[np.int64]) -> Jumps:
        """Those of the steps."""
        flags = self.sharp[index], self.still[index]
        return Jumps(self.node.some(index), self.to.some(index), *flags, *(column[index] for column in self[4:]))

    def weight(self, n: int) -> Array:
        """k h int_0^1 e^(-(1-u) k h) u^n du: at n = 0 it is 1 - e^(-k h), for an infinite h 1, all weight at u = 1."""
        finite = self.rate != math.inf
        rate = np.where(finite, self.rate, 1.0)
        return np.where(finite, rate * math.factorial(n) * phi(n + 1, -rate), 1.0)


def jumps(nodes: Sequence[Node], to: Sequence[Node], eta: float = 0.0) -> Jumps:
    """The steps from these points to those."""
    node, after = columns(nodes), columns(to)
    # e^-h, which is 0 where alpha is 0 before the step (pure noise) or sigma is 0 after it.
    with np.errstate(all="ignore"):
        decay = node.alpha * after.sigma / (after.alpha * node.sigma)
        h = each(lambda ratio: math.inf if ratio == 0.0 else -math.log(ratio), decay)
        again = each(lambda ratio: ratio**eta, decay) if eta > 0.0 else np.ones_like(decay)
        a = after.sigma / node.sigma * again
        g = after.sigma * np.sqrt(np.fmax(0.0, 1.0 - again * again))
    sharp = (node.alpha == 0.0) | (after.sigma == 0.0)
    return Jumps(node, after, sharp, decay == 1.0, h, a, g, (1.0 + eta) * h)

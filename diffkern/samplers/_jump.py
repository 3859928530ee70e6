"""One step of an exponential integrator (arXiv 2211.01095, eq. 9), which DPM-Solver++ and UniPC are made of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffkern.samplers._phi import phi

if TYPE_CHECKING:
    from diffkern.samplers.nodes import Node


class Jump:
    """One exponential step from a point to another: x' = a x + alpha' (sum of weights times estimates of x0) + g z.

    ``weight(n)`` is k h int_0^1 e^(-(1-u) k h) u^n du, with k = 1 + eta. ``still``: h is 0, the levels are equal.
    """

    def __init__(self, node: Node, to: Node, eta: float = 0.0) -> None:
        self.alpha, self.sharp = to.alpha, node.alpha == 0.0 or to.sigma == 0.0
        # e^-h, which is 0 where alpha is 0 before the step (pure noise) or sigma is 0 after it.
        self.decay = node.alpha * to.sigma / (to.alpha * node.sigma)
        self.h = math.inf if self.decay == 0.0 else -math.log(self.decay)
        again = self.decay**eta if eta > 0.0 else 1.0
        self.a = to.sigma / node.sigma * again
        self.g = to.sigma * math.sqrt(max(0.0, 1.0 - again * again))
        self.rate = (1.0 + eta) * self.h
        self.still = self.decay == 1.0

    def weight(self, n: int) -> float:
        """See the class; at n = 0 it is 1 - e^(-k h)."""
        if self.rate == math.inf:
            return 1.0  # all weight at u = 1
        return self.rate * math.factorial(n) * phi(n + 1, -self.rate)

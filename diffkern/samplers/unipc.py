"""UniPC (arXiv 2302.04867): predictor and corrector of any order up to 3, merged into one row a model call."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
from typing_extensions import Unpack

from diffkern.plan import Plan, Row
from diffkern.samplers._jump import Jump
from diffkern.samplers._phi import phi
from diffkern.samplers.arguments import choice, order_in
from diffkern.samplers.nodes import GridOptions, Node, chain, ends_on_x0, grid, native_scale, row
from diffkern.schedules.base import Schedule
from diffkern.signatures import shows_arguments_of


@shows_arguments_of(grid)
def unipc(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
    **options: Unpack[GridOptions],
) -> Plan:
    """UniPC-p in the x0 form: UniP-p predicts, UniC-p corrects with the model output that the next step needs anyway.

    With h and lambda as for `dpmpp_2m`, estimates x0_k at lambda + r_k h (r_0 = 0, r_k < 0 for k >= 1) and B = -h
    ("bh1") or e^-h - 1 ("bh2"):

        predictor  x'  = (sigma'/sigma) x_c + alpha' (1 - e^-h) x0 - alpha' B sum_k rho_k (x0_k - x0)/r_k
        corrector  x'_c = the same with another term r = 1, the x0 at x' itself, and its own rho

    x'_c - x' is a sum of x0's, so the row at x' makes x'_c and from it the next prediction: one op a model call. The
    last state is not corrected, as that would take another call. Order 1 to 3 (default 2); the first steps are of lower
    order, and the last with ``lower_order_final`` (as diffusers does; a step that ends at sigma = 0 always is of first
    order). The order of convergence is ``order`` + 1 with the corrector, ``order`` without, less where the first and
    last steps hold it back. State, grid and arguments as for `dpmpp_2m`.
    """
    order = order_in(order, 3)
    choice("variant", variant, ("bh1", "bh2"))
    space, nodes, end = grid("unipc", schedule, steps, **options)
    points = [space.native(node) for node in (*nodes, end)]
    count = len(nodes)
    rows: list[Row] = []
    slots = order
    before: _Step | None = None  # the step that led here
    for i, (node, to) in enumerate(itertools.pairwise(points)):
        finite = 0
        while finite < min(order, i + 1) - 1 and points[i - 1 - finite].alpha > 0.0:
            finite += 1
        used = finite + 1
        if lower_order_final:
            used = min(used, count - i)
        step = _Step(points, i, 1 if to.sigma == 0.0 or node.alpha == 0.0 else used, variant)
        if ends_on_x0(to):
            made = row(i, node, to, b=1.0)
        else:
            # Weights of the estimates at i, i - 1, ...: of the correction of x_i, times sigma'/sigma, and of the step.
            total = [0.0] * 5
            if corrector and before is not None:
                for n, w in enumerate(before.correction()):
                    total[n] += step.jump.a * w
            for n, w in enumerate(step.prediction()):
                total[n] += w
            e = [0.0] * 4
            for n in range(1, 5):
                if total[n] != 0.0:
                    e[(i - n) % slots] += total[n]
            made = row(i, node, to, a=step.jump.a, b=total[0], e=e)
        rows.append(replace(made, saves=((i % slots, "x0"),)))
        before = step
    return chain("unipc", space, rows, nodes if space.in_time else points[:-1], native_scale(space, points[0]))


class _Step:
    """One step of UniP and the UniC that corrects its end; estimates are weighted, the latest first."""

    def __init__(self, points: list[Node], i: int, order: int, variant: str) -> None:
        self.jump, self.order = Jump(points[i], points[i + 1]), order
        self.alpha = points[i + 1].alpha
        if self.jump.sharp:
            return
        h, here = self.jump.h, points[i].log_ratio
        self.r = [(points[i - k].log_ratio - here) / h for k in range(1, order)]
        self.scale = math.expm1(-h) if variant == "bh2" else -h
        self.b = [-h * math.factorial(k) * phi(k + 1, -h) / self.scale for k in range(1, order + 1)]

    def _rho(self, r: list[float]) -> list[float]:
        """The solution of sum_k rho_k r_k^(n-1) = b_n, n = 1..len(r)."""
        if len(r) == 1:
            return [0.5]  # what the papers' code takes for one term, for both variants
        matrix = np.array([[x**n for x in r] for n in range(len(r))])
        return [float(v) for v in np.linalg.solve(matrix, np.array(self.b[: len(r)]))]

    def _sum(self, r: list[float]) -> list[float]:
        """-alpha' B sum_k rho_k (x0_k - x0)/r_k as [weight of x0, weights of the x0_k]."""
        if not r:
            return [0.0]
        weights = [-self.alpha * self.scale * rho / x for rho, x in zip(self._rho(r), r, strict=True)]
        return [-math.fsum(weights), *weights]

    def prediction(self) -> list[float]:
        """Weights of the estimates at i, i - 1, ... in x_(i+1), beside (sigma'/sigma) x_c."""
        if self.jump.sharp:
            return [self.alpha * (self.jump.weight(0))]
        terms = self._sum(self.r)
        return [self.alpha * self.jump.weight(0) + terms[0], *terms[1:]]

    def correction(self) -> list[float]:
        """Weights of the estimates at i + 1, i, i - 1, ... in x_c - x at i + 1."""
        if self.jump.sharp:
            return [0.0]
        base, *past, new = self._sum([*self.r, 1.0])
        predicted = self._sum(self.r)
        gaps = [c - p for c, p in zip([base, *past], predicted, strict=True)]
        return [new, *gaps]

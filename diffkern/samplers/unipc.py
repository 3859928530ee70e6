"""UniPC (arXiv 2302.04867): predictor and corrector of any order up to 3, merged into one row a model call."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import numpy as np
from typing_extensions import Unpack

from diffkern.modes import neutrally
from diffkern.names import UniPCVariant
from diffkern.plan import Plan, Row
from diffkern.samplers._jump import Jump
from diffkern.samplers._phi import phi
from diffkern.samplers.arguments import choice, order_in
from diffkern.samplers.nodes import GridOptions, Node, chain, ends_on_x0, grid, native_scale, own_grid, row, still
from diffkern.schedules.base import Schedule
from diffkern.signatures import shows_arguments_of


@neutrally
@shows_arguments_of(grid)
def unipc(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 2,
    variant: UniPCVariant = "bh2",
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
    choice("variant", variant, get_args(UniPCVariant))
    space, points = own_grid("unipc", schedule, steps, **options)
    jumps = [Jump(node, to) for node, to in itertools.pairwise(points)]
    count = sum(not jump.still for jump in jumps)
    taken: list[_Step] = []
    past: list[Node] = []  # where they started, the latest first
    for node, to, jump in zip(points, points[1:], jumps, strict=False):
        if jump.still:
            continue
        j = len(taken)
        past = [node, *past[:order]]
        finite = 0
        while finite < min(order, j + 1) - 1 and past[1 + finite].alpha > 0.0:
            finite += 1
        used = finite + 1
        if lower_order_final:
            used = min(used, count - j)
        taken.append(_Step(jump, past[: 1 if to.sigma == 0.0 or node.alpha == 0.0 else used], variant))
    _solve(taken)
    rows: list[Row] = []
    slots, j = order, -1
    before: _Step | None = None  # the step that led here
    for i, (node, to, jump) in enumerate(zip(points, points[1:], jumps, strict=False)):
        if jump.still:
            rows.append(still(i, node, to))
            continue
        j += 1
        step = taken[j]
        if ends_on_x0(to):
            made = row(i, node, to, b=1.0)
        else:
            # Weights of the estimates at j, j - 1, ...: of the correction of x_j, times sigma'/sigma, and of the step.
            total = [0.0] * 5
            if corrector and before is not None:
                for n, w in enumerate(before.correction()):
                    total[n] += step.jump.a * w
            for n, w in enumerate(step.prediction()):
                total[n] += w
            e = [0.0] * 4
            for n in range(1, 5):
                if total[n] != 0.0:
                    e[(j - n) % slots] += total[n]
            made = row(i, node, to, a=step.jump.a, b=total[0], e=e)
        rows.append(made.but(saves=((j % slots, "x0"),)))
        before = step
    return chain("unipc", space, rows, points[:-1], native_scale(space, points[0]))


class _Step:
    """One step of UniP and the UniC that corrects its end; estimates are weighted, the latest first."""

    def __init__(self, jump: Jump, past: list[Node], variant: UniPCVariant) -> None:
        self.jump, self.alpha, order = jump, jump.alpha, len(past)
        if jump.sharp:
            return
        h, here = jump.h, past[0].log_ratio
        self.r = [(point.log_ratio - here) / h for point in past[1:]]
        self.scale = math.expm1(-h) if variant == "bh2" else -h
        self.b = [-h * math.factorial(k) * phi(k + 1, -h) / self.scale for k in range(1, order + 1)]
        # rho by the number of terms; one term has what the papers' code takes, for both variants
        self.rho: dict[int, list[float]] = {0: [], 1: [0.5]}

    def systems(self) -> list[list[float]]:
        """The r of the predictor and the corrector."""
        return [] if self.jump.sharp else [self.r, [*self.r, 1.0]]

    def _sum(self, r: list[float]) -> list[float]:
        """-alpha' B sum_k rho_k (x0_k - x0)/r_k as [weight of x0, weights of the x0_k]."""
        weights = [-self.alpha * self.scale * rho / x for rho, x in zip(self.rho[len(r)], r, strict=True)]
        return [0.0 - math.fsum(weights), *weights]

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
        gaps = [c - p for c, p in zip([base, *past], self._sum(self.r), strict=True)]
        return [new, *gaps]


def _solve(steps: list[_Step]) -> None:
    """rho of every step, the solutions of sum_k rho_k r_k^(n-1) = b_n, n = 1..count: all of a size at once."""
    for count in (2, 3):
        found = [(step, r) for step in steps for r in step.systems() if len(r) == count]
        if found:
            matrices = np.array([[[x**n for x in r] for n in range(count)] for _, r in found])
            sides = np.array([step.b[:count] for step, _ in found])[:, :, None]
            for (step, _), rho in zip(found, np.linalg.solve(matrices, sides)[:, :, 0].tolist(), strict=True):
                step.rho[count] = rho

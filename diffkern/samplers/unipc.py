"""UniPC (arXiv 2302.04867): predictor and corrector of any order up to 3, merged into one row a model call."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from diffkern.modes import neutrally
from diffkern.names import UniPCVariant
from diffkern.plan import Plan
from diffkern.samplers._arrays import Array, each, exact_sum, placed
from diffkern.samplers._columns import rows as rows_of
from diffkern.samplers._histories import HISTORIES
from diffkern.samplers._jump import Jumps, jumps
from diffkern.samplers._phi import phi
from diffkern.samplers.arguments import choice, order_in
from diffkern.samplers.nodes import GridOptions, chain, ends_on_x0, grid, native_scale, own_grid, row, still
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
    nodes, to = points[:-1], points[1:]
    whole = jumps(nodes, to)
    taken = np.flatnonzero(~whole.still)
    jump, count = whole.some(taken), len(taken)
    used = np.ones(count, np.int64)  # estimates that each step has, its own and those of finite steps before
    finite = 0
    for j, (sharp, alpha) in enumerate(zip(jump.sharp.tolist(), jump.node.alpha.tolist(), strict=True)):
        found = min(order, finite + 1, count - j if lower_order_final else order)
        used[j] = 1 if sharp else found
        finite = finite + 1 if alpha > 0.0 else 0
    predicted, corrected = _weights(jump, np.array([nodes[i].log_ratio for i in taken]), used, variant)
    # Weights of the estimates at j, j - 1, ...: of the correction of x_j, times sigma'/sigma, and of the step.
    total = np.zeros_like(predicted)
    if corrector:
        total[:, 1:] += jump.a[1:] * corrected[:, :-1]
    total += predicted
    step = np.arange(count)
    e = np.zeros((len(HISTORIES), count))
    for n in range(1, len(total)):
        e[(step - n) % order, step] += total[n]
    saves = [((slot, "x0"),) for slot in (step % order).tolist()]
    more: dict[str, Any] = {"a": jump.a, "b": total[0], "e": list(e), "fields": {"saves": saves}}
    rows = placed(len(nodes), (taken, rows_of(taken, jump.node, jump.to, **more)))
    for i, stays in enumerate(whole.still.tolist()):
        if stays:
            rows[i] = still(i, nodes[i], to[i])
        elif ends_on_x0(to[i]):
            rows[i] = row(i, nodes[i], to[i], b=1.0, saves=rows[i].saves)
    return chain("unipc", space, rows, nodes, native_scale(space, points[0]))


def _weights(jump: Jumps, log_ratios: Array, used: NDArray[np.int64], variant: UniPCVariant) -> tuple[Array, Array]:
    """Weights [terms, n] of the latest estimates of x0, the latest first, from the start of each step.

    Of UniP in x_(i+1) beside (sigma'/sigma) x_c, from the estimate at i on; of UniC in x_c - x at i + 1, from that at
    i + 1 on. ``used`` says how many estimates a step's predictor has.
    """
    terms = int(used.max(initial=1)) + 1
    predicted, corrected = np.zeros((terms, len(used))), np.zeros((terms, len(used)))
    predicted[0] = jump.to.alpha * jump.weight(0)
    for order in range(1, terms):
        (at,) = np.nonzero((used == order) & ~jump.sharp)
        if not len(at):
            continue
        h, alpha, ones = jump.h[at], jump.to.alpha[at], np.ones(len(at))
        scale = each(math.expm1, -h) if variant == "bh2" else -h
        sides = [-h * math.factorial(k) * phi(k + 1, -h) / scale for k in range(1, order + 1)]
        r = [(log_ratios[at - n] - log_ratios[at]) / h for n in range(1, order)]
        # One term has the rho that the papers' code takes, for both variants.
        sums = []
        for points in (r, [*r, ones]):
            rho = [0.5 * ones] * len(points) if len(points) < 2 else _solved(points, sides)
            weights = [-alpha * scale * share / x for share, x in zip(rho, points, strict=True)]
            sums.append([0.0 - exact_sum(weights) if weights else 0.0 * ones, *weights])
        plain, (base, *past, new) = sums
        predicted[0, at] += plain[0]
        corrected[0, at] = new
        for n, (with_new, without) in enumerate(zip([base, *past], plain, strict=True)):
            corrected[n + 1, at] = with_new - without
        for n, weight in enumerate(plain[1:], 1):
            predicted[n, at] = weight
    return predicted, corrected


def _solved(r: list[Array], sides: list[Array]) -> list[Array]:
    """rho of every step, the solutions of sum_k rho_k r_k^(n-1) = b_n, n = 1..count: all of a size at once."""
    count = len(r)
    powers = [[np.ones_like(points), points, each(_squared, points)][:count] for points in r]
    matrices, right = np.array(powers).transpose(2, 1, 0), np.array(sides[:count]).T[:, :, None]
    return list(np.linalg.solve(matrices, right)[:, :, 0].T)


def _squared(x: float) -> float:
    return x**2

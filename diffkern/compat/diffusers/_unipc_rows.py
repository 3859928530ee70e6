"""The coefficients of UniPC (arXiv 2302.04867) as diffusers computes them: B(h), the systems for rho, both branches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffkern.compat.diffusers._multistep import Past


class Levels(NamedTuple):
    """The S + 1 noise levels, and what the solver makes of them."""

    alpha: Tensor
    sigma: Tensor
    predict_x0: bool
    solver_type: str

    @property
    def log_ratio(self) -> Tensor:
        """ln(alpha/sigma)."""
        return torch.log(self.alpha) - torch.log(self.sigma)


class Half(NamedTuple):
    """One exponential step from level j to j + 1 with its estimate m and K older ones, a row a step, float64:

        x' = keep x + first m + slope (sum_k rho_k (older_k - m) / r_k [+ rho_new (new - m)])

    ``predictor`` and ``corrector`` are rho_k / r_k; ``new`` is rho_new, the weight of the estimate at the step's end.
    """

    keep: Tensor
    first: Tensor
    slope: Tensor
    predictor: Tensor
    corrector: Tensor
    new: Tensor


def halves(levels: Levels, orders: Tensor, past: Past) -> Half:
    """`Half` of every step, of the given order (int [S]); in the dtype of the levels, as the original computes it."""
    alpha, sigma = levels.alpha, levels.sigma
    lam = levels.log_ratio
    h = lam[1:] - lam[:-1]
    hh = -h if levels.predict_x0 else h
    phi = torch.expm1(hh)
    rate = hh if levels.solver_type == "bh1" else phi
    if levels.predict_x0:
        keep, scale = sigma[1:] / sigma[:-1], alpha[1:]
    else:
        keep, scale = alpha[1:] / alpha[:-1], sigma[1:]
    idle = torch.tensor(past.idle)
    keep = torch.where(idle & (sigma[1:] == sigma[:-1]), 1.0, keep)  # also from 0 to 0
    first = -scale * phi
    if not levels.predict_x0:  # at sigma = 0 the original multiplies 0 by infinity
        first = torch.where(sigma[1:] == 0, -keep * sigma[:-1], first)
    most = int(orders.max())
    steps = len(h)
    predictor = torch.zeros(steps, most - 1, dtype=torch.float64)
    corrector = torch.zeros(steps, most - 1, dtype=torch.float64)
    new = torch.full((steps,), 0.5, dtype=torch.float64)
    slope = torch.where(torch.isfinite(rate), -scale * rate, 0.0)  # no estimate is older where h is infinite
    first = torch.where(idle, 0.0, first)
    nearest = past.nearest(max(most - 1, 1))
    for order in range(2, most + 1):
        at = (orders == order).nonzero().flatten()
        if not len(at):
            continue
        ratios = [(lam[nearest[k - 1][at]] - lam[at]) / h[at] for k in range(1, order)]
        r = torch.stack([*ratios, torch.ones_like(h[at])], 1)
        system = torch.stack([torch.pow(r, power) for power in range(order)], 1)
        right, factorial, term = [], 1, phi[at] / hh[at] - 1
        for i in range(1, order + 1):
            right.append(term * factorial / rate[at])
            factorial *= i + 1
            term = term / hh[at] - 1 / factorial
        b = torch.stack(right, 1)
        rho = torch.linalg.solve(system, b)
        rho_p = torch.full_like(b[:, :1], 0.5)  # of order 2, simplified in the original
        if order > 2:
            rho_p = torch.linalg.solve(system[:, :-1, :-1], b[:, :-1])
        older = r[:, :-1].double()
        predictor[at, : order - 1] = rho_p.double() / older
        corrector[at, : order - 1] = rho[:, :-1].double() / older
        new[at] = rho[:, -1].double()
    return Half(keep.double(), first.double(), slope.double(), predictor, corrector, new)


class Step(NamedTuple):
    """Coefficients [S, 2 + estimates] over (sample, last corrected sample, m0, m1, ...), float64."""

    corrected: Tensor
    total: Tensor


def combine(before: Half | None, now: Half, mode: str) -> Step:
    """What step i is of its ``mode``: "plain" without a corrector, "merged" with ``sample`` the predicted state of the
    step before (whose row of ``before`` is i - 1), "apart" from the last corrected sample."""
    steps, ahead = len(now.keep), now.predictor.shape[1]
    behind = 0 if before is None else before.corrector.shape[1] + 1
    corrected = torch.zeros(steps, 3 + max(ahead, behind), dtype=torch.float64)
    if before is None:
        corrected[:, 0] = 1.0
    else:
        back = Half(*(part.roll(1, 0) for part in before))
        slope = back.slope[:, None]
        if mode == "merged":
            corrected[:, 0] = 1.0
            older = slope * (back.corrector - back.predictor)
        else:
            corrected[:, 1] = back.keep
            corrected[:, 3] = back.first
            older = slope * back.corrector
        corrected[:, 2] = back.slope * back.new
        corrected[:, 3] -= older.sum(1) + back.slope * back.new
        corrected[:, 4 : 4 + older.shape[1]] = older
        corrected[0] = float("nan")  # nothing comes before the first step
    total = now.keep[:, None] * corrected
    older = now.slope[:, None] * now.predictor
    total[:, 2] += now.first - older.sum(1)
    total[:, 3 : 3 + ahead] += older
    return Step(corrected, total)

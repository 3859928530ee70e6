"""Rows of coefficients for the loss ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkern.compat.guided_diffusion._tables import LEARNED, Coefficients, clip_of
from diffkern.ops import HALF_BIN, VARIATIONAL_COLUMNS


def error_rows(c: Coefficients, what: str) -> Tensor:
    """Of `ops.loss`: the square of m minus its target; "eps": of the eps that follows from m as x0."""
    s, n = c["sqrt_alphas_cumprod"].double(), c["sqrt_one_minus_alphas_cumprod"].double()
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    if what == "EPSILON":
        u, v, weight = zero, one, one
    elif what == "PREVIOUS_X":
        c1, c2 = c.posterior()
        u, v, weight = c1 + c2 * s, c2 * n, one
    elif what == "eps":  # (P x_t - m)/Q - eps with x_t = s x0 + n eps
        p, q = c.to_eps
        u, v, weight = p * s, p * n - q, q**-2
    else:
        u, v, weight = one, zero, one
    return torch.stack([u, v, weight], 1)


def bound_rows(c: Coefficients, mean: str, variance: str, clip: bool, frozen: bool, decodes: bool) -> Tensor:
    """Of `ops.variational` with x_t as its noise: the bound in bits; ``decodes``: with the decoder's at t = 0.

    x0' = p x_t + q m is written as x0 + q (m - u x0 - v x_t), with u = 1/q and v = -p/q.
    """
    p, q = c.to_x0(mean)
    u, v = 1 / q, -p / q
    if mean == "PREVIOUS_X":  # the error is that of the mean, whose factors are not those of x0 once rounded
        u, v = c.posterior()
        q = 1 / u
    low = c["posterior_log_variance_clipped"].double()
    if variance in LEARNED:
        r0, r1 = c.log_range(variance)
    else:
        r0, r1 = c.variance(variance)[1].double(), torch.zeros_like(low)
    inv_std = torch.zeros_like(low)
    if decodes:
        inv_std[0] = torch.exp(-low[0] / 2)
    columns = {
        "u": u,
        "v": v,
        "q": q,
        # The mean of PREVIOUS_X is the output itself, which no clip touches.
        "clip": torch.full_like(low, math.inf if mean == "PREVIOUS_X" else clip_of(clip)),
        "k2": c["posterior_mean_coef1"].double() ** 2 * torch.exp(-low),
        "r0": r0 - low,
        "r1": r1,
        "inv_std": inv_std,
        "bin": torch.full_like(low, HALF_BIN),
        "w_squares": torch.zeros_like(low),
        "w_bound": torch.ones_like(low),
        "w_mean": torch.full_like(low, 0.0 if frozen else 1.0),
    }
    return torch.stack([columns[name] for name in VARIATIONAL_COLUMNS], 1)

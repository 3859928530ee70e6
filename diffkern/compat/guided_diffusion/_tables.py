"""Rows of coefficients for the ops, from guided-diffusion's tables over t = 0 .. T - 1.

The originals read float64 tables and round every coefficient to float32 before they work with it. So do these rows
(``exact`` leaves them in float64): the numbers that come out are the same in every dtype of the state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.compat.kit.rows import as_dtype, table_of
from diffkern.plan import LEARNED_COLUMNS

Tables = Mapping[str, Any]
"""The attributes of a GaussianDiffusion: float64 arrays of length T by name."""

EPS_AT_PURE_NOISE = 2.0**-24
"""abar in place of 0 where a formula divides by it: the value that diffusers writes there."""

MEANS = ("PREVIOUS_X", "START_X", "EPSILON")
LEARNED = ("LEARNED", "LEARNED_RANGE")
FIXED = ("FIXED_SMALL", "FIXED_LARGE")


def posterior_tables(betas: np.ndarray) -> dict[str, np.ndarray]:
    """All tables of a chain with these betas, float64 [T]. arXiv 2006.11239, eq. 4, 6 and 7."""
    alphas = 1.0 - betas
    abar = np.cumprod(alphas, axis=0)
    before, after = np.append(1.0, abar[:-1]), np.append(abar[1:], 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):  # abar = 0: pure noise has no 1 / abar
        variance = betas * (1.0 - before) / (1.0 - abar)
        return {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": before,
            "alphas_cumprod_next": after,
            "sqrt_alphas_cumprod": np.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - abar),
            "log_one_minus_alphas_cumprod": np.log(1.0 - abar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / abar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / abar - 1),
            "posterior_variance": variance,
            # The variance of t = 0 is 0; that of t = 1 stands for it (that of a single step is its beta).
            "posterior_log_variance_clipped": np.log(np.append(first_variance(variance, betas), variance[1:])),
            "posterior_mean_coef1": betas * np.sqrt(before) / (1.0 - abar),
            "posterior_mean_coef2": (1.0 - before) * np.sqrt(alphas) / (1.0 - abar),
        }


def first_variance(variance: np.ndarray, betas: np.ndarray) -> float:
    """What stands for the posterior variance of t = 0."""
    return float(variance[1] if len(variance) > 1 else betas[0])


NAMES = frozenset(posterior_tables(np.array([0.5, 0.5])))
"""The tables' names."""


class Coefficients:
    """One chain's coefficients, each a tensor [T] in float32 or, where ``exact``, float64."""

    def __init__(self, tables: Tables, exact: bool) -> None:
        self.tables, self.dtype = tables, torch.float64 if exact else torch.float32
        self.T = len(tables["betas"])
        self.later = torch.ones(self.T, dtype=torch.float64)
        self.later[0] = 0.0  # no noise is added when t is 0

    def __getitem__(self, name: str) -> Tensor:
        return self.rounded(self.tables[name])

    def rounded(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.float64)).to(self.dtype)

    @property
    def to_eps(self) -> tuple[Tensor, Tensor]:
        """(P, Q), float64: x0 = P x - Q eps and eps = (P x - x0)/Q."""
        p, q = self["sqrt_recip_alphas_cumprod"].double(), self["sqrt_recipm1_alphas_cumprod"].double()
        blank = torch.as_tensor(np.asarray(self.tables["alphas_cumprod"]) == 0)
        p = torch.where(blank, EPS_AT_PURE_NOISE**-0.5, p)
        return p, torch.where(blank, (1 / EPS_AT_PURE_NOISE - 1) ** 0.5, q)

    def to_x0(self, mean: str) -> tuple[Tensor, Tensor]:
        """(p, q), float64: x0 = p x + q m for a model whose output is ``mean``; "given": m is x0."""
        if mean == "EPSILON":
            p, q = self.to_eps
            return p, -q
        if mean == "PREVIOUS_X":
            c1, c2 = (np.asarray(self.tables[f"posterior_mean_coef{i}"]) for i in (1, 2))
            return -self.rounded(c2 / c1).double(), self.rounded(1.0 / c1).double()
        return torch.zeros(self.T, dtype=torch.float64), torch.ones(self.T, dtype=torch.float64)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """(c1, c2), float64: the mean c1 x0 + c2 x of q(x_{t-1} | x_t, x0)."""
        return self["posterior_mean_coef1"].double(), self["posterior_mean_coef2"].double()

    def variance(self, kind: str) -> tuple[Tensor, Tensor]:
        """(variance, log-variance) of a fixed kind."""
        small = np.asarray(self.tables["posterior_variance"])
        if kind == "FIXED_SMALL":
            return self.rounded(small), self["posterior_log_variance_clipped"]
        betas = np.asarray(self.tables["betas"])
        large = np.append(first_variance(small, betas), betas[1:])
        return self.rounded(large), self.rounded(np.log(large))

    def log_range(self, kind: str) -> tuple[Tensor, Tensor]:
        """(r0, r1), float64: the learned log-variance is r0 + r1 v. arXiv 2102.09672, eq. 15, v in [-1, 1]."""
        if kind == "LEARNED":
            return torch.zeros(self.T, dtype=torch.float64), torch.ones(self.T, dtype=torch.float64)
        low = self["posterior_log_variance_clipped"].double()
        high = self.rounded(np.log(np.asarray(self.tables["betas"]))).double()
        return (high + low) / 2, (high - low) / 2

    def std(self, kind: str) -> Tensor:
        """exp(log-variance / 2), 0 at t = 0."""
        return torch.exp(0.5 * self.variance(kind)[1]).double() * self.later


def rows(count: int, **columns: Any) -> Tensor:
    """float64 [count, 23], the columns of `LEARNED_COLUMNS`."""
    return table_of(count, LEARNED_COLUMNS, **columns)


def plain(table: Tensor) -> Tensor:
    """The rows without r0 and r1: those of `ops.step`."""
    return table[:, :-2].contiguous()


def clip_of(clip: bool) -> float:
    return 1.0 if clip else math.inf


# ------------------------------------------------------------------------------------------------- sampler steps
def mean_rows(c: Coefficients, mean: str, clip: bool) -> Tensor:
    """The model's mean of x_{t-1}, and x0."""
    return plain(rows(c.T, **_mean_columns(c, mean, clip)))


def _mean_columns(c: Coefficients, mean: str, clip: bool) -> dict[str, Any]:
    p, q = c.to_x0(mean)
    if mean == "PREVIOUS_X":  # its mean is the output itself
        return {"p": p, "q": q, "clip": clip_of(clip), "d": 1.0}
    c1, c2 = c.posterior()
    return {"p": p, "q": q, "clip": clip_of(clip), "a": c2, "b": c1}


def p_rows(c: Coefficients, mean: str, variance: str, clip: bool) -> Tensor:
    """x_{t-1} = mean + std z for a fixed variance, plus variance h0 where a classifier's gradient h0 is given."""
    return plain(rows(c.T, **_mean_columns(c, mean, clip), g=c.std(variance)))


def guided_p_rows(c: Coefficients, mean: str, variance: str, clip: bool) -> Tensor:
    """`p_rows` with the mean moved by variance h0, h0 the gradient of a classifier. arXiv 2105.05233, algorithm 1."""
    return plain(rows(c.T, **_mean_columns(c, mean, clip), g=c.std(variance), e0=c.variance(variance)[0].double()))


def learned_rows(c: Coefficients, mean: str, variance: str, clip: bool) -> Tensor:
    """x_{t-1} = mean + exp((r0 + r1 v)/2) z."""
    r0, r1 = c.log_range(variance)
    return rows(c.T, **_mean_columns(c, mean, clip), g=c.later, r0=r0, r1=r1)


def deviation_rows(c: Coefficients, variance: str, power: int) -> Tensor:
    """x + exp(power (r0 + r1 v)/2) z, at t = 0 too where power is 2: noise or a gradient times the variance."""
    r0, r1 = c.log_range(variance)
    return rows(c.T, a=1.0, g=c.later if power == 1 else 1.0, r0=power * r0, r1=power * r1)


def x0_rows(c: Coefficients, mean: str, clip: bool) -> Tensor:
    """x' = x0."""
    p, q = c.to_x0(mean)
    return plain(rows(c.T, p=p, q=q, clip=clip_of(clip), b=1.0))


def guided_x0_rows(c: Coefficients, mean: str, clip: bool) -> Tensor:
    """x0 after eps has become eps - sqrt(1 - abar) h0: x0 + Q sqrt(1 - abar) h0. arXiv 2105.05233, algorithm 2."""
    p, q = c.to_x0(mean)
    shift = c.to_eps[1] * (1 - c["alphas_cumprod"]).sqrt().double()
    return plain(rows(c.T, p=p, q=q, clip=clip_of(clip), b=1.0, e0=shift))


def ddim_rows(c: Coefficients, mean: str, clip: bool, eta: float) -> Tensor:
    """sqrt(abar_s) x0 + sqrt(1 - abar_s - sd^2) eps + sd z, s = t - 1, eps of the clipped x0. 2010.02502, eq. 12."""
    abar, to = c["alphas_cumprod"], c["alphas_cumprod_prev"]
    # In the original's order: differences of float32 numbers near 1 carry their rounding along.
    std = eta * torch.sqrt((1 - to) / (1 - abar)) * torch.sqrt(1 - abar / to)
    if not bool(torch.isfinite(std).all()):  # 0/0 where float32 has abar = 1
        abar, to = (torch.as_tensor(np.asarray(c.tables[f"alphas_cumprod{end}"])) for end in ("", "_prev"))
        exact = eta * torch.sqrt((1 - to) / (1 - abar)) * torch.sqrt((1 - abar / to).nan_to_num(0.0))
        std = torch.where(torch.isfinite(std), std.double(), exact).to(c.dtype)
        to = to.to(c.dtype)
    along = (1 - to - std**2).clamp(min=0.0).sqrt()  # the original has NaN where eta is above 1
    return _ddim(c, mean, clip, to, along, std.double() * c.later)


def reverse_rows(c: Coefficients, mean: str, clip: bool) -> Tensor:
    """sqrt(abar_u) x0 + sqrt(1 - abar_u) eps, u = t + 1: DDIM's ODE towards noise. arXiv 2010.02502, section 4.3."""
    to = c["alphas_cumprod_next"]
    return _ddim(c, mean, clip, to, (1 - to).sqrt(), 0.0)


def _ddim(c: Coefficients, mean: str, clip: bool, to: Tensor, along: Tensor, std: Tensor | float) -> Tensor:
    p, q = c.to_x0(mean)
    to_p, to_q = c.to_eps
    share = along.double() / to_q
    return plain(rows(c.T, p=p, q=q, clip=clip_of(clip), a=share * to_p, b=to.sqrt().double() - share, g=std))


def linear_rows(c: Coefficients, what: str) -> Tensor:
    """x' = a x + d m for the conversions between x0, eps and means."""
    if what == "posterior":
        c1, c2 = c.posterior()
        return plain(rows(c.T, a=c2, d=c1))
    if what == "eps":
        p, q = c.to_eps
        return plain(rows(c.T, a=p / q, d=-1 / q))
    p, q = c.to_x0(what)
    return plain(rows(c.T, a=p, d=q))


def noising_rows(c: Coefficients) -> Tensor:
    """Of `ops.noising`: x_t = sqrt(abar) x0 + sqrt(1 - abar) eps."""
    s, n = c["sqrt_alphas_cumprod"].double(), c["sqrt_one_minus_alphas_cumprod"].double()
    return torch.stack([s, n, torch.zeros_like(s), torch.zeros_like(s)], 1)


# -------------------------------------------------------------------------------------------------------- columns
def column_of(c: Coefficients, name: str, dtype: torch.dtype | None) -> Tensor:
    """[T]: a table of the diffusion, r0 or r1 of a variance LEARNED_RANGE (in ``dtype``), a fixed kind's variance."""
    if name == "one_minus_alphas_cumprod":
        return c.rounded(1.0 - np.asarray(c.tables["alphas_cumprod"]))
    if name in ("r0", "r1"):
        return as_dtype(c.log_range("LEARNED_RANGE")[int(name == "r1")], dtype or c.dtype)
    if name.endswith("variance") and name.split()[0] in FIXED:
        return c.variance(name.split()[0])[int(name.endswith("log-variance"))]
    return c[name]

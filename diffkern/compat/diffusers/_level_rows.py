"""The columns of rows that go from one noise level to another (arXiv 2206.00364): x = x0 + sigma z."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.compat.kit.rows import table_of


def churned(levels: Tensor, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> tuple[Tensor, Tensor]:
    """(sigma_hat, n), [steps]: x_hat = x + n z at sigma_hat = (1 + gamma) sigma (arXiv 2206.00364, algorithm 2)."""
    sigma = levels[:-1]
    gamma = min(s_churn / (len(levels) - 1), 2**0.5 - 1)
    inside = (sigma.float() >= s_tmin) & (sigma.float() <= s_tmax)  # in the original's float32
    hat = torch.where(inside & torch.tensor(gamma > 0), sigma * (1 + gamma), sigma)
    return hat, s_noise * (hat**2 - sigma**2) ** 0.5


def euler_rows(levels: Tensor, prediction: str, hat: Tensor, n: Tensor, at: Tensor, to: Tensor) -> Tensor:
    """x' = x_hat + (x_hat - x0) (to - hat)/hat with x_hat = x + n z; x0 from x_hat and the model, which v takes at the
    level ``at``: [steps, 21]. A step from 0 to 0 is the identity."""
    known = {"known_s": 1.0, "known_n": levels[1:]}
    if prediction == "epsilon":
        return table_of(len(hat), p=1.0, q=-hat, r=n, a=1.0, d=to - hat, g=n, **known)
    p, q = to_x0(prediction, at)
    return table_of(len(hat), p=p, q=q, r=n * p, **along(hat, to, n), **known)


def to_x0(prediction: str, at: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) of x0 = p x + q m for x = x0 + sigma z at the levels ``at``, [steps]."""
    if prediction == "epsilon":
        return torch.ones_like(at), -at
    if prediction == "v_prediction":
        return 1 / (at**2 + 1), -at / (at**2 + 1) ** 0.5
    return torch.zeros_like(at), torch.ones_like(at)


def inverse(sigma: Tensor) -> Tensor:
    """1 / sigma, and 0 for 0: no slope where no step is."""
    return torch.where(sigma > 0, 1 / sigma, torch.zeros_like(sigma))


def along(hat: Tensor, to: Tensor, n: Tensor) -> dict[str, Tensor]:
    """x' = (to/hat) x_hat + (1 - to/hat) x0: the columns a, b, g."""
    a = torch.where(hat > 0, to / hat, torch.ones_like(hat))
    return {"a": a, "b": 1 - a, "g": n * a}

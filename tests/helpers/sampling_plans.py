"""Plans and exact models that the tests of the loop share."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.plan import Plan, Row
from helpers.sampling_cases import network

# Everything the loop must handle at once: every kind of history, a row without a model call, noise after the model.
ODD = Plan(
    "odd",
    (
        Row(p=1.0, q=-0.5, a=0.7, d=0.2, A=0.3, D=0.4, saves=((0, "s"), (2, "x0")), time=3.0, k=0.9),
        Row(p=0.5, q=0.1, r=0.3, b=0.8, e0=0.5, g=0.1, saves=((1, "x"),), time=2.0, k=0.5, stream=5),
        Row(a=0.9, e1=0.2, g=0.4, calls_model=False, ends_step=False, stream=6, k=1.1),
        Row(p=0.2, q=0.4, a=0.5, b=0.3, d=0.1, B=0.6, e0=-0.3, e2=0.7, saves=((0, "s"), (3, "x0")), time=1.0),
        Row(q=1.0, b=0.2, e0=0.4, e1=0.1, e2=0.2, e3=0.3, time=0.0),
    ),
    first_k=0.8,
)


def near(got: Tensor, want: Tensor, tol: float = 1e-6) -> None:
    """float32 times (tables of float64 are exact) are the only difference from the oracle."""
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


# --- guidance --------------------------------------------------------------------------------------------------------


def conditional(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    return network(x, t) + 0.2 * cond.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)

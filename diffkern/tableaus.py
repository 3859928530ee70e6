"""Explicit Runge-Kutta steps, by their tableaus."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Tableau(NamedTuple):
    """k_i = u(t + c_i h, y + h sum_j a_ij k_j); the step is h sum_i b_i k_i."""

    order: int
    nodes: tuple[float, ...]
    """c."""
    coupling: tuple[tuple[float, ...], ...]
    """a, row i with i entries."""
    weights: tuple[float, ...]
    """b."""
    error: tuple[float, ...] = ()
    """b minus the weights of the embedded method of one order less, over the stages and u at the step's end."""


EULER = Tableau(1, (0.0,), ((),), (1.0,))
MIDPOINT = Tableau(2, (0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0))
HEUN = Tableau(2, (0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2))
HEUN3 = Tableau(3, (0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4))
RK4 = Tableau(4, (0.0, 1 / 2, 1 / 2, 1.0), ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
RK4_38 = Tableau(
    4, (0.0, 1 / 3, 2 / 3, 1.0), ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
)
DORMAND_PRINCE = Tableau(
    5,
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)
"""Dormand and Prince 1980, order 5 with an error estimate of order 4."""

_SHAMPINE = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300)
SHAMPINE_ERROR = (*(b - lower for b, lower in zip(DORMAND_PRINCE.weights, _SHAMPINE, strict=True)), -1 / 60)
"""`DORMAND_PRINCE.error` with the weights of order 4 of Shampine 1986, which torchdiffeq has: about 3/2 of it."""

Slope = Callable[[Tensor, Tensor], Tensor]


def stages(
    slope: Slope, y: Tensor, t: Tensor, h: Tensor, wide: Tensor, tableau: Tableau, first: Tensor
) -> list[Tensor]:
    """k_1 = `first`, k_2, ...; h is in the shape of t, `wide` the same step shaped to multiply y."""
    ks = [first]
    for node, row in zip(tableau.nodes[1:], tableau.coupling[1:], strict=True):
        ks.append(slope(y + wide * combine(row, ks), t + node * h))
    return ks


def combine(weights: tuple[float, ...], ks: list[Tensor]) -> Tensor:
    """sum_i weights_i k_i over the weights that are not 0."""
    terms = [weight * k for weight, k in zip(weights, ks, strict=True) if weight != 0.0]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def step(slope: Slope, y: Tensor, t: Tensor, h: Tensor, wide: Tensor, tableau: Tableau) -> Tensor:
    """y after one step of h."""
    return y + wide * combine(tableau.weights, stages(slope, y, t, h, wide, tableau, slope(y, t)))

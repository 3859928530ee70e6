"""Functions of the exponential integrators, in Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence


def phi(k: int, z: float) -> float:
    """phi_k(z) = int_0^1 e^((1-u) z) u^(k-1)/(k-1)! du for k >= 1; phi_0 = e^z; phi_k(0) = 1/k!.

    By phi_{k+1} = (phi_k - 1/k!)/z away from 0, by the series near it, where that would cancel. z = -inf gives 0.
    """
    if k == 0:
        return math.exp(z)
    if z == -math.inf:
        return 0.0
    if abs(z) < 1.0:
        term = total = 1.0 / math.factorial(k)
        for j in range(1, 25):
            term *= z / (k + j)
            total += term
        return total
    if k == 1:
        return math.expm1(z) / z
    return (phi(k - 1, z) - 1.0 / math.factorial(k - 1)) / z


def lagrange(points: Sequence[float]) -> list[list[float]]:
    """The polynomials l_j with l_j(points[i]) = (i == j), each as coefficients of u^0, u^1, ...; points must differ."""
    found = []
    for j, here in enumerate(points):
        poly = [1.0]
        for i, other in enumerate(points):
            if i != j:
                scale = 1.0 / (here - other)
                poly = [
                    scale * ((poly[n - 1] if n else 0.0) - other * (poly[n] if n < len(poly) else 0.0))
                    for n in range(len(poly) + 1)
                ]
        found.append(poly)
    return found


def exponential_weights(points: Sequence[float], z: float) -> list[float]:
    """w_j = int_0^1 e^((1-u) z) l_j(u) du for the Lagrange polynomials of ``points``; z = 0 is Adams-Bashforth."""
    moments = [math.factorial(n) * phi(n + 1, z) for n in range(len(points))]
    return [math.fsum(c * m for c, m in zip(poly, moments, strict=True)) for poly in lagrange(points)]

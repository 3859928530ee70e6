"""Functions of the exponential integrators, of many steps at once; bits as those of Python's floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from diffkern.samplers._arrays import Array, each, exact_sum


def phi(k: int, z: Array | float) -> Array:
    """phi_k(z) = int_0^1 e^((1-u) z) u^(k-1)/(k-1)! du for k >= 1; phi_0 = e^z; phi_k(0) = 1/k!. Of each entry of z.

    By phi_{k+1} = (phi_k - 1/k!)/z away from 0, by the series near it, where that would cancel. z = -inf gives 0.
    """
    z = np.asarray(z, np.float64)
    if k == 0:
        return each(math.exp, z)
    found = np.zeros_like(z)
    near = np.abs(z) < 1.0
    if near.any():
        term = np.full(int(near.sum()), 1.0 / math.factorial(k))
        total = term.copy()
        for j in range(1, 25):
            term *= z[near] / (k + j)
            total += term
        found[near] = total
    far = ~near & (z != -math.inf)
    if far.any():
        by = z[far]
        found[far] = (each(math.expm1, by) if k == 1 else phi(k - 1, by) - 1.0 / math.factorial(k - 1)) / by
    return found


def lagrange(points: Sequence[Array | float]) -> list[list[Array | float]]:
    """The polynomials l_j with l_j(points[i]) = (i == j), each as coefficients of u^0, u^1, ...; points must differ."""
    found = []
    for j, here in enumerate(points):
        poly: list[Array | float] = [1.0]
        for i, other in enumerate(points):
            if i != j:
                scale = 1.0 / (here - other)
                poly = [
                    scale * ((poly[n - 1] if n else 0.0) - other * (poly[n] if n < len(poly) else 0.0))
                    for n in range(len(poly) + 1)
                ]
        found.append(poly)
    return found


def exponential_weights(points: Sequence[Array | float], z: Array | float) -> list[Array]:
    """w_j = int_0^1 e^((1-u) z) l_j(u) du for the Lagrange polynomials of ``points``; z = 0 is Adams-Bashforth."""
    moments = [math.factorial(n) * phi(n + 1, z) for n in range(len(points))]
    return [exact_sum([c * m for c, m in zip(poly, moments, strict=True)]) for poly in lagrange(points)]

"""Fit the polynomials of csrc/core/gaussian.h (exp, the scaled normal tail) and silu.h (exp), print them, their errors.

The tail R(x) = Q(x) exp(x^2 / 2), Q(x) = P(normal > x), falls as 1 / x; (x + 4) R(x) is smooth in y = (x - 4) / (x + 4)
over the whole half line, and its Chebyshev series converges fast. mpmath gives the values (pip install mpmath).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
from numpy.polynomial import chebyshev

mp.mp.dps = 40
Function = Callable[[Any], Any]


def tail(x: Any) -> Any:
    """R(x), by its asymptotic series where exp(x^2 / 2) would be huge."""
    if x < 60:
        return mp.erfc(x / mp.sqrt(2)) * mp.exp(x * x / 2) / 2
    terms, total = mp.mpf(1), mp.mpf(0)
    for k in range(40):
        total += terms
        terms *= -(2 * k + 1) / x**2
    return total / (x * mp.sqrt(2 * mp.pi))


def scaled_tail(y: Any) -> Any:
    """(x + 4) R(x) at y = (x - 4) / (x + 4)."""
    x = 4 * (1 + y) / (1 - y)
    return tail(x) * (x + 4)


def exp_rest(f: Any) -> Any:
    """(exp f - 1 - f) / f^2."""
    return mp.nsum(lambda k: f**k / mp.factorial(k + 2), [0, 30])


def fit(name: str, function: Function, half_width: float, degree: int, dtype: type) -> None:
    """Chebyshev interpolation on [-half_width, half_width], as ascending powers rounded to `dtype`."""
    nodes = 2 * degree + 20
    at = [mp.cos(mp.pi * (mp.mpf(j) + mp.mpf(1) / 2) / nodes) for j in range(nodes)]
    values = [function(half_width * y) for y in at]
    series = [
        (2 if m else 1) * mp.fsum(v * mp.cos(m * mp.acos(y)) for y, v in zip(at, values, strict=True)) / nodes
        for m in range(degree + 1)
    ]
    powers = chebyshev.cheb2poly(np.array([float(c) for c in series])) / half_width ** np.arange(degree + 1)
    rounded = powers.astype(dtype)
    error = max(
        abs(sum(float(c) * float(half_width * y) ** k for k, c in enumerate(rounded)) / float(v) - 1)
        for y, v in zip(at, values, strict=True)
    )
    print(f"{name}, {dtype.__name__}: max relative error {error:.2e}, ascending powers")
    suffix = "f" if dtype is np.float32 else ""
    print("    " + ", ".join(f"{c:.{9 if suffix else 17}g}{suffix}" for c in rounded))


def fit_exp_from_one(half_width: float, degree: int) -> None:
    """1 + c1 f + ... of the least largest relative error against exp f, by Remez' exchange; float32."""
    grid = [half_width * mp.cos(mp.pi * mp.mpf(j) / 1999) for j in range(2000)]
    nodes = [half_width * mp.cos(mp.pi * (mp.mpf(j) + mp.mpf(1) / 2) / (degree + 1)) for j in range(degree + 1)]
    for _ in range(8):
        # The error is 0 at 0, so that what alternates is the error by the sign of f.
        rows = [
            [f**k for k in range(1, degree + 1)] + [(-1) ** j * mp.sign(f) * mp.exp(f)] for j, f in enumerate(nodes)
        ]
        solved = mp.lu_solve(mp.matrix(rows), mp.matrix([mp.exp(f) - 1 for f in nodes]))
        powers = [mp.mpf(1), *solved[:degree]]
        errors = [mp.sign(f) * (mp.polyval(powers[::-1], f) / mp.exp(f) - 1) for f in grid]
        runs: list[list[int]] = []  # of one sign: an extreme of each is a node of the next round
        for j, error in enumerate(errors):
            if runs and (error > 0) == (errors[runs[-1][0]] > 0):
                runs[-1].append(j)
            else:
                runs.append([j])
        nodes = [grid[max(run, key=lambda j: abs(errors[j]))] for run in runs]
    rounded = [np.float32(float(c)) for c in powers]
    error = max(abs(mp.fsum(mp.mpf(float(c)) * f**k for k, c in enumerate(rounded)) / mp.exp(f) - 1) for f in grid)
    print(f"exp from 1, float32: max relative error {float(error):.2e}, ascending powers")
    print("    " + ", ".join(f"{c:.9g}f" for c in rounded))


def main() -> None:
    half_ln2 = float(mp.log(2) / 2) * 1.01
    fit("exp", exp_rest, half_ln2, 5, np.float32)
    fit("exp", exp_rest, half_ln2, 11, np.float64)
    fit_exp_from_one(float(mp.log(2) / 2), 5)
    fit("tail", scaled_tail, 1.0, 10, np.float32)
    fit("tail", scaled_tail, 1.0, 26, np.float64)


if __name__ == "__main__":
    main()

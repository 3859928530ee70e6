"""Fit the polynomials of csrc/core/normal.h (ln, sin, cos) and print them as float32 literals with their error.

Minimax by iteratively reweighted least squares in float64 (Lawson), then each coefficient is rounded to float32 and
the remaining ones are refitted, so that rounding errors of the leading terms are absorbed by the later ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def minimax(basis: Array, target: Array, weight: Array, rounds: int = 300) -> Array:
    """Coefficients minimising max |weight * (basis @ c - target)|."""
    lawson = np.full(len(target), 1.0 / len(target))
    coefficients = np.zeros(basis.shape[1])
    for _ in range(rounds):
        scale = np.sqrt(lawson) * weight
        coefficients = np.linalg.lstsq(basis * scale[:, None], target * scale, rcond=None)[0]
        error = np.abs(weight * (basis @ coefficients - target))
        lawson *= error + 1e-300
        lawson /= lawson.sum()
    return coefficients


def fit(
    name: str, x: Array, target: Array, weight: Array, powers: list[int], variable: Callable[[Array], Array]
) -> None:
    basis = np.stack([variable(x) ** p for p in powers], axis=1)
    rest = target.copy()
    rounded: list[float] = []
    for k in range(len(powers)):
        c = minimax(basis[:, k:], rest, weight)
        rounded.append(float(np.float32(c[0])))
        rest = rest - basis[:, k] * rounded[-1]
    print(f"{name}: max relative error {np.max(np.abs(weight * rest)):.2e}")
    print("   ", ", ".join(f"{c:.9g}f" for c in rounded), " // ascending powers")


def main() -> None:
    # ln(1+f) = f + f^2 P(f) on [sqrt(1/2)-1, sqrt(2)-1], relative to ln(1+f)
    f = np.cos(np.pi * (np.arange(4000) + 0.5) / 4000)
    lo, hi = np.sqrt(0.5) - 1, np.sqrt(2.0) - 1
    f = (f + 1) / 2 * (hi - lo) + lo
    p = (np.log1p(f) - f) / f**2
    fit("ln", f, p, np.abs(f**2 / np.log1p(f)), list(range(8)), lambda x: x)
    t = (np.cos(np.pi * (np.arange(4000) + 0.5) / 4000) + 1) / 2 * np.pi / 4 + 1e-9
    # sin t = t + t^3 S(t^2), cos t = 1 + t^2 C(t^2)
    fit("sin", t, (np.sin(t) - t) / t**3, t**3 / np.sin(t), list(range(3)), lambda x: x * x)
    fit("cos", t, (np.cos(t) - 1) / t**2, t**2 / np.cos(t), list(range(4)), lambda x: x * x)


if __name__ == "__main__":
    main()

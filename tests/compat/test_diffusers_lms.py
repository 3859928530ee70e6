"""LMS: the coefficients beside exact fractions, where the original's quadrature of nearby levels is off."""

from __future__ import annotations

from fractions import Fraction

import pytest
from helpers.diffusers_runs import pair
from helpers.lazy import needs

pytestmark = needs("diffusers")


def integrals(levels: list[float], i: int, order: int) -> list[float]:
    """Of the Lagrange polynomials on levels i, i - 1, ... from level i to level i + 1, in fractions."""
    points, start, end = [Fraction(levels[i - k]) for k in range(order)], Fraction(levels[i]), Fraction(levels[i + 1])
    found = []
    for k, here in enumerate(points):
        poly = [Fraction(1)]
        for other in points[:k] + points[k + 1 :]:  # times (x - other)/(here - other)
            raised, scaled = [Fraction(0), *poly], [other * c for c in [*poly, Fraction(0)]]
            poly = [(a - b) / (here - other) for a, b in zip(raised, scaled, strict=True)]
        found.append(float(sum(c * (end ** (n + 1) - start ** (n + 1)) / (n + 1) for n, c in enumerate(poly))))
    return found


@pytest.mark.parametrize(
    ("steps", "theirs"),
    [(10, (5e-8, 2e-7)), (100, (1e-6, 7e-6)), pytest.param(1000, (1e-3, 6e-3), marks=pytest.mark.full)],
)
def test_coefficients_are_exact(steps: int, theirs: tuple[float, float]) -> None:
    """The largest error relative to the step: what docs/compat-diffusers.md says of the original, and ours."""
    config = {"use_karras_sigmas": True, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    original, ours = pair("LMSDiscreteScheduler", **config)
    for scheduler in (original, ours):
        scheduler.set_timesteps(steps)
    levels = original.sigmas.double().tolist()
    plan = ours.plan()
    errors: list[tuple[float, float]] = []
    for i in sorted({*range(min(steps, 12)), *range(max(steps - 4, 0), steps)}):
        order = min(i + 1, 4)
        right = integrals(levels, i, order)
        row = plan.rows[i]  # with an eps model d is c_0, and c_k is the weight of the slope in slot (i - k) mod 3
        own = [row.d, *((row.e0, row.e1, row.e2)[(i - k) % 3] for k in range(1, order))]
        quadrature = [float(original.get_lms_coefficient(order, i, k)) for k in range(order)]
        h = levels[i] - levels[i + 1]
        errors += [(abs(a - c) / h, abs(b - c) / h) for a, b, c in zip(quadrature, own, right, strict=True)]
    low, high = theirs
    assert low < max(a for a, _ in errors) <= high
    assert max(b for _, b in errors) < 1e-10

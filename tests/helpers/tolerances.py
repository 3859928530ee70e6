"""How far a result may be from the float64 reference: one rule and one table for all tests of the ops.

The rule: max|ours - exact| <= max(2 max|plain - exact|, floor) + rounding * max|exact|, where `plain` is the same
formula in plain PyTorch in the same dtype. The last term is the half unit in the last place that the store rounds away
(`plain` can be exact by luck, ours must round as well) and, in float32, what a fused multiply-add and a division may
differ in. `floor` is for results that come of sums: how exact a sum is in plain PyTorch depends on the order in which
this processor's library adds, so there the arithmetic itself has to say what any order may lose (`summed`).
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class Rounding(NamedTuple):
    """Allowed and measured worst rounding: (max|ours - exact| - 2 max|plain - exact|) / max|exact|."""

    allowed: float
    measured: float


# Half a unit in the last place is 2^-53, 2^-24, 2^-11, 2^-8. In float64 the reference rounds as well, and a loss in
# float32 is one number, where plain PyTorch is often lucky: some units. `measured` is the worst of all cases of
# test_noising, test_loss, test_step and test_step_grad.
TOLERANCES: dict[torch.dtype, Rounding] = {
    torch.float64: Rounding(allowed=2.0**-50, measured=4.6e-16),
    torch.float32: Rounding(allowed=2.0**-22, measured=1.6e-7),
    torch.float16: Rounding(allowed=2.0**-11, measured=2.9e-4),
    torch.bfloat16: Rounding(allowed=2.0**-8, measured=2.4e-3),
}
STATE_DTYPES = tuple(TOLERANCES)


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    """The one that rounds most."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


Size = TypeVar("Size", float, Tensor)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def summed(terms: int, size: Size, dtype: torch.dtype) -> Size:
    """The error of a sum of `terms` numbers that is added up in `dtype`, in any order: 2 sqrt(terms) u size.

    size: of terms of the same sign their sum; of terms with signs like those of independent normals (products of two
    such vectors) the root of the sum of their squares.
    """
    # An addition that gives the partial sum s rounds it by d s, |d| <= u (u: the unit roundoff; a fused multiply-add
    # rounds the same once, a product before it adds a rounding of a term, which is smaller than s). The sum is off by
    # the sum of all d s. Whatever the order, there are n - 1 additions. Worst case: all have the same sign, n u size
    # (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), which no data reaches. Roundings of data
    # are as good as independent with mean 0 and a variance of at most u^2 / 3 (d uniform in -u ... u; the model of
    # Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019). One after the other, the k-th
    # partial sum of terms of the same sign is about k / n of the sum, that of terms of random signs sqrt(k / n) of the
    # root of their squares; several chains side by side, as vectors make them, have smaller ones. So the error has a
    # standard deviation of sqrt(n) u size / 3, or sqrt(n / 6) u size: 2 sqrt(n) u size is 6 or 4.9 of them.
    return 2 * math.sqrt(terms) * unit_roundoff(dtype) * size


worst: dict[torch.dtype, float] = {}
"""The worst rounding met so far in this process."""


def check(
    ours: Tensor,
    exact: Tensor,
    plain: Tensor,
    what: str = "",
    dtype: torch.dtype | None = None,
    floor: Tensor | float = 0.0,
) -> None:
    """Asserts the rule. `dtype`: whose rounding applies, of `ours` unless given. NaN must be where `exact` has it.

    floor: an error that follows from the arithmetic (`summed`), one number or one an element. In float64, where `exact`
    is rounded as often as `ours`, sqrt(2) of what one computation has.
    """
    dtype = dtype or ours.dtype
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    ours, exact, plain = ours.detach().double(), exact.detach().double(), plain.detach().double()
    assert torch.equal(ours.isnan(), exact.isnan()), f"{what}: NaN in other places"
    if ours.numel() == 0:
        return
    ours, exact, plain = (torch.nan_to_num(t) for t in (ours, exact, plain))
    errors, baseline, size = (ours - exact).abs(), (plain - exact).abs().max().item(), exact.abs().max().item()
    allowed_each = torch.as_tensor(floor, dtype=torch.float64).nan_to_num(0.0, 0.0, 0.0).clamp(min=2 * baseline)
    beyond, error = (errors - allowed_each).max().item(), errors.max().item()
    rounding = beyond / size if size > 0 else (0.0 if beyond <= 0 else float("inf"))
    worst[dtype] = max(worst.get(dtype, -1.0), rounding)
    allowed = TOLERANCES[dtype].allowed
    assert rounding <= allowed, (
        f"{what}: error {error:.3g}, plain PyTorch {baseline:.3g}, floor up to {allowed_each.max().item():.3g}, "
        f"rounding {rounding:.3g} > {allowed:.3g}"
    )

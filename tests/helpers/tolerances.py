"""How far a result may be from the float64 reference: one rule and one table for all tests of the ops.

The rule: max|ours - exact| <= 2 max|plain - exact| + rounding * max|exact|, where `plain` is the same formula in plain
PyTorch in the same dtype. The second term is the half unit in the last place that the store rounds away (`plain` can
be exact by luck, ours must round as well) and, in float32, what a fused multiply-add and a division may differ in.
"""

from __future__ import annotations

from typing import NamedTuple

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


worst: dict[torch.dtype, float] = {}
"""The worst rounding met so far in this process."""


def check(ours: Tensor, exact: Tensor, plain: Tensor, what: str = "", dtype: torch.dtype | None = None) -> None:
    """Asserts the rule. `dtype`: whose rounding applies, of `ours` unless given. NaN must be where `exact` has it."""
    dtype = dtype or ours.dtype
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    ours, exact, plain = ours.detach().double(), exact.detach().double(), plain.detach().double()
    assert torch.equal(ours.isnan(), exact.isnan()), f"{what}: NaN in other places"
    if ours.numel() == 0:
        return
    ours, exact, plain = (torch.nan_to_num(t) for t in (ours, exact, plain))
    error, baseline = (ours - exact).abs().max().item(), (plain - exact).abs().max().item()
    size = exact.abs().max().item()
    rounding = (error - 2 * baseline) / size if size > 0 else (0.0 if error == 0 else float("inf"))
    worst[dtype] = max(worst.get(dtype, -1.0), rounding)
    allowed = TOLERANCES[dtype].allowed
    assert rounding <= allowed, (
        f"{what}: error {error:.3g}, plain PyTorch {baseline:.3g}, rounding {rounding:.3g} > {allowed:.3g}"
    )

"""Schedulers and limits that the tests of flow matching's paths share."""

from __future__ import annotations

from typing import Any

import torch

from helpers.flow_matching_oracle import exports

OURS = exports("diffkern.compat.flow_matching")
SCHEDULERS: dict[str, tuple[Any, ...]] = {
    "CondOTScheduler": (),
    "CosineScheduler": (),
    "LinearVPScheduler": (),
    "VPScheduler": (),
    "PolynomialConvexScheduler": (3,),
}
LIMITS = {torch.float32: 2e-6, torch.float64: 1e-12}

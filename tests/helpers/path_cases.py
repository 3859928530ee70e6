"""The continuous paths that the tests of schedules share."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from diffkern import schedules
from diffkern.schedules.base import Schedule


def cubic(t: Tensor) -> Tensor:
    return t**3


PATHS: dict[str, Schedule] = {
    "vp": schedules.vp(),
    "vp constant": schedules.vp(2.0, 2.0),
    "sub_vp": schedules.sub_vp(),
    "cosine_vp": schedules.cosine_vp(),
    "cosine_vp offset": schedules.cosine_vp(0.008),
    "laplace_vp": schedules.laplace_vp(),
    "laplace_vp moved": schedules.laplace_vp(1.0, 2.0, 1e-3),
    "linear_log_snr": schedules.linear_log_snr(),
    "ve": schedules.ve(),
    "ve_exponential": schedules.ve_exponential(),
    "ve_exponential 25": schedules.ve_exponential(25.0),
    "edm": schedules.edm(),
    "flow": schedules.flow(),
    "flow sigma_min": schedules.flow(0.1),
    "path cubic": schedules.path(cubic, lambda t: 1 - t**3),
    "path vp": schedules.path(lambda t: t, lambda t: (1 - t**2).sqrt(), time_eps=1e-3),
    "path to noise": schedules.path(lambda t: torch.cos(0.5 * math.pi * t), lambda t: torch.sin(0.5 * math.pi * t)),
    "path given slopes": schedules.path(
        lambda t: t, lambda t: 1 - t, alpha_slope=lambda t: 1.0, beta_slope=lambda t: -torch.ones_like(t)
    ),
    "log_snr_path": schedules.log_snr_path(lambda t: 8 - 16 * t + 2 * torch.sin(6 * t)),
}


def close(got: Tensor, want: object, rtol: float = 1e-12, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(got.detach()), np.asarray(want), rtol=rtol, atol=atol)

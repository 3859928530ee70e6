"""Affine paths x_t = alpha_t x_1 + sigma_t x_0 and the conversions between what a model may predict."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.compat.flow_matching.path._combine import Formula, asked, converted, differentiates, mixed_twice, shaped
from diffkern.compat.flow_matching.path.path import ProbPath
from diffkern.compat.flow_matching.path.path_sample import PathSample
from diffkern.compat.flow_matching.path.scheduler.scheduler import CondOTScheduler, Scheduler
from diffkern.compat.flow_matching.utils.utils import expand_tensor_like


class AffineProbPath(ProbPath):
    """x_t = alpha_t x_1 + sigma_t x_0 with the velocity alpha_t' x_1 + sigma_t' x_0 (arXiv 2412.06264, section 4.7).

    ``scheduler``: anything that gives alpha_t, sigma_t, d_alpha_t, d_sigma_t of a tensor of times, flow_matching's own
    included. Each conversion is one op; with the rates a, s and their derivatives a', s',

        u   = s'/s x + (a' - s' a/s) x_1  = a'/a x + (s' - a' s/a) eps,      x_1 = (x - s eps)/a,
        x_1 = (s' x - s u)/(s' a - s a'),    eps = (a' x - a u)/(a' s - a s'),      eps = (x - a x_1)/s

    t is [] for all samples, [B] or [B, 1, ...]; the rates are float64, as the scheduler rounded them.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def sample(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
        """x_t and dx_t at t [B], both by one op; noise x_0 and data x_1 [B, ...], in the wider dtype of all three.

        AssertionError for other shapes, ValueError for times at which a rate is NaN (on a GPU the result is).
        """
        self.assert_sample_shape(x_0, x_1, t)
        rates = shaped(*asked(self.scheduler, t), t)
        a, b = (x_0, x_1) if x_0.shape == x_1.shape else torch.broadcast_tensors(x_0, x_1)
        if differentiates(*rates):
            alpha, sigma, d_alpha, d_sigma = (expand_tensor_like(rate.to(t.dtype), a) for rate in rates)
            return PathSample(x_1=x_1, x_0=x_0, t=t, x_t=sigma * a + alpha * b, dx_t=d_sigma * a + d_alpha * b)
        alpha, sigma, d_alpha, d_sigma = rates
        table = torch.stack([sigma, alpha, d_sigma, d_alpha], 1).to(torch.float64)
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), t.dtype)
        try:
            x_t, dx_t = mixed_twice(a, b, table, dtype)
        except RuntimeError:
            wrong = t[table.isnan().any(1)].tolist()
            if not wrong:
                raise
            raise ValueError(f"t must be where the scheduler's rates are numbers, got NaN at t = {wrong}") from None
        return PathSample(x_1=x_1, x_0=x_0, t=t, x_t=x_t, dx_t=dx_t)

    def target_to_velocity(self, x_1: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity from the data prediction."""
        return self._converted(x_1, x_t, t, lambda a, s, da, ds: (ds / s, (da * s - ds * a) / s))

    def epsilon_to_velocity(self, epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity from the noise prediction."""
        return self._converted(epsilon, x_t, t, lambda a, s, da, ds: (da / a, (ds * a - da * s) / a))

    def velocity_to_target(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The data prediction from the velocity."""
        return self._converted(velocity, x_t, t, lambda a, s, da, ds: (ds / (ds * a - s * da), -s / (ds * a - s * da)))

    def epsilon_to_target(self, epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The data prediction from the noise prediction."""
        return self._converted(epsilon, x_t, t, lambda a, s, da, ds: (1.0 / a, -s / a))

    def velocity_to_epsilon(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise prediction from the velocity."""
        return self._converted(velocity, x_t, t, lambda a, s, da, ds: (da / (da * s - a * ds), -a / (da * s - a * ds)))

    def target_to_epsilon(self, x_1: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise prediction from the data prediction."""
        return self._converted(x_1, x_t, t, lambda a, s, da, ds: (1.0 / s, -a / s))

    def _converted(self, other: Tensor, x_t: Tensor, t: Tensor, formula: Formula) -> Tensor:
        return converted(self.scheduler, t, x_t, other, formula)


class CondOTProbPath(AffineProbPath):
    """x_t = t x_1 + (1 - t) x_0."""

    def __init__(self) -> None:
        super().__init__(CondOTScheduler())

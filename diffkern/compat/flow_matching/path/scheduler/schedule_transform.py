"""A trained velocity on another scheduler's path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.compat.flow_matching.path._combine import combined, rates_at
from diffkern.compat.flow_matching.path.scheduler.scheduler import Scheduler
from diffkern.compat.flow_matching.utils.model_wrapper import ModelWrapper


class ScheduleTransformedModel(ModelWrapper):
    """The velocity of ``new_scheduler``'s path from a model of ``original_scheduler``'s (arXiv 2412.06264).

    At r on the new path, t is where the original path has the same alpha/sigma, s = sigma_r/sigma_t, and

        u_r(x) = s'/s x + t' s u_t(x/s),    t' = sigma_t^2 (sigma_r alpha_r' - alpha_r sigma_r')
                                               / (sigma_r^2 (sigma_t alpha_t' - alpha_t sigma_t'))

    Two fused ops beside the model; the rates are float64, rounded as the schedulers gave them.
    """

    def __init__(self, velocity_model: ModelWrapper, original_scheduler: Scheduler, new_scheduler: Scheduler) -> None:
        super().__init__(velocity_model)
        self.original_scheduler, self.new_scheduler = original_scheduler, new_scheduler

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        """The velocity at x [B, ...] and the new path's time t, [] or [B]; the model is called as the original's is."""
        new = rates_at(self.new_scheduler, t)
        at = self.original_scheduler.snr_inverse((new[..., 0] / new[..., 1]).to(t.dtype))
        alpha_r, sigma_r, d_alpha_r, d_sigma_r = new.to(torch.float64).unbind(-1)
        alpha, sigma, d_alpha, d_sigma = rates_at(self.original_scheduler, at).to(torch.float64).unbind(-1)
        s = sigma_r / sigma
        rate = (sigma**2 * (sigma_r * d_alpha_r - alpha_r * d_sigma_r)) / (
            sigma_r**2 * (sigma * d_alpha - alpha * d_sigma)
        )
        slope = (d_sigma_r * sigma - sigma_r * d_sigma * rate) / sigma**2
        u = self.model(x=combined(t, x, 1.0 / s), t=at, **extras)
        return combined(t, x, slope / s, u, rate * s)

"""diffusers' DDIMInverseScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMInverseScheduler as Original
from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput
from torch import Tensor

from diffkern.compat.diffusers._engine import host, plan_of, table_of
from diffkern.compat.diffusers._times import FusedTimes, to_x0
from diffkern.plan import Plan


class DDIMInverseScheduler(FusedTimes, Original):
    """DDIM run towards the noise: from level t - T // steps, where the model is asked at t, up to level t."""

    initial_alpha_cumprod: Tensor

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True) -> Any:
        """One step, as the original's; ``timestep`` may also be one a sample, int [B]."""
        key, end = (self.num_inference_steps, self._dk_exact), self.initial_alpha_cumprod
        found: Any = self._dk_quick(model_output, timestep, sample, key, end)
        if found is None:
            row, index = self._dk_row(timestep, sample.device)
            table = self._dk_rows()
            found = self._dk_run(sample, model_output, table=table, row=row, index=index, want_x0=True)
            self._dk_warm(key, table, end)
        if not return_dict:
            return found[:2]
        return DDIMSchedulerOutput(prev_sample=found[0], pred_original_sample=found[1])

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`."""
        table = self._dk_rows()[self._dk_clock.timesteps.cpu()]
        return plan_of("ddim_inverse", table, self._dk_clock.times, self.config.prediction_type)

    def _dk_rows(self) -> Tensor:
        sources = (self._dk_clock, self.alphas_cumprod, self.initial_alpha_cumprod, self._internal_dict)
        return self._dk_cached(("rows", self.num_inference_steps, self._dk_exact), sources, self._dk_build)

    def _dk_build(self) -> Tensor:
        config, to = self.config, host(self.alphas_cumprod, self._dk_exact)
        rows = len(to)
        if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"prediction_type given as {config.prediction_type} must be one of `epsilon`, `sample`, or"
                " `v_prediction`"
            )
        before = torch.arange(rows) - config.num_train_timesteps // self.num_inference_steps
        if self._dk_exact:  # the level that the step before reached
            times = self._dk_clock.times
            for t, last in zip(times, [-1, *times[:-1]], strict=True):
                before[int(t)] = int(last)
        first = host(self.initial_alpha_cumprod, self._dk_exact)
        abar = torch.where(before >= 0, to[before.clamp(0, rows - 1)], first)
        along = ((1 - to) ** 0.5).double()
        p, q = to_x0(config.prediction_type, abar)
        alpha, sigma = (abar**0.5).double(), ((1 - abar) ** 0.5).double()
        zero = torch.zeros_like(along)
        a, d = zero, along
        if config.prediction_type == "sample":
            # At the clean level eps can not be had from x and x0 (the original divides 0 by 0): left out there.
            ratio = torch.where(sigma > 0, along / sigma, zero)
            a, d = ratio, -ratio * alpha
        elif config.prediction_type == "v_prediction":
            a, d = along * sigma, along * alpha
        clip = config.clip_sample_range if config.clip_sample else float("inf")
        known = {"known_s": (to**0.5).double(), "known_n": along}
        table = table_of(rows, p=p, q=q, clip=clip, a=a, b=(to**0.5).double(), d=d, **known)
        self._dk_streams(table)
        return table

"""diffusers' DDIMScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler as Original
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from diffkern.compat.diffusers._engine import host, plan_of, table_of
from diffkern.compat.diffusers._plans import thresholded
from diffkern.compat.diffusers._times import FusedVP, to_x0
from diffkern.plan import Plan


class DDIMScheduler(FusedVP, Original):
    """x' = sqrt(abar_s) x0 + sqrt(1 - abar_s - sd^2) eps + sd z with sd = eta sqrt(beta_tilde), arXiv 2010.02502.

    The previous timestep s is t - T // steps as in the original; ``diffkern(exact=True)`` takes the schedule's next.
    """

    final_alpha_cumprod: Tensor

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step, as the original's; ``timestep`` may also be one a sample, int [B]."""
        if self.num_inference_steps is None:
            raise ValueError(
                "Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler"
            )
        key = (self.num_inference_steps, self._dk_exact, eta, use_clipped_model_output)
        found: Any = self._dk_quick(model_output, timestep, sample, key, self.final_alpha_cumprod)
        if found is not None:
            if not return_dict:
                return found[:2]
            return DDIMSchedulerOutput(prev_sample=found[0], pred_original_sample=found[1])
        row, index = self._dk_row(timestep, sample.device)
        table = self._dk_rows(float(eta), bool(use_clipped_model_output))
        noise = seeds = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError(
                    "Cannot pass both generator and variance_noise. Please make sure that either `generator` or"
                    " `variance_noise` stays `None`."
                )
            noise = variance_noise
            if noise is None:
                noise, seeds = self._dk_noise(model_output, generator)
        operands: dict[str, Any] = {"table": table, "row": row, "index": index, "noise": noise, "seeds": seeds}
        if self.config.thresholding:
            found = self._dk_thresholded(sample, model_output, **operands)
        else:
            found = self._dk_run(sample, model_output, want_x0=True, **operands)
            if eta == 0:
                self._dk_warm((*key[:2], float(eta), key[3]), table, self.final_alpha_cumprod)
        if not return_dict:
            return found[:2]
        return DDIMSchedulerOutput(prev_sample=found[0], pred_original_sample=found[1])

    def plan(self, eta: float = 0.0, use_clipped_model_output: bool = False) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`; with a threshold, those that take
        eps from the thresholded x0."""
        if self.config.thresholding and not use_clipped_model_output:
            raise ValueError(
                "a plan with thresholding=True takes eps from the thresholded x0, got use_clipped_model_output=False: "
                "use step"
            )
        table = self._dk_rows(float(eta), bool(use_clipped_model_output))[self._dk_clock.timesteps.cpu()]
        return thresholded(plan_of("ddim", table, self._dk_clock.times, self.config.prediction_type), self.config)

    def _dk_rows(self, eta: float, clipped: bool) -> Tensor:
        sources = (self._dk_clock, self.alphas_cumprod, self.final_alpha_cumprod, self._internal_dict)
        key = ("rows", self.num_inference_steps, self._dk_exact, eta, clipped)
        return self._dk_cached(key, sources, lambda: self._dk_build(eta, clipped))

    def _dk_build(self, eta: float, clipped: bool) -> Tensor:
        config, abar = self.config, host(self.alphas_cumprod, self._dk_exact)
        rows = len(abar)
        if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"prediction_type given as {config.prediction_type} must be one of `epsilon`, `sample`, or"
                " `v_prediction`"
            )
        before = torch.arange(rows) - config.num_train_timesteps // self.num_inference_steps
        if self._dk_exact:
            times = self._dk_clock.times
            for t, following in zip(times, [*times[1:], -1], strict=True):
                before[int(t)] = int(following)
        to = torch.where(before >= 0, abar[before.clamp(0, rows - 1)], host(self.final_alpha_cumprod, self._dk_exact))
        variance = (1 - to) / (1 - abar) * (1 - abar / to)
        std = eta * variance**0.5
        # The original's NaN where rounding (or eta > 1) leaves less than 0 becomes 0.
        along = ((1 - to - std**2).clamp(min=0.0) ** 0.5).double()
        p, q = to_x0(config.prediction_type, abar)
        alpha, sigma = (abar**0.5).double(), ((1 - abar) ** 0.5).double()
        zero = torch.zeros_like(along)
        a, b, d = zero, (to**0.5).double(), along
        if clipped:  # eps from the clipped x0
            a, b, d = along / sigma, b - along * alpha / sigma, zero
        elif config.prediction_type == "sample":
            a, d = along / sigma, -along * alpha / sigma
        elif config.prediction_type == "v_prediction":
            a, d = along * sigma, along * alpha
        clip = config.clip_sample_range if config.clip_sample and not config.thresholding else float("inf")
        known = {"known_s": (to**0.5).double(), "known_n": ((1 - to) ** 0.5).double()}
        table = table_of(rows, p=p, q=q, clip=clip, a=a, b=b, d=d, g=std.double(), **known)
        self._dk_streams(table)
        return table

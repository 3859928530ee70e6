"""diffusers' EulerAncestralDiscreteScheduler on one fused op a step."""

from __future__ import annotations

import torch
from diffusers import EulerAncestralDiscreteScheduler as Original
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput, logger
from torch import Tensor

from diffkern.compat.diffusers._engine import column
from diffkern.compat.diffusers._levels import FusedKarras, euler_rows, inverse
from diffkern.compat.diffusers.euler import UNSCALED, refuse_integers
from diffkern.plan import Plan


class EulerAncestralDiscreteScheduler(FusedKarras, Original):
    """x' = x + (x - x0)/sigma (sigma_down - sigma) + sigma_up z, the ancestral split of sigma' (arXiv 2206.00364).

    sigma_up^2 = sigma'^2 (sigma^2 - sigma'^2)/sigma^2, sigma_down^2 = sigma'^2 - sigma_up^2 = (sigma'^2/sigma)^2.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """One step, as the original's: noise is drawn in the last one too, and not used there. ``timestep`` may also be
        one a sample, [B], while no loop is under way."""
        refuse_integers(timestep, "EulerDiscreteScheduler.step()")  # the original names its sibling
        if not self.is_scale_input_called:
            logger.warning(UNSCALED)
        row, index = self._dk_at(timestep, sample.device)
        table = self._dk_rows()
        self._dk_in_range(row, table)
        noise, seeds = self._dk_noise(model_output, generator)
        prev_sample, x0, _ = self._dk_upcast(
            sample, model_output, table=table, row=row, index=index, noise=noise, seeds=seeds, want_x0=True
        )
        if index is None:
            self._step_index += 1
        if not return_dict:
            return prev_sample, x0
        return EulerAncestralDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`."""
        return self._dk_plan("euler_ancestral", self._dk_rows())

    def _dk_rows(self) -> Tensor:
        def build() -> Tensor:
            prediction = self.config.prediction_type
            if prediction == "sample":
                raise NotImplementedError("prediction_type not implemented yet: sample")
            if prediction not in ("epsilon", "v_prediction"):
                raise ValueError(f"prediction_type given as {prediction} must be one of `epsilon`, or `v_prediction`")
            sigma, to = self._dk_levels[:-1], self._dk_levels[1:]
            down = to**2 * inverse(sigma)
            table = euler_rows(self._dk_levels, prediction, sigma, torch.zeros_like(sigma), sigma, down)
            column(table, "g")[:] = (to**2 - down**2).clamp(min=0.0) ** 0.5
            return self._dk_onward(table)

        return self._dk_table(("rows",), build)

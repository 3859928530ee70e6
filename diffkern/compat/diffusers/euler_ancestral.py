"""diffusers' EulerAncestralDiscreteScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler as Original
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput, logger
from torch import Tensor

from diffkern.compat.diffusers._engine import Attached, DropIn, Rows
from diffkern.compat.diffusers._host import UNSCALED, refuse_integers
from diffkern.compat.diffusers._karras import KarrasEngine
from diffkern.compat.diffusers._level_rows import euler_rows, inverse
from diffkern.compat.diffusers._levels import check_row
from diffkern.compat.kit.rows import column
from diffkern.plan import Plan


class EulerAncestralDiscreteScheduler(DropIn, Original):
    """x' = x + (x - x0)/sigma (sigma_down - sigma) + sigma_up z, the ancestral split of sigma' (arXiv 2206.00364).

    sigma_up^2 = sigma'^2 (sigma^2 - sigma'^2)/sigma^2, sigma_down^2 = sigma'^2 - sigma_up^2 = (sigma'^2/sigma)^2.
    """

    _engine = Attached(KarrasEngine)

    def _init_step_index(self, timestep: Any) -> None:
        self._engine.start(self, timestep)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """x / sqrt(sigma^2 + 1): made by the step that returned ``sample`` where the loop asks for each (`step` then
        writes it beside x'), else in one op."""
        return self._engine.scale_input(self, sample, timestep)

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
        engine = self._engine
        row, index = engine.row(self, timestep, sample.device)
        rows = rows_of(self)
        check_row(self, row, rows.table)
        noise, seeds = engine.noise(model_output, generator)
        out, x0, _ = engine.run_upcast(self, rows, sample, model_output, row=row, index=index, noise=noise, seeds=seeds)
        if index is None:
            self._step_index += 1
        if not return_dict:
            return out, x0
        return EulerAncestralDiscreteSchedulerOutput(prev_sample=out, pred_original_sample=x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x0 + sigma z in one op; sigma in float32 whatever the samples' dtype."""
        return self._engine.add_noise(self, original_samples, noise, timesteps)

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`."""
        return self._engine.plan(self, "euler_ancestral", rows_of(self).table)


def rows_of(scheduler: EulerAncestralDiscreteScheduler) -> Rows:
    """The rows of the current sigmas."""
    engine = scheduler._engine

    def build() -> Rows:
        prediction = scheduler.config.prediction_type
        if prediction == "sample":
            raise NotImplementedError("prediction_type not implemented yet: sample")
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type given as {prediction} must be one of `epsilon`, or `v_prediction`")
        levels = engine.levels(scheduler)
        sigma, to = levels[:-1], levels[1:]
        down = to**2 * inverse(sigma)
        table = euler_rows(levels, prediction, sigma, torch.zeros_like(sigma), sigma, down)
        column(table, "g")[:] = (to**2 - down**2).clamp(min=0.0) ** 0.5
        return engine.rows(scheduler, table, want_x0=True)

    return engine.tables.get(("rows", engine.exact), build, *engine.sources(scheduler))

"""diffusers' EulerDiscreteScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EulerDiscreteScheduler as Original
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput, logger
from torch import Tensor

from diffkern.compat.diffusers._levels import FusedKarras, churned, euler_rows
from diffkern.plan import Plan


class EulerDiscreteScheduler(FusedKarras, Original):
    """x' = x_hat + (x_hat - x0)/sigma_hat (sigma' - sigma_hat), x_hat = x + s_noise sqrt(sigma_hat^2 - sigma^2) z.

    arXiv 2206.00364, algorithm 2 without its second order. As in the original the model has seen x at sigma, and a v
    prediction is converted at sigma; ``diffkern(exact=True)`` converts it at sigma_hat, and `get_velocity` at the
    noise level of the timestep (the original takes ``alphas_cumprod`` at the step's number).
    """

    alphas_cumprod: Tensor

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """One step, as the original's; ``timestep`` may also be one a sample, [B], while no loop is under way."""
        key = (s_churn, s_tmin, s_tmax, s_noise, self._dk_exact)
        found = self._dk_quick(model_output, timestep, sample, key, True)
        if found is not None:
            if not return_dict:
                return found[:2]
            return EulerDiscreteSchedulerOutput(prev_sample=found[0], pred_original_sample=found[1])
        refuse_integers(timestep, "EulerDiscreteScheduler.step()")
        if not self.is_scale_input_called:
            logger.warning(UNSCALED)
        row, index = self._dk_at(timestep, sample.device)
        table, draws, given = self._dk_rows(s_churn, s_tmin, s_tmax, s_noise)
        noise = seeds = None
        if index is not None:
            if any(draws):
                noise, seeds = self._dk_noise(model_output, generator)
        elif row < len(draws) and draws[row]:
            noise, seeds = self._dk_noise(model_output, generator)
        prev_sample, x0, _ = self._dk_upcast(
            sample, model_output, table=table, row=row, index=index, noise=noise, seeds=seeds, want_x0=not given
        )
        if index is None:
            self._step_index += 1
        if not (any(draws) or given):
            self._dk_warm((*map(float, key[:4]), key[4]), table)  # tensors may be written to
        x0 = model_output if given else x0
        if not return_dict:
            return prev_sample, x0
        return EulerDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) noise - sqrt(1 - abar) sample in one op."""
        refuse_integers(timesteps, "EulerDiscreteScheduler.get_velocity()")
        index = self._dk_indices(timesteps, sample.device)

        def scales() -> Tensor:
            abar = self.alphas_cumprod.cpu().double()
            if self._dk_exact:
                abar = 1 / (self._dk_levels**2 + 1)
            return torch.stack([-((1 - abar) ** 0.5), abar**0.5], 1)

        source = self.sigmas if self._dk_exact else self.alphas_cumprod
        return self._dk_noised(sample, noise, index, scales, ("velocity", self._dk_exact), source)

    def plan(
        self, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0
    ) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`."""
        return self._dk_plan("euler", self._dk_rows(s_churn, s_tmin, s_tmax, s_noise)[0])

    def _dk_rows(self, *churn: float) -> tuple[Tensor, list[bool], bool]:
        """The table, which rows draw noise, and whether the model gives x0."""
        churn = tuple(map(float, churn))

        def build() -> tuple[Tensor, list[bool], bool]:
            prediction = self.config.prediction_type
            if prediction not in ("original_sample", "sample", "epsilon", "v_prediction"):
                raise ValueError(f"prediction_type given as {prediction} must be one of `epsilon`, or `v_prediction`")
            levels = self._dk_levels
            hat, n = churned(levels, *churn)
            at = hat if self._dk_exact else levels[:-1]
            table = euler_rows(levels, prediction, hat, n, at, levels[1:])
            return self._dk_onward(table), (hat > levels[:-1]).tolist(), prediction in ("original_sample", "sample")

        return self._dk_table(("rows", *churn), build)


UNSCALED = (
    "The `scale_model_input` function should be called before `step` to ensure correct denoising. "
    "See `StableDiffusionPipeline` for a usage example."
)


def refuse_integers(timestep: Any, method: str) -> None:
    """The original's error for an integer, which would be a step's number and not its time."""
    if isinstance(timestep, Tensor) and timestep.is_floating_point():
        return
    if isinstance(timestep, int | torch.IntTensor | torch.LongTensor):
        raise ValueError(
            "Passing integer indices (e.g. from `enumerate(timesteps)`) as timesteps to"
            f" `{method}` is not supported. Make sure to pass"
            " one of the `scheduler.timesteps` as a timestep."
        )

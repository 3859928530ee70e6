"""diffusers' EDMEulerScheduler on one fused op a step."""

from __future__ import annotations

import torch
from diffusers import EDMEulerScheduler as Original
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput, logger
from torch import Tensor

from diffkern.compat.diffusers._engine import table_of
from diffkern.compat.diffusers._levels import FusedKarras, along, churned
from diffkern.compat.diffusers.euler import UNSCALED, refuse_integers
from diffkern.plan import Plan


class EDMEulerScheduler(FusedKarras, Original):
    """Euler's step with churn on x0 = c_skip x_hat + c_out m, EDM's preconditioning at sigma_hat (arXiv 2206.00364).

    c_skip = sigma_data^2/(sigma^2 + sigma_data^2), c_out = sigma sigma_data/sqrt(sigma^2 + sigma_data^2), with the
    other sign for prediction_type "v_prediction"; the model is given x/sqrt(sigma^2 + sigma_data^2).
    """

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
        pred_original_sample: Tensor | None = None,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, Tensor]:
        """One step, as the original's; ``pred_original_sample`` is taken for x0 where it is given. ``timestep`` may
        also be one a sample, [B], while no loop is under way."""
        key = (s_churn, s_tmin, s_tmax, s_noise, pred_original_sample is not None, self._dk_exact)
        found = self._dk_quick(model_output, timestep, sample, key, True)
        if found is not None:
            if not return_dict:
                return found[:2]
            return EDMEulerSchedulerOutput(prev_sample=found[0], pred_original_sample=found[1])
        refuse_integers(timestep, "EDMEulerScheduler.step()")
        if not self.is_scale_input_called:
            logger.warning(UNSCALED)
        row, index = self._dk_at(timestep, sample.device)
        given = pred_original_sample
        table, draws = self._dk_rows(given is not None, s_churn, s_tmin, s_tmax, s_noise)
        noise = seeds = None
        if any(draws) if index is not None else row < len(draws) and draws[row]:
            noise, seeds = self._dk_noise(model_output, generator)
        prev_sample, x0, _ = self._dk_upcast(
            sample,
            model_output if given is None else given,
            table=table,
            row=row,
            index=index,
            noise=noise,
            seeds=seeds,
            want_x0=given is None,
            dtype=model_output.dtype,
        )
        if index is None:
            self._step_index += 1
        if given is None and not any(draws):
            self._dk_warm((*map(float, key[:4]), *key[4:]), table)  # tensors may be written to
        x0 = x0 if given is None else given
        if not return_dict:
            return prev_sample, x0
        return EDMEulerSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def plan(
        self, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0
    ) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`; its times are ln(sigma)/4."""
        return self._dk_plan("edm_euler", self._dk_rows(False, s_churn, s_tmin, s_tmax, s_noise)[0], "edm")

    def _dk_input_scale(self) -> Tensor:
        return (self._dk_levels**2 + self.config.sigma_data**2) ** -0.5

    def _dk_rows(self, given: bool, *churn: float) -> tuple[Tensor, list[bool]]:
        """The table, and which rows draw noise; ``given``: the model's place is taken by x0."""
        churn = tuple(map(float, churn))

        def build() -> tuple[Tensor, list[bool]]:
            levels, data, prediction = self._dk_levels, self.config.sigma_data, self.config.prediction_type
            hat, n = churned(levels, *churn)
            p, q = torch.zeros_like(hat), torch.ones_like(hat)
            if not given:
                if prediction not in ("epsilon", "v_prediction"):
                    raise ValueError(f"Prediction type {prediction} is not supported.")
                p, q = data**2 / (hat**2 + data**2), hat * data / (hat**2 + data**2) ** 0.5
                q = q if prediction == "epsilon" else -q
            known = {"known_s": 1.0, "known_n": levels[1:]}
            table = table_of(len(hat), p=p, q=q, r=n * p, **along(hat, levels[1:], n), **known)
            return self._dk_onward(table), (hat > levels[:-1]).tolist()

        return self._dk_table(("rows", given, *churn), build)

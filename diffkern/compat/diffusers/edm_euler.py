"""diffusers' EDMEulerScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EDMEulerScheduler as Original
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput, logger
from torch import Tensor

from diffkern.compat.diffusers._engine import Attached, DropIn, Rows
from diffkern.compat.diffusers._host import UNSCALED, refuse_integers
from diffkern.compat.diffusers._karras import KarrasEngine
from diffkern.compat.diffusers._level_rows import along, churned
from diffkern.compat.kit.rows import table_of
from diffkern.plan import Plan


class EDMEngine(KarrasEngine):
    """The model is given x/sqrt(sigma^2 + sigma_data^2)."""

    def input_scale(self, scheduler: DropIn) -> Tensor:
        return (self.levels(scheduler) ** 2 + scheduler.config.sigma_data**2) ** -0.5


class EDMEulerScheduler(DropIn, Original):
    """Euler's step with churn on x0 = c_skip x_hat + c_out m, EDM's preconditioning at sigma_hat (arXiv 2206.00364).

    c_skip = sigma_data^2/(sigma^2 + sigma_data^2), c_out = sigma sigma_data/sqrt(sigma^2 + sigma_data^2), with the
    other sign for prediction_type "v_prediction"; the model is given x/sqrt(sigma^2 + sigma_data^2).
    """

    _engine = Attached(EDMEngine)

    def _init_step_index(self, timestep: Any) -> None:
        self._engine.start(self, timestep)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """x / sqrt(sigma^2 + sigma_data^2): made by the step that returned ``sample`` where the loop asks for each
        (`step` then writes it beside x'), else in one op."""
        return self._engine.scale_input(self, sample, timestep)

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
        engine, given = self._engine, pred_original_sample
        key = (s_churn, s_tmin, s_tmax, s_noise, given is not None, engine.exact)
        found = engine.repeat(self, model_output, timestep, sample, key)
        if found is not None:
            out, x0 = found[0], found[1]
        else:
            refuse_integers(timestep, "EDMEulerScheduler.step()")
            if not self.is_scale_input_called:
                logger.warning(UNSCALED)
            row, index = engine.row(self, timestep, sample.device)
            rows, draws = steps_of(self, given is not None, s_churn, s_tmin, s_tmax, s_noise)
            noise = seeds = None
            if any(draws) if index is not None else row < len(draws) and draws[row]:
                noise, seeds = engine.noise(model_output, generator)
            m = model_output if given is None else given
            operands: dict[str, Any] = {"row": row, "index": index, "noise": noise, "seeds": seeds}
            out, x0, _ = engine.run_upcast(self, rows, sample, m, dtype=model_output.dtype, **operands)
            if index is None:
                self._step_index += 1
            if given is None and not any(draws):
                engine.keep(self, (*map(float, key[:4]), *key[4:]), rows)  # tensors may be written to
            x0 = x0 if given is None else given
        if not return_dict:
            return out, x0
        return EDMEulerSchedulerOutput(prev_sample=out, pred_original_sample=x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x0 + sigma z in one op; sigma in float32 whatever the samples' dtype."""
        return self._engine.add_noise(self, original_samples, noise, timesteps)

    def plan(
        self, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0
    ) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`; its times are ln(sigma)/4."""
        rows, _ = steps_of(self, False, s_churn, s_tmin, s_tmax, s_noise)
        return self._engine.plan(self, "edm_euler", rows.table, "edm")


def steps_of(scheduler: EDMEulerScheduler, given: bool, *churn: float) -> tuple[Rows, list[bool]]:
    """The steps of the current sigmas, and which of them draw noise; ``given``: the model's place is taken by x0."""
    engine, churn = scheduler._engine, tuple(map(float, churn))

    def build() -> tuple[Rows, list[bool]]:
        config, levels = scheduler.config, engine.levels(scheduler)
        data, prediction = config.sigma_data, config.prediction_type
        hat, n = churned(levels, *churn)
        p, q = torch.zeros_like(hat), torch.ones_like(hat)
        if not given:
            if prediction not in ("epsilon", "v_prediction"):
                raise ValueError(f"Prediction type {prediction} is not supported.")
            p, q = data**2 / (hat**2 + data**2), hat * data / (hat**2 + data**2) ** 0.5
            q = q if prediction == "epsilon" else -q
        known = {"known_s": 1.0, "known_n": levels[1:]}
        table = table_of(len(hat), p=p, q=q, r=n * p, **along(hat, levels[1:], n), **known)
        return engine.rows(scheduler, table, want_x0=not given), (hat > levels[:-1]).tolist()

    return engine.tables.get(("rows", given, *churn, engine.exact), build, *engine.sources(scheduler))

"""diffusers' EulerDiscreteScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import EulerDiscreteScheduler as Original
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput, logger
from torch import Tensor

from diffkern.compat.diffusers._engine import Attached, DropIn, Rows
from diffkern.compat.diffusers._host import UNSCALED, refuse_integers
from diffkern.compat.diffusers._karras import KarrasEngine
from diffkern.compat.diffusers._level_rows import churned, euler_rows
from diffkern.plan import Plan


class Steps(NamedTuple):
    """What the steps of a schedule are run with."""

    rows: Rows
    draws: list[bool]
    """Which of them draw noise."""
    given: bool
    """Whether the model gives x0."""


class EulerDiscreteScheduler(DropIn, Original):
    """x' = x_hat + (x_hat - x0)/sigma_hat (sigma' - sigma_hat), x_hat = x + s_noise sqrt(sigma_hat^2 - sigma^2) z.

    arXiv 2206.00364, algorithm 2 without its second order. As in the original the model has seen x at sigma, and a v
    prediction is converted at sigma; ``diffkern(exact=True)`` converts it at sigma_hat, and `get_velocity` at the
    noise level of the timestep (the original takes ``alphas_cumprod`` at the step's number).
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
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """One step, as the original's; ``timestep`` may also be one a sample, [B], while no loop is under way."""
        engine = self._engine
        key = (s_churn, s_tmin, s_tmax, s_noise, engine.exact)
        found = engine.repeat(self, model_output, timestep, sample, key)
        if found is not None:
            out, x0 = found[0], found[1]
        else:
            refuse_integers(timestep, "EulerDiscreteScheduler.step()")
            if not self.is_scale_input_called:
                logger.warning(UNSCALED)
            row, index = engine.row(self, timestep, sample.device)
            rows, draws, given = steps_of(self, s_churn, s_tmin, s_tmax, s_noise)
            noise = seeds = None
            if any(draws) if index is not None else row < len(draws) and draws[row]:
                noise, seeds = engine.noise(model_output, generator)
            operands: dict[str, Any] = {"row": row, "index": index, "noise": noise, "seeds": seeds}
            out, x0, _ = engine.run_upcast(self, rows, sample, model_output, **operands)
            if index is None:
                self._step_index += 1
            if not (any(draws) or given):
                engine.keep(self, (*map(float, key[:4]), key[4]), rows)  # tensors may be written to
            x0 = model_output if given else x0
        if not return_dict:
            return out, x0
        return EulerDiscreteSchedulerOutput(prev_sample=out, pred_original_sample=x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x0 + sigma z in one op; sigma in float32 whatever the samples' dtype."""
        return self._engine.add_noise(self, original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) noise - sqrt(1 - abar) sample in one op."""
        refuse_integers(timesteps, "EulerDiscreteScheduler.get_velocity()")
        engine = self._engine
        index = engine.indices(self, timesteps, sample.device)

        def scales() -> Tensor:
            abar = self.alphas_cumprod.cpu().double()
            if engine.exact:
                abar = 1 / (engine.levels(self) ** 2 + 1)
            return torch.stack([-((1 - abar) ** 0.5), abar**0.5], 1)

        source = self.sigmas if engine.exact else self.alphas_cumprod
        return engine.noised(sample, noise, index, scales, ("velocity", engine.exact), source)

    def plan(
        self, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0
    ) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`."""
        return self._engine.plan(self, "euler", steps_of(self, s_churn, s_tmin, s_tmax, s_noise).rows.table)


def steps_of(scheduler: EulerDiscreteScheduler, *churn: float) -> Steps:
    """The steps of the current sigmas with this churn."""
    engine, churn = scheduler._engine, tuple(map(float, churn))

    def build() -> Steps:
        prediction = scheduler.config.prediction_type
        if prediction not in ("original_sample", "sample", "epsilon", "v_prediction"):
            raise ValueError(f"prediction_type given as {prediction} must be one of `epsilon`, or `v_prediction`")
        levels, given = engine.levels(scheduler), prediction in ("original_sample", "sample")
        hat, n = churned(levels, *churn)
        at = hat if engine.exact else levels[:-1]
        table = euler_rows(levels, prediction, hat, n, at, levels[1:])
        return Steps(engine.rows(scheduler, table, want_x0=not given), (hat > levels[:-1]).tolist(), given)

    return engine.tables.get(("rows", *churn, engine.exact), build, *engine.sources(scheduler))

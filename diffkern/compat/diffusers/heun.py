"""diffusers' HeunDiscreteScheduler on one fused op a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import HeunDiscreteScheduler as Original
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from torch import Tensor

from diffkern.compat.diffusers._engine import as_dtype, table_of
from diffkern.compat.diffusers._levels import FusedKarras, inverse, to_x0
from diffkern.plan import Plan


class HeunDiscreteScheduler(FusedKarras, Original):
    """x' = x + (d1 + d2)/2 (sigma' - sigma), d = (x - x0)/sigma, in two calls (arXiv 2206.00364, algorithm 1).

    The first call keeps x and d1, the second is given the Euler step's x and replaces it.
    """

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> HeunDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """One call, as the original's: in the dtype that sample and model_output promote to."""
        row = self._dk_one(timestep, sample)
        first, second, given = self._dk_rows()
        if self.state_in_first_order:
            prev_sample, x0, slope, _ = self._dk_promoted(
                sample, model_output, table=first, row=row, want_x0=not given, want_s=True
            )
            self.prev_derivative, self.sample = slope, as_dtype(sample, slope.dtype)
            self.dt = self._dk_cached(("dt",), (self.sigmas,), lambda: self.sigmas.diff().unbind())[row]
        else:
            prev_sample, x0, _, _ = self._dk_promoted(
                sample, model_output, self.sample, self.prev_derivative, table=second, row=row, want_x0=not given
            )
            self.prev_derivative = self.dt = self.sample = None
        self._step_index += 1
        if given:
            x0 = model_output
        if not return_dict:
            return prev_sample, x0
        return HeunDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`."""
        first, second, _ = self._dk_rows()
        odd = torch.arange(len(first)) % 2 == 1
        saves: list[Any] = [() if at else ((0, "x"), (1, "s")) for at in odd.tolist()]
        saves[-1] = ()  # the last step is Euler's
        plan = self._dk_plan("heun", torch.where(odd[:, None], second[:-1], first), saves=saves)
        rows = [replace(row, ends_step=not row.saves) for row in plan.rows]
        return replace(plan, rows=tuple(rows))

    def _dk_rows(self) -> tuple[Tensor, Tensor, bool]:
        """Tables of the first calls and of the second (one more: a loop may go on past its last first call); whether
        the model gives x0."""

        def build() -> tuple[Tensor, Tensor, bool]:
            config, levels = self.config, self._dk_levels
            prediction = config.prediction_type
            if prediction not in ("epsilon", "v_prediction", "sample"):
                raise ValueError(f"prediction_type given as {prediction} must be one of `epsilon`, or `v_prediction`")
            clip = float(config.clip_sample_range) if config.clip_sample else float("inf")
            onward = levels.diff()
            half = torch.cat([torch.zeros(1, dtype=torch.float64), onward]) / 2
            own = prediction == "epsilon" and not config.clip_sample  # the slope is the model's output
            tables: list[Tensor] = []
            for sigma, to in ((levels[:-1], levels[1:]), (levels, levels)):
                over = inverse(sigma)
                p, q = to_x0(prediction, sigma)
                shared = {"p": p, "q": q, "clip": clip, "known_s": 1.0, "known_n": to}
                first = len(tables) == 0
                move = onward if first else half
                shared |= {"a": float(first), "d": move} if own else {"a": first + move * over, "b": -move * over}
                if first:
                    shared |= {"D": 1.0} if own else {"A": over, "B": -over}
                else:
                    shared |= {"e0": 1.0, "e1": half}
                tables.append(self._dk_onward(table_of(len(sigma), **shared)))
            return tables[0], tables[1], prediction == "sample" and not config.clip_sample

        return self._dk_table(("rows",), build)

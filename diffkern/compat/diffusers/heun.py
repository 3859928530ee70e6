"""diffusers' HeunDiscreteScheduler on one fused op a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers import HeunDiscreteScheduler as Original
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from torch import Tensor

from diffkern.compat.diffusers._engine import Attached, DropIn, Rows
from diffkern.compat.diffusers._level_rows import inverse, to_x0
from diffkern.compat.diffusers._levels import KarrasEngine
from diffkern.compat.kit.rows import SIXTEEN, as_dtype, promote, table_of
from diffkern.plan import Plan


class Calls(NamedTuple):
    """What the two calls of each step are run with."""

    first: Rows
    second: Rows
    """One row more: a loop may go on past its last first call."""
    given: bool
    """Whether the model gives x0."""
    bare: Rows | None
    """The first calls without their slope, where that is the model's output: widening it takes less than writing it."""


class HeunDiscreteScheduler(DropIn, Original):
    """x' = x + (d1 + d2)/2 (sigma' - sigma), d = (x - x0)/sigma, in two calls (arXiv 2206.00364, algorithm 1).

    The first call keeps x and d1, the second is given the Euler step's x and replaces it.
    """

    _engine = Attached(KarrasEngine)

    def _init_step_index(self, timestep: Any) -> None:
        self._engine.start(self, timestep)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """x / sqrt(sigma^2 + 1): made by the step that returned ``sample`` where the loop asks for each (`step` then
        writes it beside x'), else in one op."""
        return self._engine.scale_input(self, sample, timestep)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> HeunDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """One call, as the original's: in the dtype that sample and model_output promote to."""
        engine = self._engine
        row = engine.one_row(self, timestep, sample)
        first, second, given, bare = calls_of(self)
        dtype = promote(sample.dtype, model_output.dtype)
        start, _ = engine.start_from(sample, dtype, self.sigmas, row)
        if self.state_in_first_order:
            wide = dtype not in SIXTEEN or model_output.shape != sample.shape
            rows = first if bare is None or wide else bare
            out, x0, slope, _ = engine.run_promoted(self, rows, sample, model_output, row=row, start=start)
            slope = model_output.to(start.dtype) if slope is None else slope
            self.prev_derivative, self.sample = slope, as_dtype(start, slope.dtype)
            self.dt = engine.tables.get(("dt",), lambda: self.sigmas.diff().unbind(), self.sigmas)[row]
        else:
            histories = (self.sample, self.prev_derivative)
            out, x0, _, _ = engine.run_promoted(self, second, sample, model_output, *histories, row=row, start=start)
            self.prev_derivative = self.dt = self.sample = None
        self._step_index += 1
        x0 = model_output if given else as_dtype(x0, dtype)
        if not return_dict:
            return out, x0
        return HeunDiscreteSchedulerOutput(prev_sample=out, pred_original_sample=x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x0 + sigma z in one op; sigma in float32 whatever the samples' dtype."""
        return self._engine.add_noise(self, original_samples, noise, timesteps)

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`."""
        first, second, *_ = calls_of(self)
        odd = torch.arange(first.count) % 2 == 1
        saves: list[Any] = [() if at else ((0, "x"), (1, "s")) for at in odd.tolist()]
        saves[-1] = ()  # the last step is Euler's
        plan = self._engine.plan(self, "heun", torch.where(odd[:, None], second.table[:-1], first.table), saves=saves)
        rows = [replace(row, ends_step=not row.saves) for row in plan.rows]
        return replace(plan, rows=tuple(rows))


def calls_of(scheduler: HeunDiscreteScheduler) -> Calls:
    """The calls of the current sigmas."""
    engine = scheduler._engine

    def build() -> Calls:
        config, levels = scheduler.config, engine.levels(scheduler)
        prediction = config.prediction_type
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type given as {prediction} must be one of `epsilon`, or `v_prediction`")
        clip = float(config.clip_sample_range) if config.clip_sample else float("inf")
        onward = levels.diff()
        half = torch.cat([torch.zeros(1, dtype=torch.float64), onward]) / 2
        own = prediction == "epsilon" and not config.clip_sample  # the slope is the model's output
        given = prediction == "sample" and not config.clip_sample
        calls: list[Rows] = []
        for sigma, to in ((levels[:-1], levels[1:]), (levels, levels)):
            over = inverse(sigma)
            p, q = to_x0(prediction, sigma)
            shared = {"p": p, "q": q, "clip": clip, "known_s": 1.0, "known_n": to}
            first = not calls
            move = onward if first else half
            shared |= {"a": float(first), "d": move} if own else {"a": first + move * over, "b": -move * over}
            if first:
                shared |= {"D": 1.0} if own else {"A": over, "B": -over}
            else:
                shared |= {"e0": 1.0, "e1": half}
            table = table_of(len(sigma), **shared)
            calls.append(engine.rows(scheduler, table, want_x0=not given, want_s=first))
        bare = Rows(calls[0].table, want_x0=not given) if own else None
        return Calls(calls[0], calls[1], given, bare)

    return engine.tables.get(("rows", engine.exact), build, *engine.sources(scheduler))

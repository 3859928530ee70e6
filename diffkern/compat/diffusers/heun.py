"""diffusers' HeunDiscreteScheduler on one fused op a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers import HeunDiscreteScheduler as Original
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from torch import Tensor

from diffkern.compat.diffusers._engine import Attached, DropIn, Hot, Rows
from diffkern.compat.diffusers._karras import KarrasEngine
from diffkern.compat.diffusers._level_rows import inverse, to_x0
from diffkern.compat.kit.rows import SIXTEEN, as_dtype, promote, table_of
from diffkern.plan import Plan


class Calls(NamedTuple):
    """What the two calls of each step are run with."""

    first: Rows
    second: Rows
    """One row more: a loop may go on past its last first call."""
    given: bool
    """Whether the model gives x0."""
    onward: tuple[Tensor, ...]
    """The original's ``dt``."""


class HeunEngine(KarrasEngine):
    """What either call was last run with is at hand."""

    own = (*KarrasEngine.own, "calls")
    calls: Mapping[Any, tuple[Hot, Calls]] = MappingProxyType({})

    def keep_call(self, scheduler: DropIn, key: Any, rows: Rows, calls: Calls) -> None:
        """Keeps the rows of a call for `repeat`."""
        self.hot = None
        self.keep(scheduler, key, rows)
        if self.hot is not None:
            self.calls = {**self.calls, key: (self.hot, calls)}


class HeunDiscreteScheduler(DropIn, Original):
    """x' = x + (d1 + d2)/2 (sigma' - sigma), d = (x - x0)/sigma, in two calls (arXiv 2206.00364, algorithm 1).

    The first call keeps x and d1, the second is given the Euler step's x and replaces it.
    """

    _engine = Attached(HeunEngine)

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
        engine, first, dtype = self._engine, self.dt is None, sample.dtype
        key = (first, dtype, engine.exact)
        engine.hot, calls = engine.calls.get(key, NOTHING)
        carried, histories = engine.carried, () if first else (self.sample, self.prev_derivative)
        found = engine.repeat(self, model_output, timestep, sample, key, *histories)
        start: Tensor = sample
        if found is None:
            row, calls = engine.one_row(self, timestep, sample), calls_of(self)
            dtype = promote(dtype, model_output.dtype)
            start, _ = engine.start_from(sample, dtype, self.sigmas, row)
            rows = calls.first if first else calls.second
            found = engine.run_promoted(self, rows, sample, model_output, *histories, row=row, start=start)
            engine.keep_call(self, key, rows, calls)
            self._step_index = row + 1
        elif carried is not None and dtype in SIXTEEN:
            start = carried.state
        assert calls is not None
        out, x0, slope, _ = found
        if first:
            assert slope is not None
            self.prev_derivative, self.sample = slope, as_dtype(start, slope.dtype)
            self.dt = calls.onward[self._step_index - 1]
        else:
            self.prev_derivative = self.dt = self.sample = None
        x0 = model_output if calls.given else as_dtype(x0, dtype)
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


NOTHING: tuple[Hot | None, Calls | None] = (None, None)


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
        return Calls(calls[0], calls[1], given, onward.to(scheduler.sigmas).unbind())

    return engine.tables.get(("rows", engine.exact), build, *engine.sources(scheduler))

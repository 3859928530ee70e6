"""diffusers' DDIMInverseScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMInverseScheduler as Original
from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput
from torch import Tensor

from diffkern.compat.diffusers._engine import Attached, DropIn, Rows
from diffkern.compat.diffusers._host import host
from diffkern.compat.diffusers._plans import plan_of
from diffkern.compat.diffusers._times import TimesEngine, to_x0
from diffkern.compat.kit.rows import as_dtype, promote, table_of
from diffkern.plan import Plan


class DDIMInverseScheduler(DropIn, Original):
    """DDIM run towards the noise: from level t - T // steps, where the model is asked at t, up to level t."""

    _engine = Attached(TimesEngine)

    initial_alpha_cumprod: Tensor

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True) -> Any:
        """One step, as the original's; ``timestep`` may also be one a sample, int [B]."""
        engine, end = self._engine, self.initial_alpha_cumprod
        key = (self.num_inference_steps, engine.exact)
        found: Any = engine.repeat(self, model_output, timestep, sample, key, end)
        if found is None:
            row, index = engine.row(self, timestep, sample.device)
            rows = rows_of(self)
            place = engine.place(self, timestep, row, index)
            x, narrow = engine.start_from(sample, promote(sample.dtype, model_output.dtype), *place)
            found = engine.run(x, model_output, table=rows.table, row=row, index=index, want_x0=True, **narrow)
            found = engine.end_with(found, narrow, *place)
            found = found[0], as_dtype(found[1], found[0].dtype)
            engine.keep(self, key, rows, end)
        out, x0 = found[0], found[1]
        if not return_dict:
            return out, x0
        return DDIMSchedulerOutput(prev_sample=out, pred_original_sample=x0)

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`."""
        table, times = rows_of(self).table[self.timesteps.cpu()], self._engine.clock(self.timesteps).times
        return plan_of("ddim_inverse", table, times, self.config.prediction_type)


def rows_of(scheduler: DDIMInverseScheduler) -> Rows:
    """One row a training timestep."""
    engine = scheduler._engine
    clock, config = engine.clock(scheduler.timesteps), scheduler._internal_dict
    return engine.tables.get(
        ("rows", scheduler.num_inference_steps, engine.exact),
        lambda: Rows(made(scheduler), want_x0=True),
        *(clock, scheduler.alphas_cumprod, scheduler.initial_alpha_cumprod, config),
    )


def made(scheduler: DDIMInverseScheduler) -> Tensor:
    """`rows_of`'s table."""
    engine, config = scheduler._engine, scheduler.config
    to, first = (host(t, engine.exact) for t in (scheduler.alphas_cumprod, scheduler.initial_alpha_cumprod))
    rows = len(to)
    if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"prediction_type given as {config.prediction_type} must be one of `epsilon`, `sample`, or `v_prediction`"
        )
    before = torch.arange(rows) - config.num_train_timesteps // scheduler.num_inference_steps
    if engine.exact:  # the level that the step before reached
        times = engine.clock(scheduler.timesteps).times
        for t, last in zip(times, [-1, *times[:-1]], strict=True):
            before[int(t)] = int(last)
    abar = torch.where(before >= 0, to[before.clamp(0, rows - 1)], first)
    along = ((1 - to) ** 0.5).double()
    p, q = to_x0(config.prediction_type, abar)
    alpha, sigma = (abar**0.5).double(), ((1 - abar) ** 0.5).double()
    zero = torch.zeros_like(along)
    a, d = zero, along
    if config.prediction_type == "sample":
        # At the clean level eps can not be had from x and x0 (the original divides 0 by 0): left out there.
        ratio = torch.where(sigma > 0, along / sigma, zero)
        a, d = ratio, -ratio * alpha
    elif config.prediction_type == "v_prediction":
        a, d = along * sigma, along * alpha
    clip = config.clip_sample_range if config.clip_sample else float("inf")
    known = {"known_s": (to**0.5).double(), "known_n": along}
    table = table_of(rows, p=p, q=q, clip=clip, a=a, b=(to**0.5).double(), d=d, **known)
    return engine.number_streams(scheduler, table)

"""diffusers' DDIMScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler as Original
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from diffkern.compat.diffusers._engine import Attached, DropIn, Rows
from diffkern.compat.diffusers._host import host
from diffkern.compat.diffusers._plans import plan_of, thresholded
from diffkern.compat.diffusers._times import TimesEngine, to_x0
from diffkern.compat.kit.rows import as_dtype, promote, table_of
from diffkern.plan import Plan


class DDIMScheduler(DropIn, Original):
    """x' = sqrt(abar_s) x0 + sqrt(1 - abar_s - sd^2) eps + sd z with sd = eta sqrt(beta_tilde), arXiv 2010.02502.

    The previous timestep s is t - T // steps as in the original; ``diffkern(exact=True)`` takes the schedule's next.
    """

    _engine = Attached(TimesEngine)

    final_alpha_cumprod: Tensor

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step, as the original's; ``timestep`` may also be one a sample, int [B]."""
        if self.num_inference_steps is None:
            raise ValueError(
                "Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler"
            )
        engine = self._engine
        key = (self.num_inference_steps, engine.exact, eta, use_clipped_model_output)
        found: Any = engine.repeat(self, model_output, timestep, sample, key, self.final_alpha_cumprod)
        if found is None:
            row, index = engine.row(self, timestep, sample.device)
            rows = rows_of(self, float(eta), bool(use_clipped_model_output))
            noise = seeds = None
            if eta > 0:
                if variance_noise is not None and generator is not None:
                    raise ValueError(
                        "Cannot pass both generator and variance_noise. Please make sure that either `generator` or"
                        " `variance_noise` stays `None`."
                    )
                noise = variance_noise
                if noise is None:
                    noise, seeds = engine.noise(model_output, generator)
            operands: dict[str, Any] = {"table": rows.table, "row": row, "index": index, "noise": noise, "seeds": seeds}
            place = engine.place(self, timestep, row, index)
            x, narrow = engine.start_from(sample, promote(sample.dtype, model_output.dtype), *place)
            if self.config.thresholding:
                found = engine.run_thresholded(self, x, model_output, **operands, **narrow)
            else:
                found = engine.run(x, model_output, want_x0=True, **operands, **narrow)
            found = engine.end_with(found, narrow, *place)
            found = found[0], as_dtype(found[1], found[0].dtype)
            if eta == 0 and not self.config.thresholding:  # a number of its own: tensors may be written to
                engine.keep(self, (*key[:2], float(eta), key[3]), rows, self.final_alpha_cumprod)
        out, x0 = found[0], found[1]
        if not return_dict:
            return out, x0
        return DDIMSchedulerOutput(prev_sample=out, pred_original_sample=x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) x + sqrt(1 - abar) noise in one op; coefficients in float32 whatever the samples' dtype."""
        return self._engine.add_noise(self, original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) noise - sqrt(1 - abar) sample in one op."""
        return self._engine.velocity(self, sample, noise, timesteps)

    def plan(self, eta: float = 0.0, use_clipped_model_output: bool = False) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`; with a threshold, those that take
        eps from the thresholded x0."""
        if self.config.thresholding and not use_clipped_model_output:
            raise ValueError(
                "a plan with thresholding=True takes eps from the thresholded x0, got use_clipped_model_output=False: "
                "use step"
            )
        table = rows_of(self, float(eta), bool(use_clipped_model_output)).table[self.timesteps.cpu()]
        times = self._engine.clock(self.timesteps).times
        return thresholded(plan_of("ddim", table, times, self.config.prediction_type), self.config)


def rows_of(scheduler: DDIMScheduler, eta: float, clipped: bool) -> Rows:
    """One row a training timestep."""
    engine = scheduler._engine
    clock, config = engine.clock(scheduler.timesteps), scheduler._internal_dict
    return engine.tables.get(
        ("rows", scheduler.num_inference_steps, engine.exact, eta, clipped),
        lambda: Rows(made(scheduler, eta, clipped), want_x0=True),
        *(clock, scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, config),
    )


def made(scheduler: DDIMScheduler, eta: float, clipped: bool) -> Tensor:
    """`rows_of`'s table."""
    engine, config = scheduler._engine, scheduler.config
    abar, last = (host(t, engine.exact) for t in (scheduler.alphas_cumprod, scheduler.final_alpha_cumprod))
    rows = len(abar)
    if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"prediction_type given as {config.prediction_type} must be one of `epsilon`, `sample`, or `v_prediction`"
        )
    before = torch.arange(rows) - config.num_train_timesteps // scheduler.num_inference_steps
    if engine.exact:
        times = engine.clock(scheduler.timesteps).times
        for t, following in zip(times, [*times[1:], -1], strict=True):
            before[int(t)] = int(following)
    to = torch.where(before >= 0, abar[before.clamp(0, rows - 1)], last)
    variance = (1 - to) / (1 - abar) * (1 - abar / to)
    std = eta * variance**0.5
    # The original's NaN where rounding (or eta > 1) leaves less than 0 becomes 0.
    along = ((1 - to - std**2).clamp(min=0.0) ** 0.5).double()
    p, q = to_x0(config.prediction_type, abar)
    alpha, sigma = (abar**0.5).double(), ((1 - abar) ** 0.5).double()
    zero = torch.zeros_like(along)
    a, b, d = zero, (to**0.5).double(), along
    if clipped:  # eps from the clipped x0
        a, b, d = along / sigma, b - along * alpha / sigma, zero
    elif config.prediction_type == "sample":
        a, d = along / sigma, -along * alpha / sigma
    elif config.prediction_type == "v_prediction":
        a, d = along * sigma, along * alpha
    clip = config.clip_sample_range if config.clip_sample and not config.thresholding else float("inf")
    known = {"known_s": (to**0.5).double(), "known_n": ((1 - to) ** 0.5).double()}
    table = table_of(rows, p=p, q=q, clip=clip, a=a, b=b, d=d, g=std.double(), **known)
    return engine.number_streams(scheduler, table)

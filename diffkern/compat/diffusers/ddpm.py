"""diffusers' DDPMScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler as Original
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from diffkern import ops
from diffkern.compat.diffusers._engine import Attached, DropIn, Rows, fits
from diffkern.compat.diffusers._host import host
from diffkern.compat.diffusers._plans import plan_of, thresholded
from diffkern.compat.diffusers._times import TimesEngine, to_x0
from diffkern.compat.kit.rows import SIXTEEN, as_dtype, column, promote, table_of, with_columns
from diffkern.plan import Plan

LEARNED = ("learned", "learned_range")


class DDPMRows(NamedTuple):
    """One row a training timestep."""

    steps: Rows
    """[T, 21]."""
    logs: Tensor
    """[T, 2]: the log-variances ln beta~ and ln beta."""
    learned: Tensor
    """[T, 23]: the rows of `ops.learned_step`."""


class DDPMScheduler(DropIn, Original):
    """x' = mu(x, x0) + std z, arXiv 2006.11239, eq. 7; std by ``variance_type``, "fixed_large_log" as sqrt(beta)."""

    _engine = Attached(TimesEngine)

    variance_type: Any
    custom_timesteps: bool
    previous_timestep: Any

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step, as the original's; ``timestep`` may also be one a sample, int [B]."""
        engine = self._engine
        row, index = engine.row(self, timestep, sample.device)
        strided = self.custom_timesteps or self.num_inference_steps
        if strided and index is None and row not in engine.clock(self.timesteps).positions:
            self.previous_timestep(timestep)  # raises, as the original does
        both, predicted = model_output, None
        if model_output.shape[1] == sample.shape[1] * 2 and self.variance_type in LEARNED:
            model_output, predicted = torch.split(model_output, sample.shape[1], dim=1)
        draws = index is not None or row > 0
        noise, seeds = engine.noise(model_output, generator) if draws else (None, None)
        rows = rows_of(self)
        # What most loops are: nothing to convert, to look up or to differentiate.
        plain = index is None and seeds is None and sample.dtype not in SIXTEEN and self.variance_type not in LEARNED
        if plain and not self.config.thresholding and fits(model_output, sample, noise):
            out, x0, _, _ = rows.steps.plain(sample, model_output, row, noise=noise)
            return (out, x0) if not return_dict else DDPMSchedulerOutput(prev_sample=out, pred_original_sample=x0)
        operands: dict[str, Any] = {"row": row, "index": index}
        place = engine.place(self, timestep, row, index)
        x, narrow = engine.start_from(sample, promote(sample.dtype, model_output.dtype), *place)
        found: Any
        if predicted is not None and in_one_op(self, sample, model_output):
            found = run_learned(self, rows, x, both, noise=noise, seeds=seeds, **operands, **narrow)
        else:
            if draws and self.variance_type in LEARNED:
                noise, seeds = spread(self, rows, predicted, noise, seeds, model_output, **operands), None
            operands.update(table=rows.steps.table, noise=noise, seeds=seeds, **narrow)
            if self.config.thresholding:
                found = engine.run_thresholded(self, x, model_output, **operands)
            else:
                found = engine.run(x, model_output, want_x0=True, **operands)
        out, x0, *_ = engine.end_with(found, narrow, *place)
        x0 = as_dtype(x0, out.dtype)
        if not return_dict:
            return out, x0
        return DDPMSchedulerOutput(prev_sample=out, pred_original_sample=x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) x + sqrt(1 - abar) noise in one op; coefficients in float32 whatever the samples' dtype."""
        return self._engine.add_noise(self, original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) noise - sqrt(1 - abar) sample in one op."""
        return self._engine.velocity(self, sample, noise, timesteps)

    def plan(self) -> Plan:
        """The steps of the current timesteps as a plan for `diffkern.sample`."""
        if self.variance_type == "learned":
            raise ValueError("a plan has a fixed variance or a range of it, got variance_type='learned': use step")
        rows, at, times = rows_of(self), self.timesteps.cpu(), self._engine.clock(self.timesteps).times
        learned = rows.learned[at, -2:] if self.variance_type == "learned_range" else None
        plan = plan_of("ddpm", rows.steps.table[at], times, self.config.prediction_type, learned=learned)
        return thresholded(plan, self.config)


# ------------------------------------------------------------------------------------------------------- the rows
def rows_of(scheduler: DDPMScheduler) -> DDPMRows:
    """The rows of the current timesteps."""
    engine = scheduler._engine
    strided = bool(scheduler.custom_timesteps or scheduler.num_inference_steps)
    return engine.tables.get(
        ("rows", scheduler.num_inference_steps, strided, engine.exact, scheduler.variance_type),
        lambda: made(scheduler, strided),
        *(engine.clock(scheduler.timesteps), scheduler.alphas_cumprod, scheduler._internal_dict),
    )


def made(scheduler: DDPMScheduler, strided: bool) -> DDPMRows:
    engine, config = scheduler._engine, scheduler.config
    abar = host(scheduler.alphas_cumprod, engine.exact)
    rows = len(abar)
    if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"prediction_type given as {config.prediction_type} must be one of `epsilon`, `sample` or"
            " `v_prediction`  for the DDPMScheduler."
        )
    before = torch.arange(rows) - 1
    if strided:
        times = [int(t) for t in engine.clock(scheduler.timesteps).times]
        for t, following in zip(times, [*times[1:], -1], strict=True):
            before[t] = following
    to = torch.where(before >= 0, abar[before.clamp(0, rows - 1)], torch.ones((), dtype=abar.dtype))
    # In the original's order and its float32: beta is a difference of nearby numbers, and rounding is part of it.
    alpha = abar / to
    beta = 1 - alpha
    small = torch.clamp((1 - to) / (1 - abar) * beta, min=1e-20)
    from_x0 = to**0.5 * beta / (1 - abar)
    from_x = alpha**0.5 * (1 - to) / (1 - abar)
    std = std_of(scheduler, small, beta).double()
    std[0] = 0.0
    p, q = to_x0(config.prediction_type, abar)
    clip = config.clip_sample_range if config.clip_sample and not config.thresholding else float("inf")
    known = {"known_s": (to**0.5).double(), "known_n": ((1 - to) ** 0.5).double()}
    table = table_of(rows, p=p, q=q, clip=clip, a=from_x.double(), b=from_x0.double(), g=std, **known)
    engine.number_streams(scheduler, table)
    logs = torch.stack([small.log(), beta.log()], 1).double()
    middle, half = (logs[:, 1] + logs[:, 0]) / 2, (logs[:, 1] - logs[:, 0]) / 2
    return DDPMRows(Rows(table, want_x0=True), logs, torch.cat([table, middle[:, None], half[:, None]], 1))


def std_of(scheduler: DDPMScheduler, small: Tensor, beta: Tensor) -> Tensor:
    """The standard deviation by the kind of variance; ``small`` is beta~."""
    kind = scheduler.config.variance_type
    if scheduler.variance_type in LEARNED:
        return torch.ones_like(small)  # the noise comes multiplied by its std
    if kind == "fixed_large_log":
        return torch.exp(0.5 * beta.log())  # the original takes the root of a negative logarithm: NaN
    return (beta if kind == "fixed_large" else small) ** 0.5


# ------------------------------------------------------------------------------------------------ learned variance
def in_one_op(scheduler: DDPMScheduler, *inputs: Tensor) -> bool:
    """Whether `ops.learned_step` runs the step: a range of variances, no gradient, no threshold of diffusers'."""
    config = scheduler.config
    if scheduler.variance_type != "learned_range" or (config.thresholding and not config.sample_max_value >= 1.0):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs))


def run_learned(
    scheduler: DDPMScheduler,
    rows: DDPMRows,
    x: Tensor,
    m: Tensor,
    *,
    row: int,
    index: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    state: torch.dtype | None = None,
    **wants: Any,
) -> tuple[Tensor, Any, None, Tensor | None]:
    """std = exp((r0 + r1 v)/2) made in the op of the step; with a threshold x0 takes the place of the model's
    first half: two ops and a copy before it."""
    engine, state, table = scheduler._engine, state or promote(x.dtype, m.dtype), rows.learned
    if scheduler.config.thresholding:
        first, table = engine.tables.get(("split learned", id(table)), lambda: estimated(rows.learned), table)
        values, variance = m.split(x.shape[1], 1)
        x0 = engine.threshold(scheduler, engine.run(x, values, table=first, row=row, index=index, state=state)[0])
        m = torch.cat([x0, as_dtype(variance, state)], 1)
    if index is not None:
        table = engine.tables.on(table, x.device)
    noise = None if noise is None else as_dtype(noise, state)
    operands: dict[str, Any] = {"row": row, "index": index, "noise": noise, "seeds": seeds}
    out, found, following = ops.learned_step(as_dtype(x, state), m, table=table, want_x0=True, **operands, **wants)
    return out, found, None, following


def spread(
    scheduler: DDPMScheduler,
    rows: DDPMRows,
    predicted: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    like: Tensor,
    *,
    row: int,
    index: Tensor | None,
) -> Tensor:
    """The noise times the standard deviation that the model predicts."""
    if predicted is None:
        raise TypeError(
            f"model_output must have twice the channels of sample for variance_type={scheduler.variance_type!r}, "
            f"got {list(like.shape)}"
        )
    if noise is None:
        assert seeds is not None
        stream = int(column(rows.steps.table, "stream")[row])
        noise = ops.randn(like.shape, seeds, stream, dtype=like.dtype)
    if scheduler.variance_type == "learned":
        return predicted**0.5 * noise
    if index is None:
        low, high = rows.logs[row].tolist()
    else:
        logs = scheduler._engine.tables.on(rows.logs, like.device)
        at = as_dtype(logs[index], promote(like.dtype, torch.float32))
        low, high = (value.reshape(-1, *(1,) * (like.dim() - 1)) for value in at.unbind(1))
    share = (predicted + 1) / 2
    return torch.exp(0.5 * (share * high + (1 - share) * low)) * noise


def estimated(table: Tensor) -> tuple[Tensor, Tensor]:
    """DDPMRows of x0 = p x + q m alone, and the rows of a learned step that takes this x0 as m."""
    clean = table_of(len(table), p=column(table, "p"), q=column(table, "q"), b=1.0)
    return clean, with_columns(table, p=0.0, q=1.0)

"""diffusers' DDPMScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler as Original
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from diffkern import ops
from diffkern.compat.diffusers._engine import as_dtype, column, host, plan_of, promote, table_of
from diffkern.compat.diffusers._plans import thresholded
from diffkern.compat.diffusers._times import FusedVP, to_x0
from diffkern.plan import Plan

LEARNED = ("learned", "learned_range")


class DDPMScheduler(FusedVP, Original):
    """x' = mu(x, x0) + std z, arXiv 2006.11239, eq. 7; std by ``variance_type``, "fixed_large_log" as sqrt(beta)."""

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
        row, index = self._dk_row(timestep, sample.device)
        strided = self.custom_timesteps or self.num_inference_steps
        if strided and index is None and row not in self._dk_clock.positions:
            self.previous_timestep(timestep)  # raises, as the original does
        both, predicted = model_output, None
        if model_output.shape[1] == sample.shape[1] * 2 and self.variance_type in LEARNED:
            model_output, predicted = torch.split(model_output, sample.shape[1], dim=1)
        draws = index is not None or row > 0
        noise, seeds = self._dk_noise(model_output, generator) if draws else (None, None)
        operands: dict[str, Any] = {"row": row, "index": index}
        if predicted is not None and self._dk_in_range(sample, model_output):
            found: Any = self._dk_run_learned(sample, both, noise, seeds, **operands)
        else:
            if draws and self.variance_type in LEARNED:
                noise, seeds = self._dk_learned(predicted, row, index, noise, seeds, model_output), None
            operands.update(table=self._dk_tables()[0], noise=noise, seeds=seeds)
            if self.config.thresholding:
                found = self._dk_thresholded(sample, model_output, **operands)
            else:
                found = self._dk_run(sample, model_output, want_x0=True, **operands)
        if not return_dict:
            return found[:2]
        return DDPMSchedulerOutput(prev_sample=found[0], pred_original_sample=found[1])

    def plan(self) -> Plan:
        """The steps of the current timesteps as a plan for `diffkern.sample`."""
        if self.variance_type == "learned":
            raise ValueError("a plan has a fixed variance or a range of it, got variance_type='learned': use step")
        table, times = self._dk_tables()[0][self._dk_clock.timesteps.cpu()], self._dk_clock.times
        learned = None
        if self.variance_type == "learned_range":
            learned = self._dk_tables()[2][self._dk_clock.timesteps.cpu(), -2:]
        return thresholded(plan_of("ddpm", table, times, self.config.prediction_type, learned=learned), self.config)

    def _dk_tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """One row a training timestep: the steps; [T, 2] log-variances ln beta~ and ln beta; the rows of
        `ops.learned_step`."""
        strided = bool(self.custom_timesteps or self.num_inference_steps)
        key = ("rows", self.num_inference_steps, strided, self._dk_exact, self.variance_type)
        sources = (self._dk_clock, self.alphas_cumprod, self._internal_dict)
        return self._dk_cached(key, sources, lambda: self._dk_build(strided))

    def _dk_build(self, strided: bool) -> tuple[Tensor, Tensor, Tensor]:
        config, abar = self.config, host(self.alphas_cumprod, self._dk_exact)
        rows = len(abar)
        if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"prediction_type given as {config.prediction_type} must be one of `epsilon`, `sample` or"
                " `v_prediction`  for the DDPMScheduler."
            )
        before = torch.arange(rows) - 1
        if strided:
            times = [int(t) for t in self._dk_clock.times]
            for t, following in zip(times, [*times[1:], -1], strict=True):
                before[t] = following
        to = torch.where(before >= 0, abar[before.clamp(0, rows - 1)], torch.ones((), dtype=abar.dtype))
        # In the original's order and its float32: beta is a difference of nearby numbers, and rounding is part of it.
        alpha = abar / to
        beta = 1 - alpha
        small = torch.clamp((1 - to) / (1 - abar) * beta, min=1e-20)
        from_x0 = to**0.5 * beta / (1 - abar)
        from_x = alpha**0.5 * (1 - to) / (1 - abar)
        std = self._dk_std(small, beta).double()
        std[0] = 0.0
        p, q = to_x0(config.prediction_type, abar)
        clip = config.clip_sample_range if config.clip_sample and not config.thresholding else float("inf")
        known = {"known_s": (to**0.5).double(), "known_n": ((1 - to) ** 0.5).double()}
        table = table_of(rows, p=p, q=q, clip=clip, a=from_x.double(), b=from_x0.double(), g=std, **known)
        self._dk_streams(table)
        logs = torch.stack([small.log(), beta.log()], 1).double()
        middle, half = (logs[:, 1] + logs[:, 0]) / 2, (logs[:, 1] - logs[:, 0]) / 2
        return table, logs, torch.cat([table, middle[:, None], half[:, None]], 1)

    def _dk_std(self, small: Tensor, beta: Tensor) -> Tensor:
        kind = self.config.variance_type
        if self.variance_type in LEARNED:
            return torch.ones_like(small)  # the noise comes multiplied by its std
        if kind == "fixed_large_log":
            return torch.exp(0.5 * beta.log())  # the original takes the root of a negative logarithm: NaN
        return (beta if kind == "fixed_large" else small) ** 0.5

    def _dk_in_range(self, *inputs: Tensor) -> bool:
        """Whether `ops.learned_step` runs the step: a range of variances, no gradient, no threshold of diffusers'."""
        config = self.config
        if self.variance_type != "learned_range" or (config.thresholding and not config.sample_max_value >= 1.0):
            return False
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs))

    def _dk_run_learned(
        self, x: Tensor, m: Tensor, noise: Tensor | None, seeds: Tensor | None, row: int, index: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """std = exp((r0 + r1 v)/2) made in the op of the step; with a threshold x0 takes the place of the model's
        first half: two ops and a copy before it."""
        state, table = promote(x.dtype, m.dtype), self._dk_tables()[2]
        if self.config.thresholding:
            first, table = self._dk_cached(("split learned", id(table)), (table,), lambda: estimated(table))
            values, variance = m.split(x.shape[1], 1)
            x0 = self._dk_threshold(self._dk_run(x, values, table=first, row=row, index=index)[0])
            m = torch.cat([x0, as_dtype(variance, state)], 1)
        if index is not None:
            table = self._dk_on(table, x.device)
        noise = None if noise is None else as_dtype(noise, state)
        operands: dict[str, Any] = {"row": row, "index": index, "noise": noise, "seeds": seeds}
        return ops.learned_step(as_dtype(x, state), m, table=table, want_x0=True, **operands)

    def _dk_learned(
        self,
        predicted: Tensor | None,
        row: int,
        index: Tensor | None,
        noise: Tensor | None,
        seeds: Tensor | None,
        like: Tensor,
    ) -> Tensor:
        """The noise times the standard deviation that the model predicts."""
        if predicted is None:
            raise TypeError(
                f"model_output must have twice the channels of sample for variance_type={self.variance_type!r}, "
                f"got {list(like.shape)}"
            )
        table, logs, _ = self._dk_tables()
        if noise is None:
            assert seeds is not None
            stream = int(column(table, "stream")[row])
            noise = ops.randn(like.shape, seeds, stream, dtype=like.dtype)
        if self.variance_type == "learned":
            return predicted**0.5 * noise
        if index is None:
            low, high = logs[row].tolist()
        else:
            at = as_dtype(self._dk_on(logs, like.device)[index], promote(like.dtype, torch.float32))
            low, high = (value.reshape(-1, *(1,) * (like.dim() - 1)) for value in at.unbind(1))
        share = (predicted + 1) / 2
        return torch.exp(0.5 * (share * high + (1 - share) * low)) * noise


def estimated(table: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x0 = p x + q m alone, and the rows of a learned step that takes this x0 as m."""
    clean, rest = table_of(len(table), p=column(table, "p"), q=column(table, "q"), b=1.0), table.clone()
    column(rest, "p")[:], column(rest, "q")[:] = 0.0, 1.0
    return clean, rest

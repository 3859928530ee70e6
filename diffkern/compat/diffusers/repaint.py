"""diffusers' RePaintScheduler on two fused ops a step: the unknown part, and the known part with the blend."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import RePaintScheduler as Original
from diffusers.schedulers.scheduling_repaint import RePaintSchedulerOutput
from torch import Tensor

from diffkern import streams
from diffkern.compat.diffusers._engine import as_dtype, column, host, promote, table_of
from diffkern.compat.diffusers._times import FusedTimes, to_x0

CALLS = 1 << 20
"""Noise by address: the streams of a scheduler's calls, so that a timestep that is visited again draws new noise."""


class RePaintScheduler(FusedTimes, Original):
    """DDIM inside the mask, the re-noised original outside, arXiv 2201.09865; both parts use one noise as the original
    does, unless ``diffkern(exact=True)`` gives them one each."""

    betas: Tensor
    eta: float
    final_alpha_cumprod: Tensor

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        original_image: Tensor,
        mask: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step, as the original's: ``mask`` is 1 where ``original_image`` is known."""
        row, index = self._dk_row(timestep, sample.device)
        unknown, known = self._dk_rows()
        noise, seeds = self._dk_noise(model_output, generator)
        state = promote(sample.dtype, model_output.dtype)
        state = promote(state, original_image.dtype)
        if mask.is_floating_point():
            state = promote(state, mask.dtype)
            mask = as_dtype(mask, state)
        other, other_row = noise, row
        if seeds is not None:
            unknown, known, row, index = self._dk_called(unknown, known, row, index)
            other_row = row
        elif self._dk_exact:
            other = self._dk_noise(model_output, generator)[0]
        operands: dict[str, Any] = {"seeds": seeds, "index": index, "state": state}
        inside, clean, _, _ = self._dk_run(
            sample, model_output, table=unknown, row=row, noise=noise, want_x0=True, **operands
        )
        out = self._dk_run(
            original_image.expand(sample.shape),
            None,
            table=known,
            row=other_row,
            noise=other,
            mask=mask.expand(sample.shape),
            known=inside,
            **operands,
        )[0]
        if not return_dict:
            return out, clean
        return RePaintSchedulerOutput(prev_sample=out, pred_original_sample=clean)

    def undo_step(
        self, sample: Tensor, timestep: int, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Tensor:
        """x <- sqrt(1 - beta) x + sqrt(beta) z for the timesteps of one step: an op each, as many as the draws."""
        row, index = self._dk_row(timestep, sample.device)
        if index is not None:
            raise ValueError(f"timestep must be one for all samples in undo_step, got shape {list(index.shape)}")
        table = self._dk_cached(("undo",), (self.betas,), self._dk_undo_rows)
        for i in range(self.config.num_train_timesteps // self.num_inference_steps):
            if row + i >= len(table):
                self.betas[row + i]  # the original's exception
            noise, seeds = self._dk_noise(sample, generator)
            one = table[row + i : row + i + 1]
            if seeds is not None:
                one = self._dk_streamed(one, 0, self._dk_call())
            sample = self._dk_run(sample, None, table=one, noise=noise, seeds=seeds)[0]
        return sample

    # ------------------------------------------------------------------------------------------------ noise by address
    def _dk_call(self) -> int:
        """The number of this draw since `set_timesteps`."""
        clock, count = self.__dict__.get("_dk_calls", (None, 0))
        count = count + 1 if clock is self._dk_clock else 0
        self.__dict__["_dk_calls"] = (self._dk_clock, count)
        return count

    def _dk_streamed(self, row: Tensor, first: int, call: int) -> Tensor:
        row = row.clone()
        column(row, "stream")[:] = streams.STEP + first + CALLS + 2 * call
        return row

    def _dk_called(
        self, unknown: Tensor, known: Tensor, row: int, index: Tensor | None
    ) -> tuple[Tensor, Tensor, int, Tensor | None]:
        """The rows with the streams of this call, the same for both parts unless exact."""
        call, apart = self._dk_call(), int(self._dk_exact)
        if index is None:
            unknown, known = unknown[row : row + 1], known[row : row + 1]
        return self._dk_streamed(unknown, 0, call), self._dk_streamed(known, apart, call), 0, index

    # ------------------------------------------------------------------------------------------------ the rows
    def _dk_rows(self) -> tuple[Tensor, Tensor]:
        sources = (self.alphas_cumprod, self.final_alpha_cumprod, self._internal_dict)
        key = ("rows", self.num_inference_steps, self._dk_exact, self.eta)
        return self._dk_cached(key, sources, self._dk_build)

    def _dk_build(self) -> tuple[Tensor, Tensor]:
        abar = host(self.alphas_cumprod, self._dk_exact)
        rows = len(abar)
        before = torch.arange(rows) - self.config.num_train_timesteps // self.num_inference_steps
        last = host(self.final_alpha_cumprod, self._dk_exact).to(abar.dtype)
        to = torch.where(before >= 0, abar[before.clamp(0, rows - 1)], last)
        std = self.eta * ((1 - to) / (1 - abar) * (1 - abar / to)) ** 0.5
        along = (1 - to - std**2).clamp(min=0.0) ** 0.5
        g = std.double().clone()
        g[0] = 0.0
        p, q = to_x0("epsilon", abar)
        clip = 1.0 if self.config.clip_sample else float("inf")
        alpha, sigma = (to**0.5).double(), ((1 - to) ** 0.5).double()
        unknown = table_of(rows, p=p, q=q, clip=clip, b=alpha, d=along.double(), g=g if self.eta > 0 else 0.0)
        return unknown, table_of(rows, a=alpha, g=sigma, known_s=1.0)

    def _dk_undo_rows(self) -> Tensor:
        betas = host(self.betas)
        return table_of(len(betas), a=((1 - betas) ** 0.5).double(), g=(betas**0.5).double())

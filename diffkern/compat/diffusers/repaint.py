"""diffusers' RePaintScheduler on two fused ops a step: the unknown part, and the known part with the blend."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import RePaintScheduler as Original
from diffusers.schedulers.scheduling_repaint import RePaintSchedulerOutput
from torch import Tensor

from diffkern import streams
from diffkern.compat.diffusers._engine import Attached, DropIn
from diffkern.compat.diffusers._host import host
from diffkern.compat.diffusers._times import TimesEngine, to_x0
from diffkern.compat.kit.rows import as_dtype, column, promote, table_of

CALLS = 1 << 20
"""Noise by address: the streams of a scheduler's calls, so that a timestep that is visited again draws new noise."""


class RePaintScheduler(DropIn, Original):
    """DDIM inside the mask, the re-noised original outside, arXiv 2201.09865; both parts use one noise as the original
    does, unless ``diffkern(exact=True)`` gives them one each."""

    _engine = Attached(TimesEngine)

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
        """One step, as the original's: ``mask`` is 1 (an integer: not 0) where ``original_image`` is known."""
        engine = self._engine
        row, index = engine.row(self, timestep, sample.device)
        unknown, known = tables_for(self)
        noise, seeds = engine.noise(model_output, generator)
        state = promote(sample.dtype, model_output.dtype, original_image.dtype)
        if mask.is_floating_point():
            state = promote(state, mask.dtype)
            mask = as_dtype(mask, state)
        else:
            mask = mask != 0
        x, narrow = engine.start_from(sample, state, *(place := self._place(index)))
        if narrow:
            mask = as_dtype(mask, torch.float32) if mask.is_floating_point() else mask
            state = torch.float32
        other, other_row = noise, row
        if seeds is not None:
            call, apart = engine.call_number(self.timesteps), int(engine.exact)
            if index is None:
                unknown, known, row = unknown[row : row + 1], known[row : row + 1], 0
            unknown, known = streamed(unknown, call, 0), streamed(known, call, apart)
            other_row = row
        elif engine.exact:
            other, _ = engine.noise(model_output, generator)
        operands: dict[str, Any] = {"seeds": seeds, "index": index, "state": state}
        inside, clean, _, _ = engine.run(x, model_output, table=unknown, row=row, noise=noise, want_x0=True, **operands)
        operands.update(table=known, row=other_row, noise=other, mask=mask.expand(sample.shape), known=inside, **narrow)
        out, _, _, narrowed = engine.run(original_image.expand(sample.shape), None, **operands)
        if narrowed is not None:
            engine.carry(out, narrowed, *place)
            out = narrowed
        clean = as_dtype(clean, out.dtype)
        if not return_dict:
            return out, clean
        return RePaintSchedulerOutput(prev_sample=out, pred_original_sample=clean)

    def _place(self, index: Tensor | None) -> tuple[Any, Any]:
        """A place for the states of the whole run, whose steps go to and fro; none where samples have their own."""
        return self._engine.clock(self.timesteps), None if index is not None else 0

    def undo_step(
        self, sample: Tensor, timestep: int, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Tensor:
        """x <- sqrt(1 - beta) x + sqrt(beta) z for the timesteps of one step: an op each, as many as the draws."""
        engine = self._engine
        row, index = engine.row(self, timestep, sample.device)
        if index is not None:
            raise ValueError(f"timestep must be one for all samples in undo_step, got shape {list(index.shape)}")
        table = engine.tables.get(("undo",), lambda: undo_table(self.betas), self.betas)
        dtype, place = sample.dtype, self._place(None)
        sample, narrow = engine.start_from(sample, dtype, *place)
        for i in range(self.config.num_train_timesteps // self.num_inference_steps):
            if row + i >= len(table):
                self.betas[row + i]  # the original's exception
            noise, seeds = engine.noise(sample, generator, dtype)
            one = table[row + i : row + i + 1]
            if seeds is not None:
                one = streamed(one, engine.call_number(self.timesteps), 0)
            sample, *_ = engine.run(sample, None, table=one, noise=noise, seeds=seeds)
        if narrow:
            out = as_dtype(sample, dtype)
            engine.carry(sample, out, *place)
            return out
        return sample


def streamed(table: Tensor, call: int, part: int) -> Tensor:
    """The rows with the stream of a call; its two parts may have one each."""
    copy = table.clone()
    column(copy, "stream").fill_(streams.STEP + part + CALLS + 2 * call)
    return copy


def tables_for(scheduler: RePaintScheduler) -> tuple[Tensor, Tensor]:
    """The rows of the unknown and of the known part, one a training timestep."""
    engine = scheduler._engine
    return engine.tables.get(
        ("rows", scheduler.num_inference_steps, engine.exact, scheduler.eta),
        lambda: made(scheduler),
        *(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, scheduler._internal_dict),
    )


def made(scheduler: RePaintScheduler) -> tuple[Tensor, Tensor]:
    exact, config, eta = scheduler._engine.exact, scheduler.config, scheduler.eta
    abar = host(scheduler.alphas_cumprod, exact)
    rows = len(abar)
    before = torch.arange(rows) - config.num_train_timesteps // scheduler.num_inference_steps
    last = host(scheduler.final_alpha_cumprod, exact).to(abar.dtype)
    to = torch.where(before >= 0, abar[before.clamp(0, rows - 1)], last)
    std = eta * ((1 - to) / (1 - abar) * (1 - abar / to)) ** 0.5
    along = (1 - to - std**2).clamp(min=0.0) ** 0.5
    g = std.double().clone()
    g[0] = 0.0
    p, q = to_x0("epsilon", abar)
    clip = 1.0 if config.clip_sample else float("inf")
    alpha, sigma = (to**0.5).double(), ((1 - to) ** 0.5).double()
    unknown = table_of(rows, p=p, q=q, clip=clip, b=alpha, d=along.double(), g=g if eta > 0 else 0.0)
    return unknown, table_of(rows, a=alpha, g=sigma, known_s=1.0)


def undo_table(betas: Tensor) -> Tensor:
    """The rows that add a timestep's noise."""
    betas = host(betas)
    return table_of(len(betas), a=((1 - betas) ** 0.5).double(), g=(betas**0.5).double())

"""diffusers' ScoreSdeVeScheduler: predictor on one fused op, corrector on one fused op and two norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import ScoreSdeVeScheduler as Original
from diffusers.schedulers.scheduling_sde_ve import SdeVeOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffkern import ops, streams
from diffkern.compat.diffusers._engine import Attached, DropIn, Engine
from diffkern.compat.diffusers._host import host
from diffkern.compat.kit.rows import AT, check_room, promote, table_of
from diffkern.modes import readable

CORRECTOR = 1 << 20
"""Noise by address: the corrector's calls draw on ``streams.STEP + CORRECTOR`` + their number."""


class ScoreSdeVeScheduler(DropIn, Original):
    """Reverse diffusion of the variance exploding SDE with Langevin corrections, arXiv 2011.13456."""

    _engine = Attached(Engine)

    discrete_sigmas: Tensor

    def step_pred(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x' = x + G^2 score + G z with G^2 = sigma_i^2 - sigma_(i-1)^2, as the original's."""
        check(self)
        engine = self._engine
        row, index = row_of(self, timestep, sample)
        if sample.dtype is torch.float16 and (index is None or readable(index)):
            check_room(sample.dtype, self, host(self.discrete_sigmas)[row if index is None else index])
        noise, seeds = engine.noise(sample, generator)
        operands: dict[str, Any] = {"row": row, "index": index, "noise": noise, "seeds": seeds}
        operands.update(table=table_for(self), state=state_of(sample, model_output))
        out, _, mean, _ = engine.run(sample, model_output, want_s=True, **operands)
        return SdeVeOutput(prev_sample=out, prev_sample_mean=mean) if return_dict else (out, mean)

    def step_correct(
        self,
        model_output: Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x' = x + step score + sqrt(2 step) z, step = 2 (snr |z| / |score|)^2 with norms averaged over the batch, as
        the original's; ``diffkern(exact=True)`` takes each sample's own norms."""
        check(self)
        engine, state = self._engine, state_of(sample, model_output)
        if engine.rng == "torch":
            noise = randn_tensor(sample.shape, layout=sample.layout, generator=generator).to(sample.device)
        else:
            count = engine.call_number(self.timesteps)
            seeds = engine.seeds_of(sample, generator)
            noise = ops.randn(sample.shape, seeds, streams.STEP + CORRECTOR + count)
        flat = (t.reshape(t.shape[0], -1) for t in (model_output, noise))
        grad_norm, noise_norm = (torch.linalg.vector_norm(t, dim=1) for t in flat)
        if not engine.exact:
            grad_norm, noise_norm = grad_norm.mean(), noise_norm.mean()
        # A row a sample (one for all) on the device of the state: its numbers never come to the host.
        n = grad_norm.numel()
        zero, before, between, after = engine.tables.get(
            ("correct", n, str(sample.device)), lambda: around_d_and_g(n, sample.device)
        )
        g = (noise_norm / grad_norm).double().reshape(-1, 1) * (2.0 * self.config.snr)  # sqrt(2 step)
        table = torch.cat([before, torch.addcmul(zero, g, g, value=0.5), between, g, after], 1)
        index = torch.arange(n, device=sample.device) if n > 1 else None
        out, *_ = engine.run(sample, model_output, table=table, index=index, noise=noise, state=state)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def add_noise(self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor) -> Tensor:
        """x + sigma noise in one op."""

        def scales() -> Tensor:
            sigma = host(self.discrete_sigmas, exact=True)
            return torch.stack([torch.ones_like(sigma), sigma], 1)

        x = original_samples
        noise = torch.randn_like(x) if noise is None else noise
        x = x.to(promote(x.dtype, self.discrete_sigmas.dtype))
        return self._engine.noised(x, noise, timesteps, scales, ("add",), self.discrete_sigmas)


def check(scheduler: ScoreSdeVeScheduler) -> None:
    """The original's error before `set_timesteps`."""
    if scheduler.timesteps is None:
        raise ValueError("`self.timesteps` is not set, you need to run 'set_timesteps' after creating the scheduler")


def row_of(scheduler: ScoreSdeVeScheduler, timestep: Any, sample: Tensor) -> tuple[int, Tensor | None]:
    """Timestep t in (0, 1] is level floor(t (N - 1)), in float32 as the original computes it."""
    last, clock = len(scheduler.timesteps) - 1, scheduler._engine.clock(scheduler.timesteps)
    if clock.position(timestep) is None and isinstance(timestep, Tensor) and timestep.numel() > 1:
        return 0, (timestep.to(sample.device, torch.float32) * last).long()
    row = int(np.float32(clock.value(timestep)) * np.float32(last))
    if not 0 <= row < len(scheduler.discrete_sigmas):
        scheduler.discrete_sigmas[row]  # the original's exception
        raise IndexError(f"timestep must lie in [0, 1], got {timestep!r}")
    return row, None


def table_for(scheduler: ScoreSdeVeScheduler) -> Tensor:
    """The predictor's rows, one a level."""
    engine, sigmas, steps = scheduler._engine, scheduler.discrete_sigmas, len(scheduler.timesteps)

    def build() -> Tensor:
        sigma = host(sigmas, engine.exact)
        before = torch.cat([torch.zeros_like(sigma[:1]), sigma[:-1]])
        g = (sigma**2 - before**2) ** 0.5
        square = (g**2).double()
        number = (steps - 1 - torch.arange(len(sigma))).clamp(min=0)  # the last level is the first step
        levels = {"known_s": 1.0, "known_n": before.double(), "stream": streams.STEP + number.double()}
        return table_of(len(sigma), a=1.0, d=square, g=g.double(), A=1.0, D=square, **levels)

    return engine.tables.get(("rows", steps, engine.exact), build, sigmas)


def state_of(sample: Tensor, model_output: Tensor) -> torch.dtype:
    """The original multiplies by float32 tensors [B, 1, ...]: half precision becomes float32."""
    return promote(sample.dtype, model_output.dtype, torch.float32)


def around_d_and_g(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zeros [n, 1], and the columns of n rows a = 1 before d, between d and g, and after g."""
    table, d, g = table_of(n, a=1.0).to(device), AT["d"], AT["g"]
    return table[:, d : d + 1], table[:, :d], table[:, d + 1 : g], table[:, g + 1 :]

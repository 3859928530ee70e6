"""diffusers' FlowMatchEulerDiscreteScheduler and FlowMatchHeunDiscreteScheduler on one fused op a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler as OriginalEuler
from diffusers import FlowMatchHeunDiscreteScheduler as OriginalHeun
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteSchedulerOutput
from torch import Tensor

from diffkern import ops, streams
from diffkern.compat.diffusers._engine import as_dtype, column, plan_of, table_of
from diffkern.compat.diffusers._levels import FusedSigma, churned
from diffkern.compat.diffusers.euler import refuse_integers
from diffkern.plan import Plan


class _Flow(FusedSigma):
    """What both share: the levels of ``diffkern(exact=True)``."""

    sigma_min: float
    sigma_max: float

    @contextmanager
    def _dk_unshifted(self) -> Iterator[None]:
        """The original keeps the ends of its grid shifted and shifts the grid between them again; ``exact`` starts from
        the ends that the training levels 1/T .. 1 have."""
        ends = self.sigma_min, self.sigma_max
        if self._dk_exact:
            self.sigma_min, self.sigma_max = 1 / self.config.num_train_timesteps, 1.0
        try:
            yield
        finally:
            self.sigma_min, self.sigma_max = ends


class FlowMatchEulerDiscreteScheduler(_Flow, OriginalEuler):
    """x' = x + (sigma' - sigma) m for x = (1 - sigma) x0 + sigma z and the velocity m = z - x0 (arXiv 2209.03003).

    ``stochastic_sampling``: x' = (1 - sigma') x0 + sigma' z with x0 = x - sigma m and new noise z. The default
    levels are the original's, which shifts them twice; with ``diffkern(exact=True)``, set before `set_timesteps`, once.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """The original's."""
        with self._dk_unshifted():
            OriginalEuler.set_timesteps(self, num_inference_steps, device, sigmas, mu, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One step, as the original's, which reads none of the s_ arguments. ``timestep`` may also be one a sample,
        [B], while no loop is under way. ``per_token_timesteps`` [B, T] for samples [B, T, C]: every token goes from its
        own level to the next lower one of the schedule, by + (sigma - sigma') m as in the original (its caller negates
        the model's output), and the result is not cast to the model's dtype."""
        if per_token_timesteps is None:
            found = self._dk_quick(model_output, timestep, sample, self._dk_exact, False)
            if found is not None:
                return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=found[0]) if return_dict else found[:1]
        refuse_integers(timestep, "FlowMatchEulerDiscreteScheduler.step()")
        row, index = self._dk_at(timestep, sample.device)
        prev_sample: Any
        if per_token_timesteps is not None:
            prev_sample = self._dk_per_token(model_output, sample, per_token_timesteps, row, generator)
        else:
            noise = seeds = None
            table, stochastic = self._dk_rows()
            self._dk_in_range(row, table)
            if stochastic:
                noise, seeds = self._dk_noise(sample, generator, torch.float32)
            prev_sample, _, _ = self._dk_upcast(
                sample, model_output, table=table, row=row, index=index, noise=noise, seeds=seeds
            )
            if not stochastic:
                self._dk_warm(self._dk_exact, table)
        if index is None:
            self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """sigma z + (1 - sigma) x0 in one op; sigma in float32 whatever the sample's dtype."""
        if noise is None:
            raise TypeError("noise must be a tensor, got None")
        return self._dk_mixed(sample, noise, timestep, "noise", lambda: (1 - self._dk_levels, self._dk_levels))

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`."""
        return plan_of("flow_match_euler", self._dk_rows()[0], self._dk_clock.times, "velocity", time_dtype="float32")

    def _dk_rows(self) -> tuple[Tensor, bool]:
        """The table, and whether its rows draw noise."""

        def build() -> tuple[Tensor, bool]:
            sigma, to = self._dk_levels[:-1], self._dk_levels[1:]
            stochastic = bool(self.config.stochastic_sampling)
            moves = _moves(sigma, to, to - sigma, stochastic)
            return table_of(len(sigma), **moves, known_s=1 - to, known_n=to), stochastic

        return self._dk_table(("rows",), build)

    def _dk_per_token(self, m: Tensor, x: Tensor, timesteps: Tensor, row: int, generator: Any) -> Tensor:
        """One row a token, made on the device from the tokens' times; the tokens are the op's samples."""
        levels, stochastic = self.sigmas.to(x.device), self.config.stochastic_sampling
        now = timesteps / self.config.num_train_timesteps
        lower = torch.where(levels[:, None, None] < now - 1e-6, levels[:, None, None], 0.0).amax(0)
        shape = (*x.shape[:-1], 1)
        sigma, to = (v[..., None].expand(shape).reshape(-1) for v in (now, lower))
        tokens = len(sigma)
        blank = self._dk_cached(("blank", str(x.device)), (), lambda: table_of(1).to(x.device))
        table = blank.repeat(tokens, 1)
        for name, value in _moves(sigma, to, sigma - to, stochastic).items():
            column(table, name)[:] = value
        state = torch.promote_types(torch.promote_types(torch.float32, m.dtype), now.dtype)
        noise = None
        if stochastic:
            noise, seeds = self._dk_noise(x, generator, torch.float32)
            if seeds is not None:
                noise = ops.randn(x.shape, seeds, streams.STEP + row)
            assert noise is not None
            noise = as_dtype(noise, state).reshape(tokens, -1)
        x = as_dtype(as_dtype(x, torch.float32), state)
        each = self._dk_cached(
            ("tokens", tokens, str(x.device)), (), lambda: torch.arange(tokens, device=x.device, dtype=torch.int64)
        )
        out = ops.step(
            x.reshape(tokens, -1), m.expand(x.shape).reshape(tokens, -1), table=table, index=each, noise=noise
        )
        return out[0].reshape(x.shape)


class FlowMatchHeunDiscreteScheduler(_Flow, OriginalHeun):
    """x' = x + (d1 + d2)/2 (sigma' - sigma_hat) in two calls, with churn in the first (arXiv 2206.00364, algorithm 2).

    As in the original d1 = m sigma/sigma_hat, and d2 = m whatever noise the second call draws. Levels as in
    `FlowMatchEulerDiscreteScheduler`.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """The original's."""
        with self._dk_unshifted():
            OriginalHeun.set_timesteps(self, num_inference_steps, device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchHeunDiscreteSchedulerOutput | tuple[Tensor]:
        """One call, as the original's. The first keeps x_hat and d1, the second replaces what the first returned; its
        noise is drawn where the original draws it, and cancels."""
        refuse_integers(timestep, "FlowMatchHeunDiscreteScheduler.step()")
        row = self._dk_one(timestep, sample)
        first, second, draws, onward = self._dk_rows(s_churn, s_tmin, s_tmax, s_noise)
        self._dk_in_range(row, first if self.state_in_first_order else second)
        if self.state_in_first_order:
            noise, seeds = self._dk_noise(model_output, generator) if draws[row] else (None, None)
            prev_sample, hat, slope = self._dk_upcast(
                sample, model_output, table=first, row=row, noise=noise, seeds=seeds, want_x0=draws[row], want_s=True
            )
            self.prev_derivative = slope
            self.sample = as_dtype(sample, torch.float32) if hat is None else hat
            self.dt = onward[row]
        else:
            if draws[row - 1] and self._dk_rng == "torch":
                self._dk_noise(model_output, generator)
            prev_sample, _, _ = self._dk_upcast(
                sample, model_output, self.sample, self.prev_derivative, table=second, row=row
            )
            self.prev_derivative = self.dt = self.sample = None
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return FlowMatchHeunDiscreteSchedulerOutput(prev_sample=prev_sample)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """sigma z + (1 - sigma) x0 in one op, at the loop's step, or at the timestep where none has begun."""
        row = self._dk_one(timestep, sample)
        shape = torch.broadcast_shapes(sample.shape, noise.shape)
        sample, noise = sample.expand(shape), noise.expand(shape)
        return self._dk_mixed_at(sample, noise, row, "noise", lambda: (1 - self._dk_levels, self._dk_levels))

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps`, without churn, as a plan for `diffkern.sample`."""
        first, second, *_ = self._dk_rows(0.0, 0.0, float("inf"), 1.0)
        odd = torch.arange(len(first)) % 2 == 1
        saves: list[Any] = [() if at else ((0, "x"), (1, "s")) for at in odd.tolist()]
        saves[-1] = ()  # the last step is Euler's
        times, table = self._dk_clock.times, torch.where(odd[:, None], second[:-1], first)
        plan = plan_of("flow_match_heun", table, times, "velocity", saves=saves, time_dtype="float32")
        return replace(plan, rows=tuple(replace(row, ends_step=not row.saves) for row in plan.rows))

    def _dk_rows(self, *churn: float) -> tuple[Tensor, Tensor, list[bool], tuple[Tensor, ...]]:
        """Tables of the first calls and of the second, which first calls draw noise, and the original's ``dt``."""
        churn = tuple(map(float, churn))

        def build() -> tuple[Tensor, Tensor, list[bool], tuple[Tensor, ...]]:
            levels = self._dk_levels
            sigma, to = levels[:-1], levels[1:]
            hat, n = churned(levels, *churn)
            less = torch.where(hat > 0, sigma / hat, torch.ones_like(hat))
            draws = hat > sigma
            own = torch.where(draws, torch.zeros_like(hat), torch.ones_like(hat))  # x itself where x_hat is x
            known = {"known_s": 1 - to, "known_n": to}
            first = table_of(len(hat), p=1.0, r=n, a=own, b=1 - own, d=less * (to - hat), D=less, **known)
            half = torch.cat([torch.zeros(1, dtype=torch.float64), to - hat]) / 2
            second = table_of(len(levels), d=half, e0=1.0, e1=half, known_s=1 - levels, known_n=levels)
            return first, second, draws.tolist(), (to - hat).float().to(self.sigmas.device).unbind()

        return self._dk_table(("rows", *churn), build)


def _moves(sigma: Tensor, to: Tensor, step: Tensor, stochastic: bool) -> dict[str, Any]:
    """The columns of a row: x' = x + step m, or x' = (1 - to)(x - sigma m) + to z."""
    if stochastic:
        return {"a": 1 - to, "d": -(1 - to) * sigma, "g": to}
    return {"a": 1.0, "d": step}

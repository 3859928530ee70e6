"""diffusers' FlowMatchEulerDiscreteScheduler and FlowMatchHeunDiscreteScheduler on one fused op a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler as OriginalEuler
from diffusers import FlowMatchHeunDiscreteScheduler as OriginalHeun
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteSchedulerOutput
from torch import Tensor

from diffkern import ops, streams
from diffkern.compat.diffusers._engine import Attached, DropIn, Rows
from diffkern.compat.diffusers._host import refuse_integers
from diffkern.compat.diffusers._level_rows import churned
from diffkern.compat.diffusers._levels import LevelsEngine, check_row
from diffkern.compat.diffusers._plans import plan_of
from diffkern.compat.kit.rows import as_dtype, column, promote, table_of
from diffkern.plan import Plan


class FlowEngine(LevelsEngine):
    """The levels of ``diffkern(exact=True)``, and noising."""

    @contextmanager
    def unshifted(self, scheduler: Any) -> Iterator[None]:
        """The original keeps the ends of its grid shifted and shifts the grid between them again; ``exact`` starts from
        the ends that the training levels 1/T .. 1 have."""
        ends = scheduler.sigma_min, scheduler.sigma_max
        if self.exact:
            scheduler.sigma_min, scheduler.sigma_max = 1 / scheduler.config.num_train_timesteps, 1.0
        try:
            yield
        finally:
            scheduler.sigma_min, scheduler.sigma_max = ends

    def scales(self, scheduler: Any) -> tuple[Tensor, Tensor]:
        """(1 - sigma, sigma) at each level."""
        levels = self.levels(scheduler)
        return 1 - levels, levels


class FlowMatchEulerDiscreteScheduler(DropIn, OriginalEuler):
    """x' = x + (sigma' - sigma) m for x = (1 - sigma) x0 + sigma z and the velocity m = z - x0 (arXiv 2209.03003).

    ``stochastic_sampling``: x' = (1 - sigma') x0 + sigma' z with x0 = x - sigma m and new noise z. The default
    levels are the original's, which shifts them twice; with ``diffkern(exact=True)``, set before `set_timesteps`, once.
    """

    _engine = Attached(FlowEngine)

    def _init_step_index(self, timestep: Any) -> None:
        self._engine.start(self, timestep)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """The original's."""
        with self._engine.unshifted(self):
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
        engine = self._engine
        found: Any = None
        if per_token_timesteps is None:
            found = engine.repeat(self, model_output, timestep, sample, engine.exact)
        out: Any
        if found is not None:
            out = found[0]
        else:
            refuse_integers(timestep, "FlowMatchEulerDiscreteScheduler.step()")
            row, index = engine.row(self, timestep, sample.device)
            if per_token_timesteps is not None:
                out = step_of_tokens(self, model_output, sample, per_token_timesteps, row, generator)
            else:
                noise = seeds = None
                rows, stochastic = steps_of(self)
                check_row(self, row, rows.table)
                if stochastic:
                    noise, seeds = engine.noise(sample, generator, torch.float32)
                operands: dict[str, Any] = {"row": row, "index": index, "noise": noise, "seeds": seeds}
                out, *_ = engine.run_upcast(self, rows, sample, model_output, **operands)
                if not stochastic:
                    engine.keep(self, engine.exact, rows)
            if index is None:
                self._step_index += 1
        if not return_dict:
            return (out,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=out)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """sigma z + (1 - sigma) x0 in one op; sigma in float32 whatever the sample's dtype."""
        if noise is None:
            raise TypeError("noise must be a tensor, got None")
        return self._engine.mixed(self, sample, noise, timestep, "noise", lambda: self._engine.scales(self))

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`."""
        table, times = steps_of(self)[0].table, self._engine.clock(self.timesteps).times
        return plan_of("flow_match_euler", table, times, "velocity", time_dtype="float32")


def steps_of(scheduler: FlowMatchEulerDiscreteScheduler) -> tuple[Rows, bool]:
    """The steps of the current sigmas, and whether they draw noise."""
    engine = scheduler._engine

    def build() -> tuple[Rows, bool]:
        levels, stochastic = engine.levels(scheduler), bool(scheduler.config.stochastic_sampling)
        sigma, to = levels[:-1], levels[1:]
        moves = moves_of(sigma, to, to - sigma, stochastic)
        return Rows(table_of(len(sigma), **moves, known_s=1 - to, known_n=to)), stochastic

    return engine.tables.get(("rows", engine.exact), build, *engine.sources(scheduler))


def step_of_tokens(
    scheduler: FlowMatchEulerDiscreteScheduler, m: Tensor, x: Tensor, timesteps: Tensor, row: int, generator: Any
) -> Tensor:
    """One row a token, made on the device from the tokens' times; the tokens are the op's samples."""
    engine, config = scheduler._engine, scheduler.config
    levels, stochastic = scheduler.sigmas.to(x.device), config.stochastic_sampling
    now = timesteps / config.num_train_timesteps
    lower = torch.where(levels[:, None, None] < now - 1e-6, levels[:, None, None], 0.0).amax(0)
    shape = (*x.shape[:-1], 1)
    sigma, to = (v[..., None].expand(shape).reshape(-1) for v in (now, lower))
    tokens = len(sigma)
    blank = engine.tables.get(("blank", str(x.device)), lambda: table_of(1).to(x.device))
    table = blank.repeat(tokens, 1)
    for name, value in moves_of(sigma, to, sigma - to, stochastic).items():
        column(table, name)[:] = value
    state = promote(torch.float32, m.dtype, now.dtype)
    noise = None
    if stochastic:
        noise, seeds = engine.noise(x, generator, torch.float32)
        if seeds is not None:
            noise = ops.randn(x.shape, seeds, streams.STEP + row)
        assert noise is not None
        noise = as_dtype(noise, state).reshape(tokens, -1)
    x = as_dtype(as_dtype(x, torch.float32), state)
    each = engine.tables.get(
        ("tokens", tokens, str(x.device)), lambda: torch.arange(tokens, device=x.device, dtype=torch.int64)
    )
    flat = (x.reshape(tokens, -1), m.expand(x.shape).reshape(tokens, -1))
    out, *_ = ops.step(*flat, table=table, index=each, noise=noise)
    return out.reshape(x.shape)


class Calls(NamedTuple):
    """What the two calls of each step are run with."""

    first: Rows
    churned: Rows
    """The first ones that draw noise: they also give x_hat."""
    second: Rows
    draws: list[bool]
    """Which first calls draw noise."""
    onward: tuple[Tensor, ...]
    """The original's ``dt``."""


class FlowMatchHeunDiscreteScheduler(DropIn, OriginalHeun):
    """x' = x + (d1 + d2)/2 (sigma' - sigma_hat) in two calls, with churn in the first (arXiv 2206.00364, algorithm 2).

    As in the original d1 = m sigma/sigma_hat, and d2 = m whatever noise the second call draws. Levels as in
    `FlowMatchEulerDiscreteScheduler`.
    """

    _engine = Attached(FlowEngine)

    def _init_step_index(self, timestep: Any) -> None:
        self._engine.start(self, timestep)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """The original's."""
        with self._engine.unshifted(self):
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
        engine = self._engine
        row = engine.one_row(self, timestep, sample)
        calls = calls_of(self, s_churn, s_tmin, s_tmax, s_noise)
        check_row(self, row, (calls.first if self.state_in_first_order else calls.second).table)
        if self.state_in_first_order:
            rows, noise, seeds = calls.first, None, None
            if calls.draws[row]:
                rows, (noise, seeds) = calls.churned, engine.noise(model_output, generator)
            start, _ = engine.start_from(sample, model_output.dtype, self.sigmas, row)
            out, hat, slope = engine.run_upcast(self, rows, sample, model_output, row=row, noise=noise, seeds=seeds)
            self.prev_derivative = slope
            self.sample = as_dtype(start, torch.float32) if hat is None else hat
            self.dt = calls.onward[row]
        else:
            if calls.draws[row - 1] and engine.rng == "torch":
                engine.noise(model_output, generator)
            histories = (self.sample, self.prev_derivative)
            out, *_ = engine.run_upcast(self, calls.second, sample, model_output, *histories, row=row)
            self.prev_derivative = self.dt = self.sample = None
        self._step_index += 1
        if not return_dict:
            return (out,)
        return FlowMatchHeunDiscreteSchedulerOutput(prev_sample=out)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """sigma z + (1 - sigma) x0 in one op, at the loop's step, or at the timestep where none has begun."""
        engine = self._engine
        row = engine.one_row(self, timestep, sample)
        shape = torch.broadcast_shapes(sample.shape, noise.shape)
        sample, noise = sample.expand(shape), noise.expand(shape)
        return engine.mixed_at(self, sample, noise, row, "noise", lambda: engine.scales(self))

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps`, without churn, as a plan for `diffkern.sample`."""
        calls = calls_of(self, 0.0, 0.0, float("inf"), 1.0)
        first, second = calls.first.table, calls.second.table
        odd = torch.arange(len(first)) % 2 == 1
        saves: list[Any] = [() if at else ((0, "x"), (1, "s")) for at in odd.tolist()]
        saves[-1] = ()  # the last step is Euler's
        times, table = self._engine.clock(self.timesteps).times, torch.where(odd[:, None], second[:-1], first)
        plan = plan_of("flow_match_heun", table, times, "velocity", saves=saves, time_dtype="float32")
        return replace(plan, rows=tuple(replace(row, ends_step=not row.saves) for row in plan.rows))


def calls_of(scheduler: FlowMatchHeunDiscreteScheduler, *churn: float) -> Calls:
    """The calls of the current sigmas with this churn."""
    engine, churn = scheduler._engine, tuple(map(float, churn))

    def build() -> Calls:
        levels = engine.levels(scheduler)
        sigma, to = levels[:-1], levels[1:]
        hat, n = churned(levels, *churn)
        less = torch.where(hat > 0, sigma / hat, torch.ones_like(hat))
        draws = hat > sigma
        own = torch.where(draws, torch.zeros_like(hat), torch.ones_like(hat))  # x itself where x_hat is x
        known = {"known_s": 1 - to, "known_n": to}
        first = table_of(len(hat), p=1.0, r=n, a=own, b=1 - own, d=less * (to - hat), D=less, **known)
        half = torch.cat([torch.zeros(1, dtype=torch.float64), to - hat]) / 2
        second = table_of(len(levels), d=half, e0=1.0, e1=half, known_s=1 - levels, known_n=levels)
        calls = (Rows(first, want_s=True), Rows(first, want_x0=True, want_s=True), Rows(second))
        return Calls(*calls, draws.tolist(), (to - hat).float().to(scheduler.sigmas.device).unbind())

    return engine.tables.get(("rows", *churn, engine.exact), build, *engine.sources(scheduler))


def moves_of(sigma: Tensor, to: Tensor, step: Tensor, stochastic: bool) -> dict[str, Any]:
    """The columns of a row: x' = x + step m, or x' = (1 - to)(x - sigma m) + to z."""
    if stochastic:
        return {"a": 1 - to, "d": -(1 - to) * sigma, "g": to}
    return {"a": 1.0, "d": step}

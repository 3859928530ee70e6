"""diffusers' DPMSolverMultistepScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler as Original
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from diffkern.compat.diffusers._engine import Attached, DropIn, Rows, fits
from diffkern.compat.diffusers._host import host
from diffkern.compat.diffusers._multistep import MultistepEngine, Past, check_repeats, past_between, ring
from diffkern.compat.diffusers._plans import plan_of, thresholded
from diffkern.compat.kit.rows import SIXTEEN, as_dtype, promote, table_of
from diffkern.plan import Plan


class Steps(NamedTuple):
    """What the steps after a number of earlier ones are run with."""

    rows: Rows
    kept: bool
    """Whether m0 is the model output itself."""
    stochastic: bool
    past: Past


class DPMSolverMultistepScheduler(DropIn, Original):
    """DPM-Solver(++), ODE and SDE: x' = c x + c0 m0 + c1 m1 + c2 m2 + g z, arXiv 2211.01095, arXiv 2206.00927.

    m0 is x0 (the "++" algorithms) or eps, made from the model output in the same pass and kept in ``model_outputs``.
    """

    _engine = Attached(MultistepEngine)

    def _init_step_index(self, timestep: Any) -> None:
        self._engine.start(self, timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step, as the original's."""
        if self.num_inference_steps is None:
            raise ValueError(
                "Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler"
            )
        engine, config = self._engine, self.config
        if self._step_index is None:
            self._init_step_index(timestep)
        i = self._step_index
        if config.variance_type in ("learned", "learned_range") and config.prediction_type == "epsilon":
            model_output = model_output[:, : sample.shape[1]]  # the original takes 3 channels whatever the sample has
        done = min(self.lower_order_nums, config.solver_order)
        rows, kept, stochastic, past = steps_of(self, done, model_output, sample)
        if i >= rows.count:
            self.sigmas[i + 1]  # the original's exception
        if done and past.idle[i - 1]:
            check_repeats(self, past, i)
        noise = seeds = None
        if stochastic:
            noise = variance_noise
            if noise is None:
                like = model_output if kept or model_output.shape == sample.shape else model_output + sample
                noise, seeds = engine.noise(like, generator, torch.float32)
            else:
                noise = noise.to(model_output.device)
        older = engine.earlier(self, past.earlier[i])
        plain = seeds is None and not config.thresholding and (noise is None or noise.shape == sample.shape)
        if plain and sample.dtype not in SIXTEEN and fits(model_output, sample, *older, noise):
            out, m0, _, _ = rows.plain(sample, model_output, i, h0=older[0], h1=older[1], noise=noise)
            engine.remember(self, model_output if kept else m0, past.idle[i])
            return SchedulerOutput(prev_sample=out) if return_dict else (out,)
        dtype = model_output.dtype if kept else promote(model_output.dtype, sample.dtype)
        sigmas, (x, narrow) = self.sigmas, engine.start_from(sample, dtype, self.sigmas, i)
        if narrow:
            older = [engine.wide(m) for m in older]
        operands: dict[str, Any] = {"row": i, "noise": noise, "seeds": seeds, **narrow}
        if config.thresholding and "++" in config.algorithm_type:
            found = engine.run_thresholded(self, x, model_output, *older, table=rows.table, **operands)
            out, m0, _, _ = engine.end_with(found, narrow, sigmas, i)
        elif config.thresholding:
            m0 = self.convert_model_output(model_output, sample=sample)
            found = engine.run(x, m0, *older, table=engine.taken(rows.table).table, **operands)
            out, *_ = engine.end_with(found, narrow, sigmas, i)
        else:
            own = bool(narrow) or not kept
            found = engine.run(x, model_output, *older, table=rows.table, want_x0=own, **operands)
            out, m0, _, _ = engine.end_with(found, narrow, sigmas, i)
            if not own:  # in the state's shape, as the steps after this one read it
                m0 = model_output if model_output.shape == out.shape else model_output.expand(out.shape)
        idle = past.idle[i]
        if narrow and not idle:
            as_it_is = kept and model_output.shape == out.shape and model_output.dtype is dtype
            m0 = engine.rounded(m0, dtype, model_output if as_it_is else None)
        engine.remember(self, m0, idle)
        out = as_dtype(out, dtype)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x + sigma noise in one op; coefficients in float32 whatever the samples' dtype."""
        return self._engine.add_noise(self, original_samples, noise, timesteps)

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`; with a threshold, those of the
        "++" algorithms."""
        if self.config.thresholding and "++" not in self.config.algorithm_type:
            raise ValueError(
                "a plan with thresholding=True steps in x0 ('dpmsolver++', 'sde-dpmsolver++'), got "
                f"algorithm_type={self.config.algorithm_type!r}: use step"
            )
        order, times = self.config.solver_order, self._engine.clock(self.timesteps).times
        rows: list[Tensor] = []
        saves: list[tuple[tuple[int, str], ...]] = []
        past = steps_of(self, 0).past
        for i, (idle, count, _) in enumerate(zip(past.idle, past.earlier, times, strict=False)):
            if count:
                check_repeats(self, past, i)
            rows.append(steps_of(self, min(count, order)).rows.table[i : i + 1])
            saves.append(((count % 2, "x0"),) if order > 1 and not idle else ())
        plan = plan_of("dpm_solver", torch.cat(rows), times, self.config.prediction_type, saves=saves)
        return thresholded(plan, self.config)


# ------------------------------------------------------------------------------------------------------- the rows
def steps_of(
    scheduler: DPMSolverMultistepScheduler, done: int, model_output: Tensor | None = None, sample: Tensor | None = None
) -> Steps:
    """The steps with ``done`` earlier estimates."""
    engine = scheduler._engine
    key = (done, scheduler.timesteps.numel(), engine.exact)
    return engine.kept(scheduler, key, lambda: made(scheduler, done, model_output, sample))


def made(
    scheduler: DPMSolverMultistepScheduler, done: int, model_output: Tensor | None, sample: Tensor | None
) -> Steps:
    kind = scheduler.config.algorithm_type
    p, q, kept = to_m0(scheduler, model_output, sample)
    levels = host(scheduler.sigmas, scheduler._engine.exact)
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(levels)
    lam = torch.log(alpha) - torch.log(sigma)
    steps = len(levels) - 1
    # In the original's float32, whose rounding of h is part of its result.
    h = lam[1:] - lam[:-1]
    past = past_between(scheduler, levels, h)
    lam0, lam1, lam2 = (lam[at] for at in (torch.arange(steps), *past.nearest(2)))
    h0, h1 = lam0 - lam1, lam1 - lam2
    # Where a step has no length, or none that is finite, the original divides by it: order 1.
    order = torch.where(torch.tensor(past.idle) | (sigma[1:] == 0), 1, orders(scheduler, done, past))
    r0, r1 = (h0 / h).double(), (h1 / h).double()
    x, d0, d1, d2, g = weights(scheduler, kind, h, alpha, sigma, order)
    same = levels[1:] == levels[:-1]  # also 0 and 0, between which h is no number
    x, d0, g = torch.where(same, 1.0, x), torch.where(same, 0.0, d0), torch.where(same, 0.0, g)
    if bool(((order == 3) & torch.isnan(d2)).any()):
        raise NotImplementedError(f"solver_order=3 is not implemented for algorithm_type={kind!r}: take 2")
    # D1 = (m0 - m1)/r0 and, of third order, D1 and D2 through m0, m1, m2.
    along = d1 * (1 + r0 / (r0 + r1)) + d2 / (r0 + r1)
    across = -(d1 * r0 + d2) / (r0 + r1)
    second, third = order == 2, order == 3
    zero = torch.zeros_like(d0)
    first = torch.where(second, d1 / r0, torch.where(third, along / r0, zero))
    last = torch.where(third, across / r1, zero)
    known = {"known_s": alpha[1:].double(), "known_n": sigma[1:].double()}
    weights_of_earlier = ring(past, last - first, -last)
    table = table_of(steps, p=p[:-1], q=q[:-1], a=x, b=d0 + first, g=g, **weights_of_earlier, **known)
    return Steps(Rows(table, want_x0=not kept), kept, kind.startswith("sde"), past)


def orders(scheduler: DPMSolverMultistepScheduler, done: int, past: Past) -> Tensor:
    """Order of each step after ``done`` earlier ones; never more than the steps before it give."""
    config, last = scheduler.config, len(scheduler.timesteps) - 1  # a user may have cut the timesteps
    steps = len(past.earlier)
    short = config.lower_order_final and last < 14
    order = torch.full((steps,), min(config.solver_order, done + 1, 3))
    at = torch.arange(steps)
    if short:
        order = torch.where(at == last - 1, order.clamp(max=2), order)
    if config.euler_at_final or short or config.final_sigmas_type == "zero":
        order = torch.where(at == last, 1, order)
    return torch.minimum(order, torch.tensor(past.earlier) + 1)


def to_m0(
    scheduler: DPMSolverMultistepScheduler, model_output: Tensor | None, sample: Tensor | None
) -> tuple[Tensor, Tensor, bool]:
    """(p, q) of m0 = p x + q m at each level, and whether that is the model output itscheduler."""
    levels = host(scheduler.sigmas, scheduler._engine.exact)
    alpha, sigma = (t.double() for t in scheduler._sigma_to_alpha_sigma_t(levels))
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    kind = scheduler.config.prediction_type
    if "++" in scheduler.config.algorithm_type:
        found = {
            "epsilon": (1 / alpha, -sigma / alpha),
            "sample": (zero, one),
            "v_prediction": (alpha, -sigma),
            "flow_prediction": (one, -levels.double()),
        }
        kept = kind == "sample"
    else:
        found = {
            "epsilon": (zero, one),
            "sample": (1 / sigma, -alpha / sigma),
            "v_prediction": (sigma, alpha),
        }
        kept = kind == "epsilon"
    if kind not in found:
        if model_output is not None:
            scheduler.convert_model_output(model_output, sample=sample)  # raises, as the original does
        raise ValueError(f"prediction_type must be one of {', '.join(found)}, got {kind!r}")
    return *found[kind], kept


def weights(
    scheduler: DPMSolverMultistepScheduler, kind: str, h: Tensor, alpha: Tensor, sigma: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Float64 weights of x, D0, D1 (by solver type where the step is of second order), D2 and z."""
    to_alpha, to_sigma, from_alpha, from_sigma = alpha[1:], sigma[1:], alpha[:-1], sigma[:-1]
    midpoint = (order == 2) & (scheduler.config.solver_type == "midpoint")
    curved = 2.0 if scheduler._engine.exact else 1.0  # the original's curvature has half its weight
    if kind == "dpmsolver++":
        decay = torch.exp(-h) - 1.0
        x, d0 = to_sigma / from_sigma, -(to_alpha * decay)
        d1 = torch.where(midpoint, 0.5 * d0, to_alpha * (decay / h + 1.0))
        d2 = -curved * (to_alpha * ((decay + h) / h**2 - 0.5))
        g = torch.zeros_like(h)
    elif kind == "dpmsolver":
        growth = torch.exp(h) - 1.0
        x, d0 = to_alpha / from_alpha, -(to_sigma * growth)
        d1 = torch.where(midpoint, 0.5 * d0, -(to_sigma * (growth / h - 1.0)))
        d2 = -curved * (to_sigma * ((growth - h) / h**2 - 0.5))
        g = torch.zeros_like(h)
    elif kind == "sde-dpmsolver++":
        decay = 1.0 - torch.exp(-2.0 * h)
        x, d0 = to_sigma / from_sigma * torch.exp(-h), to_alpha * decay
        d1 = torch.where(midpoint, 0.5 * d0, to_alpha * (decay / (-2.0 * h) + 1.0))
        if scheduler._engine.exact:
            d2 = 2.0 * to_alpha * (0.5 - (2.0 * h - decay) / (2.0 * h) ** 2)
        else:  # sign and size as in the original
            d2 = to_alpha * ((decay - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
        g = to_sigma * torch.sqrt(decay)
    else:
        growth = torch.exp(h) - 1.0
        x, d0 = to_alpha / from_alpha, -2.0 * (to_sigma * growth)
        d1 = torch.where(midpoint, 0.5 * d0, -2.0 * (to_sigma * (growth / h - 1.0)))
        d2 = torch.full_like(h, float("nan"))
        g = to_sigma * torch.sqrt(torch.exp(2.0 * h) - 1.0)
    return x.double(), d0.double(), d1.double(), d2.double(), g.double()

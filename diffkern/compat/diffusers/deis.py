"""diffusers' DEISMultistepScheduler on one fused op a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DEISMultistepScheduler as Original
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from diffkern.compat.diffusers._engine import Attached, DropIn, Rows, fits
from diffkern.compat.diffusers._host import host
from diffkern.compat.diffusers._multistep import MultistepEngine, Past, past_between, ring
from diffkern.compat.diffusers._plans import plan_of
from diffkern.compat.kit.rows import as_dtype, promote, table_of
from diffkern.plan import Plan


class Steps(NamedTuple):
    """What the steps after a number of earlier ones are run with."""

    rows: Rows
    kept: bool
    """Whether m0 is the model output itself."""
    estimate: Tensor
    """[S, 21]: x0 alone, for what is done to it before the step."""
    from_x0: Tensor
    """[S, 21]: the steps of a model that gives x0."""
    past: Past


class DEISMultistepScheduler(DropIn, Original):
    """DEIS in rho = sigma/alpha, arXiv 2204.13902: x'/alpha' = x/alpha + c0 m0 + c1 m1 + c2 m2.

    m is eps, made from the model output in the same pass and kept in ``model_outputs``; c_k is the integral over rho of
    the k-th Lagrange polynomial in ln rho, in the original's float32, or with ``diffkern(exact=True)`` in float64.
    """

    _engine = Attached(MultistepEngine)

    def _init_step_index(self, timestep: Any) -> None:
        self._engine.start(self, timestep)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """One step, as the original's."""
        if self.num_inference_steps is None:
            raise ValueError(
                "Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler"
            )
        engine, config = self._engine, self.config
        if self._step_index is None:
            self._init_step_index(timestep)
        i = self._step_index
        done = min(self.lower_order_nums, config.solver_order)
        rows, kept, estimate, from_x0, past = steps_of(self, done, model_output, sample)
        if i >= rows.count:
            self.sigmas[i + 1]  # the original's exception
        older = engine.earlier(self, past.earlier[i])
        sigmas, idle = self.sigmas, past.idle[i]
        dtype = promote(sample.dtype, model_output.dtype)
        x, narrow = engine.start_from(sample, dtype, sigmas, i)
        if narrow:
            older = [engine.wide(m) for m in older]
        if config.thresholding:
            x0, *_ = engine.run(x, model_output, table=estimate, row=i, state=narrow.get("state"))
            x0 = engine.threshold(self, x0)
            found = engine.run(x, x0, *older, table=from_x0, row=i, want_x0=True, **narrow)
            out, m0, _, _ = engine.end_with(found, narrow, sigmas, i)
        elif not narrow and fits(model_output, sample, *older):
            out, m0, _, _ = rows.plain(sample, model_output, i, h0=older[0], h1=older[1])
            m0 = model_output if kept else m0
        else:
            own = bool(narrow) or not kept
            found = engine.run(x, model_output, *older, table=rows.table, row=i, want_x0=own, **narrow)
            out, m0, _, _ = engine.end_with(found, narrow, sigmas, i)
            if not own:  # as the steps after this one read it
                m0 = as_dtype(model_output, out.dtype).expand(out.shape)
        engine.remember(self, engine.rounded(m0, dtype) if narrow and not idle else m0, idle)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x + sigma noise in one op; coefficients in float32 whatever the samples' dtype."""
        return self._engine.add_noise(self, original_samples, noise, timesteps)

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`; none with a threshold."""
        if self.config.thresholding:
            raise ValueError("a plan with thresholding=True steps in x0, and DEIS steps in eps: use step")
        order, times = self.config.solver_order, self._engine.clock(self.timesteps).times
        parts, saves = [], []
        past = steps_of(self, 0).past
        for i, (idle, count, _) in enumerate(zip(past.idle, past.earlier, times, strict=False)):
            parts.append(steps_of(self, min(count, order)).rows.table[i : i + 1])
            saves.append(((count % 2, "x0"),) if order > 1 and not idle else ())
        return plan_of("deis", torch.cat(parts), times, self.config.prediction_type, saves=saves)


# ------------------------------------------------------------------------------------------------------- the rows
def steps_of(
    scheduler: DEISMultistepScheduler, done: int, model_output: Tensor | None = None, sample: Tensor | None = None
) -> Steps:
    """The steps with ``done`` earlier estimates."""
    key = (done, scheduler.timesteps.shape[0], scheduler._engine.exact)
    return scheduler._engine.kept(scheduler, key, lambda: made(scheduler, done, model_output, sample))


def made(scheduler: DEISMultistepScheduler, done: int, model_output: Tensor | None, sample: Tensor | None) -> Steps:
    """`steps_of`, from the sigmas."""
    levels, kind = host(scheduler.sigmas, scheduler._engine.exact), scheduler.config.prediction_type
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(levels)
    h = (torch.log(alpha) - torch.log(sigma)).diff()
    past = past_between(scheduler, levels, h)
    moves = tuple(weight.double() for weight in weights(alpha, sigma, h, past, orders(scheduler, done, past)))
    alpha, sigma, levels = (t[:-1].double() for t in (alpha, sigma, levels))
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    to_x0 = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "sample": (zero, one),
        "v_prediction": (alpha, -sigma),
        "flow_prediction": (one, -levels),
    }
    if kind not in to_x0:
        if model_output is not None:
            scheduler.convert_model_output(model_output, sample=sample)  # raises, as the original does
        raise ValueError(f"prediction_type must be one of {', '.join(to_x0)}, got {kind!r}")
    p, q = to_x0[kind]
    over = levels if kind == "flow_prediction" else sigma  # as in the original, which means flow sigmas there
    kept = kind == "epsilon"
    eps = (zero, one) if kept else ((1 - alpha * p) / over, -alpha * q / over)
    return Steps(
        Rows(table_of_moves(past, moves, *eps), want_x0=not kept),
        kept,
        table_of(len(p), p=p, q=q, b=1.0),
        table_of_moves(past, moves, 1 / over, -alpha / over),
        past,
    )


def table_of_moves(past: Past, moves: tuple[Tensor, ...], p: Tensor, q: Tensor) -> Tensor:
    """x' = cx x + c0 m0 + c1 m1 + c2 m2 with m0 = p x + q m, which is written but not read: at the first levels of a
    cosine table cx is 1e4, and c0 p as large."""
    x, m0, m1, m2 = moves
    return table_of(len(x), p=p, q=q, a=x + m0 * p, d=m0 * q, **ring(past, m1, m2))


def orders(scheduler: DEISMultistepScheduler, done: int, past: Past) -> Tensor:
    """Order of each step after ``done`` earlier ones; never more than the steps before it give."""
    config, count = scheduler.config, len(scheduler.timesteps)  # a user may have cut the timesteps
    at = torch.arange(len(past.earlier))
    order = torch.full((len(at),), min(config.solver_order, done + 1, 3))
    if config.lower_order_final and count < 15:
        order = torch.where(at == count - 1, 1, torch.where(at == count - 2, order.clamp(max=2), order))
    return torch.minimum(order, torch.tensor(past.earlier) + 1)


def weights(
    alpha: Tensor, sigma: Tensor, h: Tensor, past: Past, order: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x, m0, m1 and m2 in each step, [S] each, of its order [S]; by the original's operations in the original's
    order, as its float32 rounds differences of nearby numbers."""
    rho = sigma / alpha
    log = torch.from_numpy(np.log(rho.numpy()))
    log0, log1, log2 = log[:-1], *(log[at] for at in past.nearest(2))
    # Where logarithms are equal the original divides 0 by 0: a polynomial through fewer.
    order = torch.where((order == 3) & ((log2 == log1) | (log2 == log0)), 2, order)
    order = torch.where(log1 == log0, 1, order)

    def line(t: Tensor, log_t: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """The integral of (ln t - c)/(b - c)."""
        return t * (-c + log_t - 1) / (b - c)

    def parabola(t: Tensor, log_t: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """The integral of (ln t - c)(ln t - d)/((b - c)(b - d))."""
        above = t * (c * (d - log_t + 1) - d * log_t + d + log_t**2 - 2 * log_t + 2)
        return above / ((b - c) * (b - d))

    def over_step(integral: Callable[..., Tensor], *nodes: Tensor) -> Tensor:
        return alpha[1:] * (integral(rho[1:], log[1:], *nodes) - integral(rho[:-1], log0, *nodes))

    ratio, zero = alpha[1:] / alpha[:-1], torch.zeros_like(h)
    first = (ratio, -(sigma[1:] * (torch.exp(h) - 1.0)), zero, zero)
    second = (ratio, over_step(line, log0, log1), over_step(line, log1, log0), zero)
    nodes = ((log0, log1, log2), (log1, log2, log0), (log2, log0, log1))
    third = (ratio, *(over_step(parabola, *three) for three in nodes))
    x, m0, m1, m2 = (
        torch.where(order == 1, a, torch.where(order == 2, b, c)) for a, b, c in zip(first, second, third, strict=True)
    )
    idle = torch.tensor(past.idle)
    m0, m1, m2 = (torch.where(idle, 0.0, weight) for weight in (m0, m1, m2))
    return x, m0, m1, m2

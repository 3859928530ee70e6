"""diffusers' DPMSolverMultistepScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler as Original
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from diffkern import ops
from diffkern.compat.diffusers._engine import column, host, plan_of, promote, table_of
from diffkern.compat.diffusers._multistep import FusedMultistep
from diffkern.compat.diffusers._plans import thresholded
from diffkern.plan import Plan


class DPMSolverMultistepScheduler(FusedMultistep, Original):
    """DPM-Solver(++), ODE and SDE: x' = c x + c0 m0 + c1 m1 + c2 m2 + g z, arXiv 2211.01095, arXiv 2206.00927.

    m0 is x0 (the "++" algorithms) or eps, made from the model output in the same pass and kept in ``model_outputs``.
    """

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
        if self._step_index is None:
            self._init_step_index(timestep)
        i, config = self._step_index, self.config
        if config.variance_type in ("learned", "learned_range") and config.prediction_type == "epsilon":
            model_output = model_output[:, : sample.shape[1]]  # the original takes 3 channels whatever the sample has
        table, kept, stochastic = self._dk_rows(min(self.lower_order_nums, config.solver_order), model_output, sample)
        if i >= len(table):
            self.sigmas[i + 1]  # the original's exception
        dtype = model_output.dtype if kept else promote(model_output.dtype, sample.dtype)
        noise = seeds = None
        if stochastic:
            noise = variance_noise
            if noise is None:
                like = model_output if kept or model_output.shape == sample.shape else model_output + sample
                noise, seeds = self._dk_noise(like, generator, torch.float32)
            else:
                noise = noise.to(model_output.device)
        past = self.model_outputs
        older = [None, None]  # a ring: the estimate of step j lies in slot j % 2
        if config.solver_order > 1:
            older[(i - 1) % 2] = past[-1]
        if config.solver_order > 2:
            older[i % 2] = past[-2]
        operands: dict[str, Any] = {"row": i, "noise": noise, "seeds": seeds}
        fits = noise is None or noise.shape == sample.shape
        if fits and seeds is None and not config.thresholding and self._dk_same(model_output, sample, [*older, noise]):
            none = None
            out, m0, _, _ = ops.step_raw(
                sample, model_output, none, older[0], older[1], none, none, table, i, none, none, noise, none, none,
                not kept, False, 0, none,
            )  # fmt: skip
            m0 = model_output if kept else m0
        elif config.thresholding and "++" in config.algorithm_type:
            out, m0, _, _ = self._dk_thresholded(sample, model_output, *older, table=table, index=None, **operands)
        elif config.thresholding:
            m0 = self.convert_model_output(model_output, sample=sample)
            out = self._dk_run(sample, m0, *older, table=self._dk_taken(table), **operands)[0]
        else:
            out, m0, _, _ = self._dk_run(sample, model_output, *older, table=table, want_x0=not kept, **operands)
            if kept:  # in the state's shape, as the steps after this one read it
                m0 = model_output if model_output.shape == out.shape else model_output.expand(out.shape)
        past[:-1] = past[1:]
        past[-1] = m0
        if self.lower_order_nums < config.solver_order:
            self.lower_order_nums += 1
        self._step_index += 1
        out = out if out.dtype == dtype else out.to(dtype)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`; with a threshold, those of the
        "++" algorithms."""
        if self.config.thresholding and "++" not in self.config.algorithm_type:
            raise ValueError(
                "a plan with thresholding=True steps in x0 ('dpmsolver++', 'sde-dpmsolver++'), got "
                f"algorithm_type={self.config.algorithm_type!r}: use step"
            )
        times = self._dk_clock.times
        rows: list[Tensor] = []
        saves: list[tuple[tuple[int, str], ...]] = []
        for i in range(len(times)):
            rows.append(self._dk_rows(min(i, self.config.solver_order), None, None)[0][i : i + 1])
            saves.append(((i % 2, "x0"),) if self.config.solver_order > 1 else ())
        plan = plan_of("dpm_solver", torch.cat(rows), times, self.config.prediction_type, saves=saves)
        return thresholded(plan, self.config)

    # ------------------------------------------------------------------------------------------------ the rows
    def _dk_rows(self, done: int, model_output: Tensor | None, sample: Tensor | None) -> tuple[Tensor, bool, bool]:
        """(table [S, 21] with ``done`` earlier estimates, whether m0 is the model output itself, whether it draws)."""
        key = (done, self.timesteps.shape[0], self._dk_exact)
        found: tuple[Tensor, bool, bool] | None = self._dk_hot_value(key)
        if found is None:
            sources = (self.sigmas, self._internal_dict)
            found = self._dk_cached(("rows", *key), sources, lambda: self._dk_build(done, model_output, sample))
            self._dk_warm(key, found)
        return found

    def _dk_taken(self, table: Tensor) -> Tensor:
        """The rows for a model output that is m0 already."""

        def build() -> Tensor:
            taken = table.clone()
            column(taken, "p")[:], column(taken, "q")[:] = 0.0, 1.0
            return taken

        return self._dk_cached(("taken", id(table)), (table,), build)

    def _dk_build(self, done: int, model_output: Tensor | None, sample: Tensor | None) -> tuple[Tensor, bool, bool]:
        kind = self.config.algorithm_type
        p, q, kept = self._dk_to_m0(model_output, sample)
        levels = host(self.sigmas, self._dk_exact)
        alpha, sigma = self._sigma_to_alpha_sigma_t(levels)
        lam = torch.log(alpha) - torch.log(sigma)
        steps = len(levels) - 1
        # In the original's float32, whose rounding of h is part of its result.
        h, h0, h1 = lam[1:] - lam[:-1], lam[:-1] - lam[:-1].roll(1), lam[:-1].roll(1) - lam[:-1].roll(2)
        # Where a step has no length, or none that is finite, the original divides by it: order 1.
        order = torch.where((h == 0) | (sigma[1:] == 0), 1, self._dk_orders(done, steps))
        r0, r1 = (h0 / h).double(), (h1 / h).double()
        x, d0, d1, d2, g = self._dk_weights(kind, h, alpha, sigma, order)
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
        table = table_of(steps, p=p[:-1], q=q[:-1], a=x, b=d0 + first, g=g, **known)
        even = torch.arange(steps) % 2 == 0
        column(table, "e1")[:] = torch.where(even, last - first, -last)
        column(table, "e0")[:] = torch.where(even, -last, last - first)
        return table, kept, kind.startswith("sde")

    def _dk_orders(self, done: int, steps: int) -> Tensor:
        """Order of each step after ``done`` earlier ones; never more than the steps before it give."""
        config, last = self.config, len(self.timesteps) - 1  # a user may have cut the timesteps
        short = config.lower_order_final and last < 14
        order = torch.full((steps,), min(config.solver_order, done + 1, 3))
        at = torch.arange(steps)
        if short:
            order = torch.where(at == last - 1, order.clamp(max=2), order)
        if config.euler_at_final or short or config.final_sigmas_type == "zero":
            order = torch.where(at == last, 1, order)
        return torch.minimum(order, at + 1)

    def _dk_to_m0(self, model_output: Tensor | None, sample: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        """(p, q) of m0 = p x + q m at each level, and whether that is the model output itself."""
        levels = host(self.sigmas, self._dk_exact)
        alpha, sigma = (t.double() for t in self._sigma_to_alpha_sigma_t(levels))
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        kind = self.config.prediction_type
        if "++" in self.config.algorithm_type:
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
                self.convert_model_output(model_output, sample=sample)  # raises, as the original does
            raise ValueError(f"prediction_type must be one of {', '.join(found)}, got {kind!r}")
        return *found[kind], kept

    def _dk_weights(
        self, kind: str, h: Tensor, alpha: Tensor, sigma: Tensor, order: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Float64 weights of x, D0, D1 (by solver type where the step is of second order), D2 and z."""
        to_alpha, to_sigma, from_alpha, from_sigma = alpha[1:], sigma[1:], alpha[:-1], sigma[:-1]
        midpoint = (order == 2) & (self.config.solver_type == "midpoint")
        curved = 2.0 if self._dk_exact else 1.0  # the original's curvature has half its weight
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
            if self._dk_exact:
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

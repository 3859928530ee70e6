"""diffusers' LMSDiscreteScheduler on one fused op a step."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from diffusers import LMSDiscreteScheduler as Original
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from torch import Tensor

from diffkern.compat.diffusers._engine import Attached, DropIn, Rows
from diffkern.compat.diffusers._host import UNSCALED
from diffkern.compat.diffusers._karras import KarrasEngine
from diffkern.compat.diffusers._level_rows import inverse, to_x0
from diffkern.compat.diffusers._multistep import Past, check_levels, past_of
from diffkern.compat.kit.rows import SIXTEEN, as_dtype, table_of
from diffkern.plan import COLUMNS, SLOTS, Plan


class LMSDiscreteScheduler(DropIn, Original):
    """x' = x + sum_k c_k d_k: the polynomial through the last slopes d = (x - x0)/sigma, integrated over the step.

    Adams and Bashforth on uneven levels. The c_k are integrated exactly (the original: by quadrature, in 1000 Karras
    steps off by up to 6e-3 of the last). Where a loop starts late, the original leaves out terms that it has no slopes
    for; ``diffkern(exact=True)`` takes the order that the slopes allow, so that the coefficients still sum to sigma' -
    sigma. A step of no length counts as none.
    """

    _engine = Attached(KarrasEngine)

    derivatives: list[Tensor]

    def _init_step_index(self, timestep: Any) -> None:
        self._engine.start(self, timestep)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """x / sqrt(sigma^2 + 1): made by the step that returned ``sample`` where the loop asks for each (`step` then
        writes it beside x'), else in one op."""
        return self._engine.scale_input(self, sample, timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> LMSDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """One step, as the original's: in the dtype that sample and model_output promote to."""
        if not self.is_scale_input_called:
            warnings.warn(UNSCALED, stacklevel=2)
        engine = self._engine
        row = engine.one_row(self, timestep, sample)
        before = self.derivatives[-(order - 1) :][::-1] if order > 1 else []  # the newest first
        rows, rest, past = rows_of(self, order, len(before))
        given = self.config.prediction_type == "sample"
        out, x0, slope, _ = engine.run_promoted(self, rows, sample, model_output, *before[:SLOTS], row=row)
        if rest:
            narrow = out.dtype in SIXTEEN
            total = engine.carried.state if narrow and engine.carried is not None else out
            for j, more in enumerate(rest, start=1):
                slopes = before[j * SLOTS : (j + 1) * SLOTS]
                total, *_ = engine.run_plain(self, more, total, None, *slopes, row=row)
            out = as_dtype(total, out.dtype)
            if narrow:
                engine.carry(total, out, self.sigmas, row + 1)
        if not past.idle[row]:
            self.derivatives.append(slope)
            if len(self.derivatives) > order:
                self.derivatives.pop(0)
        self._step_index += 1
        x0 = model_output if given else as_dtype(x0, out.dtype)
        if not return_dict:
            return out, x0
        return LMSDiscreteSchedulerOutput(prev_sample=out, pred_original_sample=x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x0 + sigma z in one op; sigma in float32 whatever the samples' dtype."""
        return self._engine.add_noise(self, original_samples, noise, timesteps)

    def plan(self, order: int = 4) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`; order 1 to 5."""
        if not 1 <= order <= SLOTS + 1:
            raise ValueError(f"order must lie in 1..{SLOTS + 1} (a plan keeps {SLOTS} histories), got {order}")
        steps, past = len(self.sigmas) - 1, rows_of(self, order, 0)[2]
        tables = [rows_of(self, order, min(count, order - 1))[0].table for count in past.earlier]
        table = torch.stack([table[i] for i, table in enumerate(tables)])
        # Slot n mod (order - 1) holds the n-th slope: what row i calls the k-th last moves from slot to slot.
        saves: list[tuple[tuple[int, str], ...]] = []
        for i, (idle, count) in enumerate(zip(past.idle, past.earlier, strict=True)):
            weights = table[i, _E].clone()
            table[i, _E] = 0.0
            for k in range(min(count, order - 1)):
                table[i, _E[(count - 1 - k) % (order - 1)]] = weights[k]
            saves.append(((count % (order - 1), "s"),) if order > 1 and i + 1 < steps and not idle else ())
        return self._engine.plan(self, "lms", table, saves=saves)


def rows_of(scheduler: LMSDiscreteScheduler, order: int, before: int) -> tuple[Rows, list[Rows], Past]:
    """The rows for a loop that has ``before`` earlier slopes, those of what does not fit their four, and the steps."""
    engine = scheduler._engine

    def build() -> tuple[Rows, list[Rows], Past]:
        levels, prediction = engine.levels(scheduler), scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type given as {prediction} must be one of `epsilon`, or `v_prediction`")
        sigma, over = levels[:-1], inverse(levels[:-1])
        past = past_of(levels[1:] == levels[:-1])
        if order > 1:
            check_levels(scheduler, past)
        c = lms_coefficients(levels, past, min(order, before + 1) if engine.exact else order)
        c = torch.cat([c, torch.zeros(len(c), SLOTS + order, dtype=torch.float64)], 1)
        c[:, before + 1 :] = 0.0  # no slopes for these
        p, q = to_x0(prediction, sigma)
        if prediction == "epsilon":  # the slope is the model's output
            own = {"a": 1.0, "d": c[:, 0], "D": 1.0}
        else:
            own = {"a": 1 + c[:, 0] * over, "b": -c[:, 0] * over, "A": over, "B": -over}
        known = {"known_s": 1.0, "known_n": levels[1:]}
        earlier = [{f"e{k}": c[:, 1 + at + k] for k in range(SLOTS)} for at in range(0, max(before, 1), SLOTS)]
        table = table_of(len(sigma), p=p, q=q, **own, **earlier[0], **known)
        rest = [Rows(table_of(len(sigma), a=1.0, **more)) for more in earlier[1:]]
        return engine.rows(scheduler, table, want_x0=prediction != "sample", want_s=True), rest, past

    return engine.tables.get(("rows", order, before, engine.exact), build, *engine.sources(scheduler))


_E = [COLUMNS.index(f"e{k}") for k in range(SLOTS)]


def lms_coefficients(levels: Tensor, past: Past, order: int) -> Tensor:
    """[steps, order]: the integral from sigma_i to sigma_{i+1} of the k-th Lagrange polynomial on sigma_i and the
    levels that the steps before (`Past`) started from, as many as there are, at most ``order``; the others are 0.
    Gauss and Legendre's rule, exact for this degree."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss((order + 1) // 2 + 1))
    found = torch.zeros(len(levels) - 1, order, dtype=torch.float64)
    idle, slopes = torch.tensor(past.idle), torch.tensor(past.earlier) + 1
    nearest = past.nearest(max(order - 1, 1))
    for have in range(1, order + 1):
        at = ((slopes.clamp(max=order) == have) & ~idle).nonzero().flatten()
        if not len(at):
            continue
        start, end = levels[at], levels[at + 1]
        tau = (start + end)[:, None] / 2 + (end - start)[:, None] / 2 * nodes  # [steps, nodes]
        points = torch.stack([levels[at], *(levels[before[at]] for before in nearest[: have - 1])], 1)
        for k in range(have):
            value = torch.ones_like(tau)
            for j in range(have):
                if j != k:
                    value = value * (tau - points[:, j, None]) / (points[:, k] - points[:, j])[:, None]
            found[at, k] = (value * weights).sum(1) * (end - start) / 2
    return found

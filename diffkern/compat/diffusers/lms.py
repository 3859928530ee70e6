"""diffusers' LMSDiscreteScheduler on one fused op a step."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from diffusers import LMSDiscreteScheduler as Original
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from torch import Tensor

from diffkern.compat.diffusers._engine import table_of
from diffkern.compat.diffusers._levels import FusedKarras, inverse, to_x0
from diffkern.compat.diffusers.euler import UNSCALED
from diffkern.plan import COLUMNS, SLOTS, Plan


class LMSDiscreteScheduler(FusedKarras, Original):
    """x' = x + sum_k c_k d_k: the polynomial through the last slopes d = (x - x0)/sigma, integrated over the step.

    Adams and Bashforth on uneven levels. The c_k are integrated exactly (the original: numerically, to 1e-4). Where a
    loop starts late, the original leaves out terms that it has no slopes for; ``diffkern(exact=True)`` takes the order
    that the slopes allow, so that the coefficients still sum to sigma' - sigma.
    """

    derivatives: list[Tensor]

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
        row = self._dk_one(timestep, sample)
        before = self.derivatives[-(order - 1) :][::-1] if order > 1 else []  # the newest first
        table, rest = self._dk_rows(order, len(before))
        given = self.config.prediction_type == "sample"
        prev_sample, x0, slope, _ = self._dk_promoted(
            sample, model_output, *before[:SLOTS], table=table, row=row, want_x0=not given, want_s=True
        )
        for j, more in enumerate(rest, start=1):
            slopes = before[j * SLOTS : (j + 1) * SLOTS]
            prev_sample = self._dk_plain(prev_sample, None, *slopes, table=more, row=row)[0]
        self.derivatives.append(slope)
        if len(self.derivatives) > order:
            self.derivatives.pop(0)
        self._step_index += 1
        if given:
            x0 = model_output
        if not return_dict:
            return prev_sample, x0
        return LMSDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def plan(self, order: int = 4) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample`; order 1 to 5."""
        if not 1 <= order <= SLOTS + 1:
            raise ValueError(f"order must lie in 1..{SLOTS + 1} (a plan keeps {SLOTS} histories), got {order}")
        steps = len(self._dk_levels) - 1
        tables = [self._dk_rows(order, min(i, order - 1))[0] for i in range(steps)]
        table = torch.stack([table[i] for i, table in enumerate(tables)])
        # Slot j mod (order - 1) holds step j's slope: what row i calls the k-th last moves from slot to slot.
        saves: list[tuple[tuple[int, str], ...]] = []
        for i in range(steps):
            weights = table[i, _E].clone()
            table[i, _E] = 0.0
            for k in range(min(i, order - 1)):
                table[i, _E[(i - 1 - k) % (order - 1)]] = weights[k]
            saves.append(((i % (order - 1), "s"),) if order > 1 and i + 1 < steps else ())
        return self._dk_plan("lms", table, saves=saves)

    def _dk_rows(self, order: int, before: int) -> tuple[Tensor, list[Tensor]]:
        """The table for a loop that has ``before`` earlier slopes, and the tables of what does not fit its four."""

        def build() -> tuple[Tensor, list[Tensor]]:
            levels, prediction = self._dk_levels, self.config.prediction_type
            if prediction not in ("epsilon", "v_prediction", "sample"):
                raise ValueError(f"prediction_type given as {prediction} must be one of `epsilon`, or `v_prediction`")
            sigma, over = levels[:-1], inverse(levels[:-1])
            c = lms_coefficients(levels, min(order, before + 1) if self._dk_exact else order)
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
            return self._dk_onward(table), [table_of(len(sigma), a=1.0, **more) for more in earlier[1:]]

        return self._dk_table(("rows", order, before), build)


_E = [COLUMNS.index(f"e{k}") for k in range(SLOTS)]


def lms_coefficients(levels: Tensor, order: int) -> Tensor:
    """[steps, order]: the integral from sigma_i to sigma_{i+1} of the k-th Lagrange polynomial on sigma_i, sigma_{i-1},
    ...; step i has order min(i + 1, order), the others are 0. Gauss and Legendre's rule, exact for this degree."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss((order + 1) // 2 + 1))
    steps = len(levels) - 1
    found = torch.zeros(steps, order, dtype=torch.float64)
    for have in range(1, order + 1):
        at = torch.arange(have - 1, steps if have == order else min(have, steps))
        if not len(at):
            continue
        start, end = levels[at], levels[at + 1]
        tau = (start + end)[:, None] / 2 + (end - start)[:, None] / 2 * nodes  # [steps, nodes]
        points = torch.stack([levels[at - k] for k in range(have)], 1)
        for k in range(have):
            value = torch.ones_like(tau)
            for j in range(have):
                if j != k:
                    value = value * (tau - points[:, j, None]) / (points[:, k] - points[:, j])[:, None]
            found[at, k] = (value * weights).sum(1) * (end - start) / 2
    return found

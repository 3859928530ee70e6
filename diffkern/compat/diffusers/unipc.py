"""diffusers' UniPCMultistepScheduler on one fused op a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import UniPCMultistepScheduler as Original
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from diffkern import ops
from diffkern.compat.diffusers._engine import column, host, plan_of, table_of, version
from diffkern.compat.diffusers._multistep import FusedMultistep
from diffkern.compat.diffusers._plans import thresholded
from diffkern.compat.diffusers._unipc_rows import Levels, Step, combine, halves
from diffkern.plan import SLOTS, Plan

FUSED_ORDER = SLOTS - 1
"""Up to this order a step reads at most 4 histories; above, its sum takes one op more."""


class Rows(NamedTuple):
    """The rows of a mode after a number of steps."""

    weights: Step
    table: Tensor
    """[S, 21]: m0 = p x + q m, and x' over sample, m0, and m1, m2, m3 and the last corrected sample as histories."""
    estimate: Tensor
    """[S, 21]: m0 alone."""
    corrected: list[Tensor]
    """The corrected sample and, beyond `FUSED_ORDER`, x' as sums (`sum_tables`)."""
    total: list[Tensor]


class Done(NamedTuple):
    """What a step read and wrote: enough to find its corrected sample again."""

    rows: Rows
    mode: str
    i: int
    out: Tensor
    out_version: int
    sample: Tensor
    sample_version: int
    last: Tensor | None
    estimates: list[Tensor | None]
    graph: bool
    """Whether a gradient flows through ``out``."""


class UniPCMultistepScheduler(FusedMultistep, Original):
    """UniPC-p, arXiv 2302.04867: the corrector of the last step and the predictor of this one in one row.

    The corrected sample is the predicted one, which comes in as ``sample``, plus multiples of the estimates. Where
    ``sample`` is not what the last step returned (inpainting), it is made from the last corrected sample as in the
    original: one op more.
    """

    predict_x0: bool
    disable_corrector: Any
    solver_p: Any
    timestep_list: list[Any]
    this_order: int

    def __getstate__(self) -> dict[str, Any]:
        self.last_sample  # noqa: B018  (a copy's tensors are others: it can not tell what the last step returned)
        return super().__getstate__()

    @property
    def last_sample(self) -> Tensor | None:
        """The corrected sample of the last step: the original stores it, here it is made when it is asked for."""
        done: Done | None = self.__dict__.get("_dk_done")
        if done is not None:
            with torch.set_grad_enabled(done.graph):  # as in the step, whoever asks for it now
                self.last_sample = self._dk_corrected(done)
        return self.__dict__.get("_dk_last")

    @last_sample.setter
    def last_sample(self, value: Tensor | None) -> None:
        self.__dict__["_dk_last"], self.__dict__["_dk_done"] = value, None

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """One step, as the original's."""
        if self.num_inference_steps is None:
            raise ValueError(
                "Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler"
            )
        if self._step_index is None:
            self._init_step_index(timestep)
        i, order = self._step_index, self.config.solver_order
        assert i < len(self.timesteps) or not self.config.lower_order_final  # the original's
        if i >= len(self.sigmas) - 1:
            self.sigmas[i + 1]  # the original's exception
        mode, last = self._dk_mode(i, sample)
        reached = min(self.lower_order_nums, order)
        rows = self._dk_rows(reached, mode, model_output, sample)
        estimates: list[Tensor | None] = [None, *reversed(self.model_outputs)]
        if self.predict_x0 and self.config.thresholding:
            estimates[0] = self._dk_estimate(rows, i, model_output, sample)
        elif self._dk_kept() and model_output.dtype == sample.dtype:
            estimates[0] = model_output if model_output.shape == sample.shape else model_output.expand(sample.shape)
        self.timestep_list[:-1] = self.timestep_list[1:]
        self.timestep_list[-1] = timestep
        if self.solver_p or order > FUSED_ORDER:
            if estimates[0] is None:
                estimates[0] = self._dk_estimate(rows, i, model_output, sample)
            if self.solver_p:
                corrected = sample if mode == "plain" else self._dk_sum(rows.corrected, i, sample, last, estimates)
                out = self.solver_p.step(model_output, timestep, corrected).prev_sample
                self.last_sample = corrected
            else:
                out = self._dk_sum(rows.total, i, sample, last, estimates)
        else:
            own = estimates[0] is None
            m = model_output if own else estimates[0]
            assert m is not None
            table = rows.table if own or self._dk_kept() else self._dk_taken(rows.table)
            older = [None] * FUSED_ORDER  # a ring: the estimate of step j lies in slot j % order
            for k in range(order):
                older[(i - 1 - k) % order] = estimates[1 + k]
            if self._dk_same(m, sample, [*older, last]):
                none = None
                out, x0, _, _ = ops.step_raw(
                    *(sample, m, none, *older, last, table, i, none, none, none, none, none, own, False, 0, none)
                )
            else:
                out, x0, _, _ = self._dk_run(
                    sample, m, *older, last, table=table, row=i, want_x0=own, state=sample.dtype
                )
            estimates[0] = x0 if own else estimates[0]
        if not self.solver_p:
            self.__dict__["_dk_last"] = None
            done = Done(
                *(rows, mode, i, out, version(out), sample, version(sample), last, estimates, out.requires_grad)
            )
            self.__dict__["_dk_done"] = done
            if out.is_inference() or sample.is_inference():
                self.last_sample = self._dk_corrected(done)  # while both are as they were: torch counts no writes
        self.model_outputs[:-1] = self.model_outputs[1:]
        self.model_outputs[-1] = estimates[0]
        self.this_order = self._dk_order(reached, i)
        if self.lower_order_nums < order:
            self.lower_order_nums += 1
        self._step_index += 1
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample` (no solver_p)."""
        order, times = self.config.solver_order, self._dk_clock.times
        if self.solver_p or order > FUSED_ORDER:
            raise ValueError(f"a plan has solver_order <= {FUSED_ORDER} and no solver_p, got {order}, {self.solver_p}")
        parts, saves = [], []
        for i in range(len(times)):
            mode = "plain" if i == 0 or i - 1 in self.disable_corrector else "merged"
            parts.append(self._dk_rows(min(i, order), mode).table[i : i + 1])
            saves.append(((i % order, "x0"),))
        plan = plan_of("unipc", torch.cat(parts), times, self.config.prediction_type, saves=saves)
        return thresholded(plan, self.config) if self.predict_x0 else plan  # in eps the original thresholds nothing

    # ------------------------------------------------------------------------------------------------ the rows
    def _dk_mode(self, i: int, sample: Tensor) -> tuple[str, Tensor | None]:
        """How the corrected sample is made, and the last one where that takes it."""
        done: Done | None = self.__dict__.get("_dk_done")
        if i == 0 or i - 1 in self.disable_corrector or (done is None and self.last_sample is None):
            return "plain", None
        same = (
            done is not None
            and sample is done.out
            and version(sample) == done.out_version
            and sample.requires_grad == done.graph  # neither cut from its graph in place
            and not (done.graph and sample.is_leaf)  # nor made a leaf
        )
        return ("merged", None) if same and not self.solver_p else ("apart", self.last_sample)

    def _dk_order(self, reached: int, i: int) -> int:
        """The predictor's order at step i after ``reached`` steps."""
        order, steps = self.config.solver_order, len(self.timesteps)
        if self.config.lower_order_final:
            order = min(order, max(steps - i, 1))
        return min(order, reached + 1)

    def _dk_kept(self) -> bool:
        """Whether m0 is the model output itself."""
        return self.config.prediction_type == ("sample" if self.predict_x0 else "epsilon")

    def _dk_check_prediction(self, model_output: Tensor, sample: Tensor) -> None:
        kinds = ("epsilon", "sample", "v_prediction", *(("flow_prediction",) if self.predict_x0 else ()))
        if self.config.prediction_type not in kinds:
            self.convert_model_output(model_output, sample=sample)  # raises, as the original does

    def _dk_rows(self, reached: int, mode: str, model_output: Any = None, sample: Any = None) -> Rows:
        key = (reached, mode, self.timesteps.shape[0], self._dk_exact, self.predict_x0)
        found: Rows | None = self._dk_hot_value(key)
        if found is None:
            if model_output is not None:
                self._dk_check_prediction(model_output, sample)
            sources = (self.sigmas, self._internal_dict)
            found = self._dk_cached(("rows", *key), sources, lambda: self._dk_build(reached, mode))
            self._dk_warm(key, found)
        return found

    def _dk_build(self, reached: int, mode: str) -> Rows:
        config, steps = self.config, len(self.sigmas) - 1
        values = host(self.sigmas, self._dk_exact)
        alpha, sigma = self._sigma_to_alpha_sigma_t(values)
        levels = Levels(alpha, sigma, self.predict_x0, config.solver_type)
        # Where a step has no length, or ends at sigma = 0, older estimates divide by 0 or infinity: order 1.
        single = (values[1:] == values[:-1]) | (values[1:] == 0)
        before = None
        if mode != "plain":
            orders = torch.tensor([self._dk_order(max(min(reached, i + 1) - 1, 0), i) for i in range(steps)])
            before = halves(levels, torch.where(single, 1, orders))
        orders = torch.tensor([min(self._dk_order(reached, i), i + 1) for i in range(steps)])
        weights = combine(before, halves(levels, torch.where(single, 1, orders)), mode)
        alpha, sigma, values = alpha.double(), sigma.double(), values.double()
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        p, q = {
            ("epsilon", True): (1 / alpha, -sigma / alpha),
            ("v_prediction", True): (alpha, -sigma),
            ("flow_prediction", True): (one, -values),
            ("sample", False): (1 / sigma, -alpha / sigma),
            ("v_prediction", False): (sigma, alpha),
        }.get((config.prediction_type, bool(self.predict_x0)), (zero, one))
        estimate = table_of(steps, p=p[:-1], q=q[:-1], b=1.0)
        table = table_of(steps, p=p[:-1], q=q[:-1], known_s=alpha[1:], known_n=sigma[1:])
        total = weights.total
        for name, k in (("a", 0), ("e3", 1), ("b", 2)):
            column(table, name)[:] = total[:, k]
        if config.solver_order <= FUSED_ORDER:
            for i in range(steps):
                for k, weight in enumerate(total[i, 3 : 3 + config.solver_order].tolist()):
                    column(table, f"e{(i - 1 - k) % config.solver_order}")[i] = weight
        return Rows(weights, table, estimate, sum_tables(weights.corrected), sum_tables(total))

    def _dk_taken(self, table: Tensor) -> Tensor:
        """The rows for a model output that is m0 already."""

        def build() -> Tensor:
            taken = table.clone()
            column(taken, "p")[:], column(taken, "q")[:] = 0.0, 1.0
            return taken

        return self._dk_cached(("taken", id(table)), (table,), build)

    def _dk_estimate(self, rows: Rows, i: int, model_output: Tensor, sample: Tensor) -> Tensor:
        """m0, thresholded where the config says so."""
        made = self._dk_run(sample, model_output, table=rows.estimate, row=i, state=sample.dtype)[0]
        return self._dk_threshold(made) if self.predict_x0 and self.config.thresholding else made

    def _dk_sum(
        self, sums: list[Tensor], i: int, sample: Tensor, last: Tensor | None, estimates: list[Tensor | None]
    ) -> Tensor:
        """Row i of `sum_tables`: an op, and another for what is beyond its operands."""
        older = [*estimates[1:], *(None,) * 7]
        out = self._dk_run(sample, estimates[0], *older[:3], last, table=sums[0], row=i, state=sample.dtype)[0]
        for table in sums[1:]:
            out = self._dk_run(out, None, *older[3:7], table=table, row=i, state=sample.dtype)[0]
        return out

    def _dk_corrected(self, done: Done) -> Tensor:
        """The corrected sample of a step, from what it read; from what it returned if that was overwritten since."""
        rows, i = done.rows, done.i
        if version(done.sample) == done.sample_version:
            if done.mode == "plain":
                return done.sample
            return self._dk_sum(rows.corrected, i, done.sample, done.last, done.estimates)
        corrected, total = rows.weights.corrected[i], rows.weights.total[i]
        keep = float(total[1] / corrected[1] if done.mode == "apart" else total[0])
        if version(done.out) != done.out_version or keep == 0.0:
            raise RuntimeError(
                "both the sample that went into the last step and the one it returned were overwritten in place: "
                "clone one of them, the corrector needs it"
            )
        after = -(total - keep * corrected) / keep  # x' = keep corrected + sum_k c_k m_k, for corrected
        after[0], after[1] = 1.0 / keep, 0.0
        return self._dk_sum(sum_tables(after[None]), 0, done.out, None, done.estimates)


def sum_tables(weights: Tensor) -> list[Tensor]:
    """Rows that add up multiples of (sample, last corrected sample, m0, m1, m2, ...), [S, 2 + estimates] weights:
    one table, and another where there are more than m3."""
    names = ("a", "e3", "d", "e0", "e1", "e2")
    first = {name: weights[:, k] for k, name in enumerate(names[: weights.shape[1]])}
    more = {f"e{k}": weights[:, 6 + k] for k in range(weights.shape[1] - 6)}
    tables = [table_of(len(weights), **first)]
    return [*tables, table_of(len(weights), a=1.0, **more)] if more else tables

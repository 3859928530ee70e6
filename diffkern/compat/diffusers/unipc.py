"""diffusers' UniPCMultistepScheduler on one fused op a step."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from diffusers import UniPCMultistepScheduler as Original
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from diffkern.compat.diffusers._engine import Attached, DropIn, Rows, fits
from diffkern.compat.diffusers._host import host
from diffkern.compat.diffusers._multistep import MultistepEngine, Past, check_repeats, past_between
from diffkern.compat.diffusers._plans import plan_of, thresholded
from diffkern.compat.diffusers._unipc_rows import Levels, Step, combine, halves
from diffkern.compat.kit.rows import SIXTEEN, as_dtype, column, table_of
from diffkern.compat.kit.tables import version
from diffkern.plan import SLOTS, Plan

FUSED_ORDER = SLOTS - 1
"""Up to this order a step reads at most 4 histories; above, its sum takes one op more."""


class Steps(NamedTuple):
    """What the steps of a mode after a number of earlier ones are run with."""

    weights: Step
    made: Rows
    """[S, 21]: m0 = p x + q m, and x' over sample, m0, and m1, m2, m3 and the last corrected sample as histories."""
    given: Rows
    """The same where m0 is the model's output."""
    estimate: Tensor
    """[S, 21]: m0 alone."""
    corrected: list[Tensor]
    """The corrected sample and, beyond `FUSED_ORDER`, x' as sums (`sum_tables`)."""
    total: list[Tensor]
    past: Past


class Done(NamedTuple):
    """What a step read and wrote: enough to find its corrected sample again.

    It lies in the scheduler's ``__dict__`` in the place of ``last_sample``, so that it goes where that dict goes
    (pipelines swap one in for each view); a deep copy has the corrected sample itself, as its tensors are others.
    """

    engine: MultistepEngine
    steps: Steps
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(corrected_now(self), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, like a deep copy, as the corrected sample."""
        return torch.detach, (corrected_now(self).detach(),)


class UniPCMultistepScheduler(DropIn, Original):
    """UniPC-p, arXiv 2302.04867: the corrector of the last step and the predictor of this one in one row.

    The corrected sample is the predicted one, which comes in as ``sample``, plus multiples of the estimates. Where
    ``sample`` is not what the last step returned (inpainting), it is made from the last corrected sample as in the
    original: one op more.
    """

    _engine = Attached(MultistepEngine)

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
        found = self.__dict__.get("last_sample")
        if isinstance(found, Done):
            found = self.__dict__["last_sample"] = corrected_now(found)
        return found

    @last_sample.setter
    def last_sample(self, value: Tensor | None) -> None:
        self.__dict__["last_sample"] = value

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
        i, order = self._step_index, config.solver_order
        assert not config.lower_order_final or i < self.timesteps.numel()  # the original's
        if i >= self.sigmas.numel() - 1:
            self.sigmas[i + 1]  # the original's exception
        mode, last = mode_of(self, i, sample)
        sigmas, dtype = self.sigmas, sample.dtype
        narrow: dict[str, Any] = {}
        if dtype in SIXTEEN and not self.solver_p:
            sample, narrow = engine.start_from(sample, dtype, sigmas, i)  # from here on the state itself
        reached, kept = min(self.lower_order_nums, order), keeps_output(self)
        steps = steps_of(self, reached, mode, model_output, sample)
        if reached and steps.past.idle[i - 1]:
            check_repeats(self, steps.past, i)
        estimates: list[Tensor | None] = [None, *reversed(self.model_outputs)]
        if narrow:
            estimates = [engine.wide(m) for m in estimates]
        thresholds = self.predict_x0 and config.thresholding
        if thresholds:
            estimates[0] = estimate(self, steps, i, model_output, sample)
        elif kept and model_output.dtype == sample.dtype:
            estimates[0] = model_output if model_output.shape == sample.shape else model_output.expand(sample.shape)
        self.timestep_list[:-1] = self.timestep_list[1:]
        self.timestep_list[-1] = timestep
        if self.solver_p or order > FUSED_ORDER:
            if estimates[0] is None:
                estimates[0] = estimate(self, steps, i, model_output, sample)
            if self.solver_p:
                corrected = sample if mode == "plain" else summed(engine, steps.corrected, i, sample, last, estimates)
                out = self.solver_p.step(model_output, timestep, corrected).prev_sample
                self.last_sample = corrected
            else:
                total = summed(engine, steps.total, i, sample, last, estimates)
                out = as_dtype(total, dtype)
                if narrow:
                    engine.carry(total, out, sigmas, i + 1)
        else:
            own = estimates[0] is None
            m = model_output if own else estimates[0]
            assert m is not None
            rows = steps.made if own else steps.given if kept else engine.taken(steps.made.table)
            older: list[Tensor | None] = [None] * FUSED_ORDER  # a ring: that of the n-th step lies in slot n % order
            for k in range(order):
                older[(steps.past.earlier[i] - 1 - k) % order] = estimates[1 + k]
            if not narrow and fits(m, sample, *older, last):
                h0, h1, h2 = older
                out, x0, _, _ = rows.plain(sample, m, i, h0=h0, h1=h1, h2=h2, h3=last)
            else:
                wants: dict[str, Any] = {"want_x0": own, "state": sample.dtype, **narrow}
                found = engine.run(sample, m, *older, last, table=rows.table, row=i, **wants)
                out, x0, _, _ = engine.end_with(found, narrow, sigmas, i)
            estimates[0] = x0 if own else estimates[0]
        if not self.solver_p:
            self.__dict__["last_sample"] = Done(
                *(engine, steps, mode, i, out, version(out), sample, version(sample), last, estimates),
                graph=out.requires_grad,
            )
            if out.is_inference() or sample.is_inference():
                self.last_sample  # noqa: B018  (made while both are as they were: writes go uncounted)
        self.this_order = order_at(self, reached, i)
        idle = steps.past.idle[i]
        m0 = engine.rounded(estimates[0], dtype) if narrow and not idle else estimates[0]
        engine.remember(self, m0, idle)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x + sigma noise in one op; coefficients in float32 whatever the samples' dtype."""
        return self._engine.add_noise(self, original_samples, noise, timesteps)

    def plan(self) -> Plan:
        """The steps of the current `set_timesteps` as a plan for `diffkern.sample` (no solver_p)."""
        order, times = self.config.solver_order, self._engine.clock(self.timesteps).times
        if self.solver_p or order > FUSED_ORDER:
            raise ValueError(f"a plan has solver_order <= {FUSED_ORDER} and no solver_p, got {order}, {self.solver_p}")
        parts, saves = [], []
        past = steps_of(self, 0, "plain").past
        for i, (idle, count, _) in enumerate(zip(past.idle, past.earlier, times, strict=False)):
            if count:
                check_repeats(self, past, i)
            mode = "plain" if i == 0 or i - 1 in self.disable_corrector else "merged"
            parts.append(steps_of(self, min(count, order), mode).made.table[i : i + 1])
            saves.append(() if idle else ((count % order, "x0"),))
        plan = plan_of("unipc", torch.cat(parts), times, self.config.prediction_type, saves=saves)
        return thresholded(plan, self.config) if self.predict_x0 else plan  # in eps the original thresholds nothing


# ------------------------------------------------------------------------------------------------------- the rows
def mode_of(scheduler: UniPCMultistepScheduler, i: int, sample: Tensor) -> tuple[str, Tensor | None]:
    """How the corrected sample is made, and the last one where that takes it."""
    done = scheduler.__dict__.get("last_sample")
    if i == 0 or i - 1 in scheduler.disable_corrector or done is None:
        return "plain", None
    same = (
        isinstance(done, Done)
        and sample is done.out
        and version(sample) == done.out_version
        and sample.requires_grad == done.graph  # neither cut from its graph in place
        and not (done.graph and sample.is_leaf)  # nor made a leaf
    )
    return ("merged", None) if same and not scheduler.solver_p else ("apart", scheduler.last_sample)


def order_at(scheduler: UniPCMultistepScheduler, reached: int, i: int) -> int:
    """The predictor's order at step i after ``reached`` steps."""
    order, steps = scheduler.config.solver_order, scheduler.timesteps.numel()  # len() takes ten times as long
    if scheduler.config.lower_order_final:
        order = min(order, max(steps - i, 1))
    return min(order, reached + 1)


def keeps_output(scheduler: UniPCMultistepScheduler) -> bool:
    """Whether m0 is the model output itself."""
    return scheduler.config.prediction_type == ("sample" if scheduler.predict_x0 else "epsilon")


def steps_of(
    scheduler: UniPCMultistepScheduler,
    reached: int,
    mode: str,
    model_output: Tensor | None = None,
    sample: Tensor | None = None,
) -> Steps:
    """The steps after ``reached`` earlier ones."""
    engine = scheduler._engine
    key = (reached, mode, scheduler.timesteps.numel(), engine.exact, scheduler.predict_x0)
    return engine.kept(scheduler, key, lambda: made(scheduler, reached, mode, model_output, sample))


def made(
    scheduler: UniPCMultistepScheduler, reached: int, mode: str, model_output: Tensor | None, sample: Tensor | None
) -> Steps:
    """`steps_of`, from the sigmas."""
    config, steps, predict_x0 = scheduler.config, len(scheduler.sigmas) - 1, bool(scheduler.predict_x0)
    values = host(scheduler.sigmas, scheduler._engine.exact)
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(values)
    levels = Levels(alpha, sigma, predict_x0, config.solver_type)
    lam = levels.log_ratio
    past = past_between(scheduler, values, lam[1:] - lam[:-1])
    earlier = torch.tensor(past.earlier)
    # Where a step has no length, or ends at sigma = 0, older estimates divide by 0 or infinity: order 1.
    single = torch.tensor(past.idle) | (values[1:] == 0)
    before = None
    if mode != "plain":
        orders = torch.tensor([order_at(scheduler, max(reached - 1, 0), i) for i in range(steps)])
        before = halves(levels, torch.where(single, 1, torch.minimum(orders, earlier + 1)), past)
    orders = torch.tensor([order_at(scheduler, reached, i) for i in range(steps)])
    weights = combine(before, halves(levels, torch.where(single, 1, torch.minimum(orders, earlier + 1)), past), mode)
    alpha, sigma, values = alpha.double(), sigma.double(), values.double()
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    known = {
        ("epsilon", True): (1 / alpha, -sigma / alpha),
        ("sample", True): (zero, one),
        ("v_prediction", True): (alpha, -sigma),
        ("flow_prediction", True): (one, -values),
        ("epsilon", False): (zero, one),
        ("sample", False): (1 / sigma, -alpha / sigma),
        ("v_prediction", False): (sigma, alpha),
    }
    if (config.prediction_type, predict_x0) not in known:
        if model_output is not None:
            scheduler.convert_model_output(model_output, sample=sample)  # raises, as the original does
        raise ValueError(
            f"prediction_type must be one of those of {scheduler.__class__.__name__}, got {config.prediction_type!r}"
        )
    p, q = known[config.prediction_type, predict_x0]
    estimate = table_of(steps, p=p[:-1], q=q[:-1], b=1.0)
    table = table_of(steps, p=p[:-1], q=q[:-1], known_s=alpha[1:], known_n=sigma[1:])
    total = weights.total
    for name, k in (("a", 0), ("e3", 1), ("b", 2)):
        column(table, name)[:] = total[:, k]
    if config.solver_order <= FUSED_ORDER:
        for i in range(steps):
            for k, weight in enumerate(total[i, 3 : 3 + config.solver_order].tolist()):
                column(table, f"e{(past.earlier[i] - 1 - k) % config.solver_order}")[i] = weight
    sums = (sum_tables(weights.corrected), sum_tables(total))
    return Steps(weights, Rows(table, want_x0=True), Rows(table), estimate, *sums, past)


# ---------------------------------------------------------------------------------------------------------- the ops
def estimate(scheduler: UniPCMultistepScheduler, steps: Steps, i: int, model_output: Tensor, sample: Tensor) -> Tensor:
    """m0, thresholded where the config says so."""
    engine = scheduler._engine
    m0, *_ = engine.run(sample, model_output, table=steps.estimate, row=i, state=sample.dtype)
    return engine.threshold(scheduler, m0) if scheduler.predict_x0 and scheduler.config.thresholding else m0


def summed(
    engine: MultistepEngine,
    sums: list[Tensor],
    i: int,
    sample: Tensor,
    last: Tensor | None,
    estimates: list[Tensor | None],
) -> Tensor:
    """Row i of `sum_tables`: an op, and another for what is beyond its operands."""
    older = [*estimates[1:], *(None,) * 7]
    out, *_ = engine.run(sample, estimates[0], *older[:3], last, table=sums[0], row=i, state=sample.dtype)
    for table in sums[1:]:
        out, *_ = engine.run(out, None, *older[3:7], table=table, row=i, state=sample.dtype)
    return out


def corrected_now(done: Done) -> Tensor:
    """`corrected_sample` with gradients recorded as they were in the step, whoever asks for it now."""
    with torch.set_grad_enabled(done.graph):
        return corrected_sample(done.engine, done)


def corrected_sample(engine: MultistepEngine, done: Done) -> Tensor:
    """The corrected sample of a step, from what it read; from what it returned if that was overwritten since."""
    steps, i = done.steps, done.i
    if version(done.sample) == done.sample_version:
        if done.mode == "plain":
            return done.sample
        return summed(engine, steps.corrected, i, done.sample, done.last, done.estimates)
    corrected, total = steps.weights.corrected[i], steps.weights.total[i]
    keep = float(total[1] / corrected[1] if done.mode == "apart" else total[0])
    if version(done.out) != done.out_version or keep == 0.0:
        raise RuntimeError(
            "both the sample that went into the last step and the one it returned were overwritten in place: "
            "clone one of them, the corrector needs it"
        )
    after = -(total - keep * corrected) / keep  # x' = keep corrected + sum_k c_k m_k, for corrected
    after[0], after[1] = 1.0 / keep, 0.0
    return summed(engine, sum_tables(after[None]), 0, done.out, None, done.estimates)


def sum_tables(weights: Tensor) -> list[Tensor]:
    """Rows that add up multiples of (sample, last corrected sample, m0, m1, m2, ...), [S, 2 + estimates] weights:
    one table, and another where there are more than m3."""
    names = ("a", "e3", "d", "e0", "e1", "e2")
    first = {name: weights[:, k] for k, name in enumerate(names[: weights.shape[1]])}
    more = {f"e{k}": weights[:, 6 + k] for k in range(weights.shape[1] - 6)}
    tables = [table_of(len(weights), **first)]
    return [*tables, table_of(len(weights), a=1.0, **more)] if more else tables

"""Predictor-corrector sampling: a step of the reverse SDE, and Langevin steps at each level (arXiv 2011.13456).

At the level (alpha, sigma) of time t, before the step to (alpha', sigma') of time s, with r = alpha/alpha' and v =
sigma^2 - r^2 sigma'^2, the kernel x_t = r x_s + sqrt(v) z (on a table r^2 = 1 - beta_t, v = beta_t; VE: r = 1):

| corrector, `corrector_steps` times at t | x' = x + e score + sqrt(2 e) z |
|---|---|
| ``langevin`` | e = 2 r^2 (snr norm(z)/norm(score))^2, norms of the sample itself |
| ``ald`` (annealed Langevin dynamics) | e = 2 r^2 (snr sigma)^2 |
| ``none`` | |

| predictor, t to s | x' = mean + std z |
|---|---|
| ``reverse_diffusion`` | (2 - r) x + v score, std sqrt(v) |
| ``ancestral`` | (x + v score)/r, std sqrt(v) ("beta") or sigma' sqrt(v)/sigma ("beta_tilde") |
| ``euler_maruyama`` | x - dt (f x - g^2 score), std g sqrt(dt), f and g the schedule's |
| ``none`` | x itself |

Algorithms 2 to 5 and appendices E to G of the paper. Each model call is one fused step; ``langevin`` adds two fused
sums of squares (`ops.loss`) and [B]-sized arithmetic on the device, from which the step writes rows of its own for each
sample: nothing is read back. That is why it has a loop beside `sample`'s, whose rows are known before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from diffkern import ops
from diffkern.checks import need_model, need_tensor, returned
from diffkern.names import Corrector, Norm
from diffkern.ops import Seeds
from diffkern.plan import COLUMNS, Plan
from diffkern.samplers.arguments import choice
from diffkern.sampling import _states
from diffkern.sampling._corrector_rows import Score, rows_of
from diffkern.sampling._inputs import check_state, next_noise, progress_bar, seeds_for
from diffkern.sampling.options import Model, PredictorCorrectorOptions, RowOptions, Sampled, StepInfo
from diffkern.schedules.base import Schedule
from diffkern.signatures import shows_arguments_of

NORMS = ("sample", "batch")
_A, _D, _G = (COLUMNS.index(name) for name in ("a", "d", "g"))


@overload
def predictor_corrector(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    steps: int | None = ...,
    *,
    trajectory: Literal[False] = ...,
    **options: Unpack[PredictorCorrectorOptions],
) -> Tensor: ...


@overload
def predictor_corrector(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    steps: int | None = ...,
    *,
    trajectory: Literal[True],
    **options: Unpack[PredictorCorrectorOptions],
) -> Sampled: ...


@shows_arguments_of(rows_of)
@torch.no_grad()
def predictor_corrector(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    steps: int | None = None,
    *,
    corrector: Corrector = "langevin",
    norm: Norm = "sample",
    seeds: Seeds | None = None,
    cond: Any = None,
    noise: Iterable[Tensor] | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    callback: Callable[[StepInfo], object] | None = None,
    trajectory: bool = False,
    progress: bool | str = False,
    out_dtype: torch.dtype | None = None,
    model_dtype: torch.dtype | None = None,
    **options: Unpack[RowOptions],
) -> Tensor | Sampled:
    """Sample from ``x`` at the noise end, alpha x0 + sigma eps, by predictor and corrector; returns the state [B, ...].

    The start is that of `samplers.euler_maruyama`, so ``initial(euler_maruyama(schedule, steps), ...)`` makes it. The
    last step ends on clean data and, with ``denoise``, its predictor adds no noise. The module's docstring has the
    formulas.

    - ``steps`` times by ``spacing`` (as for `samplers.euler`), or ``timesteps``, the times of the model calls.
    - ``snr``: signal-to-noise ratio of the corrector; the paper has 0.16 for CIFAR-10 with VE.
    - ``norm``: "sample" takes the norms of each sample, which then depends on its own seed alone; "batch" takes their
      averages over the batch, as score_sde does.
    - ``variance`` of the ancestral predictor: "beta" or "beta_tilde"; by default score_sde's, beta_tilde where alpha is
      1 (VE, EDM) and beta elsewhere.
    - ``dt`` of the euler_maruyama predictor: by default the grid's. (score_sde steps 1/steps on a grid whose points are
      (1 - eps)/(steps - 1) apart; its sub-VP reverse diffusion is that Euler-Maruyama step, here it is the kernel's.)
    - the rest as for `sample`. Row i = (corrector_steps + 1) step + k, the corrector's rows first, draws on
      ``streams.STEP + i``, or takes the next tensor of ``noise``. With ``mask`` and ``known`` each row is followed by
      the known part, noised to the row's level on ``streams.KNOWN + i``, of ``seeds`` also where ``noise`` is given.

    Model calls: corrector_steps + 1 a step; a corrector alone has corrector_steps, a predictor alone 1. Buffers: two
    states, one more for a callback's x0, two model inputs. No device is waited for.
    Raises ValueError, naming argument, rule and value, for input that does not fit.
    """
    need_model(model)
    need_tensor("x", x)
    plan, scores = rows_of(schedule, steps, corrector=corrector, **options)
    choice("norm", norm, NORMS)
    mask = check_state(x, mask, known)
    drawn = seeds_for(plan.rows, x, seeds, noise, mask)
    run = _Run(plan, scores, x, model_dtype or x.dtype, cond, mask, known, norm, drawn)
    noises: Iterator[Tensor] | None = None if noise is None else iter(noise)
    states = torch.empty((len(plan.steps) + 1, *x.shape), dtype=x.dtype, device=x.device) if trajectory else None
    if states is not None:
        states[0] = x
    bar = progress_bar(progress, plan.name, len(plan.steps))
    try:
        for i, step in enumerate(plan.steps):
            for row in step:
                z = next_noise(noises, row, x) if noises is not None and plan.rows[row].draws else None
                run.row(model, row, None if z is None else z.to(run.state.dtype), want_x0=callback is not None)
            if states is not None:
                states[i + 1] = run.state
            if callback is not None:
                run.call_back(callback, i, plan.rows[step.start].time, step[-1])
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()
    out = run.state.to(out_dtype or x.dtype)
    return out if states is None else Sampled(out, states)


@shows_arguments_of(rows_of)
def pc_plan(
    schedule: Schedule, steps: int | None = None, *, corrector: Corrector = "ald", **options: Unpack[RowOptions]
) -> Plan:
    """`predictor_corrector` as a `Plan` for `sample`: correctors ald and none, whose coefficients are known before.

    Arguments and draws are those of `predictor_corrector`. Raises ValueError for ``langevin``, whose step size is known
    after the model call only.
    """
    if corrector == "langevin":
        raise ValueError("corrector must be 'ald' or 'none' in a plan, got 'langevin': its step size needs the score")
    return rows_of(schedule, steps, corrector=corrector, **options)[0]


class _Run:
    """The buffers of one run, and one row at a time; states are float32 for an x of 16 bits, as in `sample`."""

    def __init__(
        self,
        plan: Plan,
        scores: dict[int, Score],
        x: Tensor,
        model_dtype: torch.dtype,
        cond: Any,
        mask: Tensor | None,
        known: Tensor | None,
        norm: Norm,
        seeds: Tensor | None,
    ) -> None:
        self.dtype = x.dtype
        x = x.to(_states.wide(x.dtype))
        self.plan, self.scores, self.state, self.norm = plan, scores, x, norm
        self.cond = cond
        self.mask = mask if mask is None or not mask.is_floating_point() else mask.to(x.dtype)
        self.known = None if known is None else known.to(x.dtype)
        self.seeds = seeds
        self.x0: Tensor | None = None
        batch, device = x.shape[0], x.device
        times = torch.tensor([row.time for row in plan.rows], dtype=getattr(torch, plan.time_dtype), device="cpu")
        self._times = times.to(device)[:, None].repeat(1, batch)
        self._free = [_states.buffer(x), _states.buffer(x)]
        # Not the state, which a model may write into; two of them, as it may return the input it was given.
        self._inputs = [_states.buffer(x, model_dtype) for _ in range(2)]
        self._input = self._inputs[0].copy_(x if plan.first_k == 1.0 else x * plan.first_k)
        if scores:
            # On the device: the coefficients of all rows, the norms' rows, and a table with a row for each sample.
            self._base = plan.table.to(device)
            self._lengths = {
                i: torch.tensor([score.square()], dtype=torch.float64, device="cpu").to(device)
                for i, score in scores.items()
            }
            # Columns a to g: 1 + e on_x, e on_m, sqrt(2 e), e = size times the ratio of the norms.
            self._weights = {i: _columns(score).to(device) for i, score in scores.items()}
            self._unit = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64, device="cpu").to(device)
            self._zeros = torch.zeros((), dtype=x.dtype, device=device).expand(x.shape)
            self._table = torch.empty((max(batch, 1), len(COLUMNS)), dtype=torch.float64, device=device)
            self._index = torch.arange(batch, device=device)

    def row(self, model: Model, i: int, noise: Tensor | None, want_x0: bool) -> None:
        """Call the model, then make the row's outputs."""
        row, x = self.plan.rows[i], self.state
        t = self._times[i]
        m = model(self._input, t) if self.cond is None else model(self._input, t, self.cond)
        m = returned(m, x.shape, row=i)
        table, index = self.plan.table, None
        if i in self.scores:
            table, index = self._langevin(i, m, noise), self._index
        out = self._free.pop()
        into = None if i + 1 == len(self.plan.rows) else self._inputs[self._inputs[0] is self._input]
        if want_x0 and self.x0 is None:
            self.x0 = _states.buffer(x)
        ops.step_out(
            x,
            m,
            table=table,
            row=0 if index is not None else i,
            index=index,
            seeds=self.seeds if row.draws or self.mask is not None else None,
            noise=noise,
            mask=self.mask,
            known=self.known,
            out=out,
            x0=self.x0,
            next=into,
        )
        if len(self._free) == 0:  # x was one of ours, not the caller's
            self._free.append(x)
        self.state = out
        if into is not None:
            self._input = into

    def call_back(self, callback: Callable[[StepInfo], object], step: int, time: float, last: int) -> None:
        """Show a callback the state after a step that ends with row ``last``; what it writes into x is the state."""
        assert self.x0 is not None  # no row reads it
        x0 = self.x0.to(self.dtype)
        edited = _states.shown(self.state, self.dtype, callback, i=step, t=time, x0=x0)
        if edited and last + 1 < len(self.plan.rows):
            self._input.copy_(self.state * self.plan.rows[last].k)

    def _langevin(self, i: int, m: Tensor, noise: Tensor | None) -> Tensor:
        """The table of row i, a row a sample: its step size is size (norm(z)/norm(score))^2."""
        score, x, stream = self.scores[i], self.state, self.plan.rows[i].stream
        if score.on_m == 0.0:
            lengths = ops.loss(x, x, self._lengths[i], noise=x, reduction="none")
        else:
            lengths = ops.loss(m, x, self._lengths[i], noise=x, reduction="none")
        if noise is None:
            draws = ops.loss(self._zeros, x, self._unit, seeds=self.seeds, stream=stream, reduction="none")
        else:
            draws = ops.loss(self._zeros, x, self._unit, noise=noise, reduction="none")
        if self.norm == "batch":
            ratio = (draws.sqrt().mean() / lengths.sqrt().mean()).square().expand(lengths.shape)
        else:
            ratio = draws / lengths
        # No step where the score is zero everywhere: there is no ratio, and nothing to follow. A NaN in the score goes
        # into the state with the score itself, whatever the ratio.
        e = ratio.nan_to_num(nan=1.0, posinf=0.0)
        table = self._table.copy_(self._base[i])
        columns = table[: x.shape[0], _A : _G + 1]
        torch.mul(e[:, None], self._weights[i], out=columns)
        columns[:, 0] += 1.0
        columns[:, _G - _A].sqrt_()
        return table


def _columns(score: Score) -> Tensor:
    """What the ratio of the norms is multiplied by in the columns a to g of its row; the last is under a root."""
    weights = torch.zeros(_G - _A + 1, dtype=torch.float64, device="cpu")
    weights[0], weights[_D - _A], weights[-1] = score.size * score.on_x, score.size * score.on_m, 2.0 * score.size
    return weights

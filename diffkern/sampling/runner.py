"""Run a plan: `sample(model, x, plan)`.

The loop holds no arithmetic of its own. A row is one model call and one fused op, which writes the new state and, in
the same pass, the model's next input; buffers are reused, no value is read back from a device. What takes more ops a
row: dynamic thresholding three, noise on a Brownian path two, ``logprob`` one more, a mean shift of a learned variance
three.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from diffkern import ops, streams
from diffkern.integers import as_integer, integer
from diffkern.ops import Seeds
from diffkern.plan import SLOTS, Plan
from diffkern.sampling._inputs import check_call, check_state, need_plan, next_noise, progress_bar, seeds_for, seeds_of
from diffkern.sampling._run import Run
from diffkern.sampling._tables import check_dtype, plan_to_run
from diffkern.sampling.options import Model, Sampled, SampleOptions, Shift, StepInfo
from diffkern.signatures import names_the_nearest


@names_the_nearest
def initial(
    plan: Plan,
    shape: Sequence[int],
    seeds: Seeds,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    start: int | Tensor = 0,
    x0: Tensor | None = None,
) -> Tensor:
    """The state that `sample` starts from: init_scale z with z on ``streams.INITIAL``, [B, ...].

    With ``start`` and ``x0`` (clean images of that shape): x0 noised to the level before step ``start``, for image to
    image; int64 [B] is a start for each sample, and with start 0 x0 is not read. ``seeds`` is an integer or int64
    [B]. Raises ValueError for ``start`` > 0 without ``x0``.
    """
    need_plan(plan)
    check_dtype(plan, dtype)
    plan = plan_to_run(plan, None)
    if not shape:
        raise ValueError("shape must be [B, ...], got []")
    starts = _steps_of(start, plan, shape[0])
    if x0 is None and max(starts) > 0:
        raise ValueError(f"x0 must be given to start in the middle of a plan, got start={start} without x0")
    if x0 is not None and tuple(x0.shape) != tuple(shape):
        raise ValueError(f"x0 must have the shape {list(shape)}, got {list(x0.shape)}")
    levels = [plan.level(value) for value in starts]
    z = ops.randn(tuple(shape), seeds_of(seeds, shape[0], torch.device(device)), streams.INITIAL, dtype=dtype)
    if len(set(levels)) == 1 and (x0 is None or levels[0][0] == 0.0):
        return z.mul_(levels[0][1])
    assert x0 is not None
    wide = torch.promote_types(dtype, torch.float32)
    one = (1,) * (len(shape) - 1)
    signal, noise = torch.tensor(levels, dtype=wide, device=device).unbind(1)
    return (signal.reshape(-1, *one) * x0.to(device, wide) + noise.reshape(-1, *one) * z).to(dtype)


@overload
def sample(
    model: Model,
    x: Tensor,
    plan: Plan,
    *,
    trajectory: Literal[False] = ...,
    logprob: Literal[False] = ...,
    **options: Unpack[SampleOptions],
) -> Tensor: ...


@overload
def sample(
    model: Model,
    x: Tensor,
    plan: Plan,
    *,
    trajectory: Literal[True],
    logprob: bool = ...,
    **options: Unpack[SampleOptions],
) -> Sampled: ...


@overload
def sample(
    model: Model,
    x: Tensor,
    plan: Plan,
    *,
    trajectory: bool = ...,
    logprob: Literal[True],
    **options: Unpack[SampleOptions],
) -> Sampled: ...


@names_the_nearest
@torch.no_grad()
def sample(
    model: Model,
    x: Tensor,
    plan: Plan,
    *,
    seeds: Seeds | None = None,
    cond: Any = None,
    uncond: Any = None,
    guidance: float | Sequence[float] | None = None,
    mean_shift: Shift | None = None,
    noise: Iterable[Tensor] | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    start: int | Tensor = 0,
    callback: Callable[[StepInfo], object] | None = None,
    trajectory: bool = False,
    logprob: bool = False,
    progress: bool | str = False,
    out_dtype: torch.dtype | None = None,
    model_dtype: torch.dtype | None = None,
    prepare: bool = True,
) -> Tensor | Sampled:
    """Sample: run ``plan`` from the state ``x`` and return the final state, [B, ...].

    ``model(x_in, t)``, or ``model(x_in, t, cond)`` when ``cond`` is given, returns the plan's prediction in the shape
    of ``x`` (twice the channels for a plan of learned variance); t is [B] in the plan's ``time_dtype``. ``x`` is not
    written to; `initial` makes it. What the model writes into its input changes no state. With ``trajectory`` or
    ``logprob`` the result is a `Sampled`.

    - ``seeds``: an integer (`ops.seeds` makes one seed a sample of it) or int64 [B]; sample b then depends on seeds[b]
      alone. None draws them from torch's default generator if the plan needs noise.
    - ``guidance``: weight w of m = u + w (c - u), a number or one a step (`Plan.with_guidance`). Needs ``cond`` and
      ``uncond``, tensors of one shape [B, ...]; the model is called once on [2B] inputs with cat([uncond, cond]), on
      [B] where w is 1 (cond alone) or 0 (uncond alone). `diffkern.guidance` has everything beyond that.
    - ``mean_shift``: a function of (x, t), called before each row that draws; the new state is moved by g^2 times its
      value, g^2 the variance of the row's noise (element by element where that is learned). With the gradient of
      ln p(y given x) this is classifier guidance as in arXiv 2105.05233, algorithm 1; meant for ancestral samplers.
    - ``noise``: tensors like ``x``, one for each row that draws, instead of drawing by address: parity with other code.
    - ``mask``, ``known``: inpainting; after each row the state is kept where the mask is 1 and is ``known`` noised to
      the row's level where it is 0 (blended between), with noise on ``streams.KNOWN`` + row. ``known`` has the shape of
      ``x``, the mask too, or is [B, 1, ...] for all channels (the one operand that broadcasts): bool, uint8 (1 where it
      is not 0) or of the dtype of ``x``, in [0, 1].
    - ``start``: index of the first step to run; ``x`` is then the state before that step (see `initial`). int64 [B]:
      one a sample; the samples with less noise wait for the others, so all end together.
    - ``callback``: called after each step with i, t, x, x0 (`StepInfo`). What it writes into x in place is the state
      of all later steps (the trajectory has the step's own state); what it writes into x0 changes nothing.
    - ``logprob``: also the log-density of every step, see `Sampled`. Not with a mask, whose known part is no draw.
    - ``progress``: a progress bar over the steps; a string is its label.
    - ``out_dtype``: dtype of the final state, that of ``x`` by default.
    - ``model_dtype``: dtype of the model's input, that of ``x`` by default; the output may have any floating dtype.

    - ``prepare``: what a network of `diffkern.nn` makes of times and condition alone (embeddings, modulations, keys and
      values of the context) is made for all rows at once; False makes it at every call, with the same bits.

    For an ``x`` of 16 bits the states inside are float32: an update below half a unit of 16 bits would be lost, and
    with it, over hundreds of steps, the sample. Model input, callback, trajectory and result have the dtype of ``x``,
    each rounded once.

    No gradients are recorded. Buffers: two states, the plan's histories, and one model input, the first row's, which
    others use where it differs from the state. Raises ValueError, naming argument, rule and value, for input that does
    not fit.
    """
    check_call(model, x, plan)
    source, plan = plan, plan_to_run(plan, guidance)
    guided = guidance is not None or any(row.w != 0 for row in plan.rows)
    starts = _runnable_steps(start, plan, x.shape[0])
    begin = min(starts)
    steps = plan.steps[begin:]
    rows = [plan.rows[i] for step in steps for i in step]
    if mean_shift is not None and any(slot == SLOTS - 1 for row in plan.rows for slot in row.reads):
        raise ValueError(f"mean_shift needs a plan that leaves history {SLOTS - 1} free, got {plan.name}")
    if logprob:
        _check_logprob(plan, mask, mean_shift)
    mask = check_state(x, mask, known)
    drawing = sum(row.draws for row in rows)
    if isinstance(noise, list | tuple) and len(noise) != drawing:
        raise ValueError(f"noise must hold one tensor for each row that draws ({drawing}), got {len(noise)}")
    noises: Iterator[Tensor] | None = None if noise is None else iter(noise)
    run = Run(
        source,
        x,
        guidance,
        first=steps[0].start,
        model_dtype=model_dtype or x.dtype,
        guided=guided,
        cond=cond,
        uncond=uncond,
        mask=mask,
        known=known,
        seeds=seeds_for(rows, x, seeds, noise, mask),
        starts=torch.tensor(starts, device="cpu") if len(set(starts)) > 1 else None,
        mean_shift=mean_shift,
        want_x0=callback is not None,
        want_logprob=logprob,
        own_inputs=noises is not None,
        prepare=prepare,
    )
    states = torch.empty((len(steps) + 1, *x.shape), dtype=x.dtype, device=x.device) if trajectory else None
    if states is not None:
        states[0] = x
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    densities = torch.zeros((len(steps), x.shape[0]), dtype=dtype, device=x.device) if logprob else None
    bar = progress_bar(progress, plan.name, len(steps))
    try:
        for i, step in enumerate(steps):
            for row in step:
                draws = plan.rows[row].draws
                run.row(model, row, None if noises is None or not draws else next_noise(noises, row, x))
                if densities is not None and draws:
                    densities[i] += run.logprob()
            if states is not None:
                states[i + 1] = run.state
            if callback is not None:
                run.call_back(callback, begin + i, plan.rows[step.start].time, step[-1])
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()
    out = run.state.to(out_dtype or x.dtype)
    return Sampled(out, states, densities) if trajectory or logprob else out


def transition_logprob(
    model: Model,
    x: Tensor,
    after: Tensor,
    plan: Plan,
    step: int,
    *,
    cond: Any = None,
    uncond: Any = None,
    guidance: float | Sequence[float] | None = None,
    model_dtype: torch.dtype | None = None,
) -> Tensor:
    """ln p(after given x) of one step of a plan, in nats, [B]; differentiable in the model's parameters.

    The density that ``sample(..., logprob=True)`` reports, of a given next state: x is the state before ``step`` and
    ``after`` the one after it, say ``trajectory[i]`` and ``trajectory[i + 1]``. A step without noise has 0 (no ratio
    of policies depends on it). Other arguments as for `sample`; tensors made in inference mode must be cloned before
    they meet gradients. For policy gradients (DDPO, arXiv 2305.13301, section 4.3). Raises ValueError for a
    step of several rows, with a history or with a threshold: its density needs more than x.
    """
    check_call(model, x, plan)
    source, plan = plan, plan_to_run(plan, guidance)
    last = len(plan.steps) - 1
    step = integer("step", step, 0, last, f"in 0..{last} ({plan.name} has {len(plan.steps)})")
    number = plan.steps[step].start
    row = plan.rows[number]
    if len(plan.steps[step]) > 1 or row.reads or plan.threshold is not None:
        raise ValueError(
            f"step must be one row that reads no history, of a plan without a threshold, got step {step} of {plan.name}"
        )
    _check_logprob(plan, None, None)
    check_state(x)
    if torch.is_grad_enabled() and (x.requires_grad or after.requires_grad):
        raise ValueError(
            "x and after must not require grad, as only the model's parameters have a gradient: detach them"
        )
    run = Run(
        source,
        x.detach(),
        guidance,
        first=number,
        model_dtype=model_dtype or x.dtype,
        guided=guidance is not None or any(row.w != 0 for row in plan.rows),
        cond=cond,
        uncond=uncond,
        prepare=False,  # of one row, there is nothing to share
    )
    m = run.call(model, number)
    return ops.step_logprob(after.detach(), x.detach(), m, table=run.table, row=number)


def _steps_of(start: int | Tensor, plan: Plan, batch: int) -> list[int]:
    """The first step of every sample, or of all of them."""
    whole = as_integer(start)
    if whole is not None and not (isinstance(start, Tensor) and start.ndim):  # one of int64 [1] is a sample's
        starts = [whole]
    elif isinstance(start, Tensor):
        if start.dtype != torch.int64 or start.shape != (batch,):
            raise ValueError(
                f"start must be an integer or int64 [{batch}], got {start.dtype} of shape {list(start.shape)}"
            )
        starts = [int(value) for value in start.tolist()] or [0]
    else:
        raise ValueError(f"start must be an integer or int64 [{batch}], got {start!r}")
    for value in set(starts):
        if not 0 <= value < len(plan.steps):
            raise ValueError(
                f"start must lie in 0..{len(plan.steps) - 1} ({plan.name} has {len(plan.steps)} steps), got {value}"
            )
    return starts


def _runnable_steps(start: int | Tensor, plan: Plan, batch: int) -> list[int]:
    """`_steps_of`, none of which reads what an earlier step saved."""
    starts = _steps_of(start, plan, batch)
    for value in set(starts):
        if plan.live[plan.steps[value].start]:
            raise ValueError(
                f"start must be a step that reads no history of the steps before it, got {value} of {plan.name}: make "
                f"the plan on the rest of its grid instead (timesteps= or sigmas=)"
            )
    return starts


def _check_logprob(plan: Plan, mask: Tensor | None, mean_shift: Shift | None) -> None:
    if mask is not None:
        raise ValueError("logprob has no meaning for a state whose known part is put in, got a mask")
    if mean_shift is not None and plan.learned_variance:
        raise ValueError("logprob knows no mean shift of a learned variance, got mean_shift")
    for i, row in enumerate(plan.rows):
        if row.r != 0:
            raise ValueError(f"logprob needs rows whose noise is added to the state alone, got r = {row.r} in row {i}")
    paths = sorted(row.path for row in plan.rows if row.draws and row.path is not None)
    for (_, stop), (begin, _) in itertools.pairwise(paths):
        if begin < stop:
            raise ValueError(f"logprob needs independent noise in each row, got a path used twice ({plan.name})")

"""Run a plan: `sample(model, x, plan)`.

The loop holds no arithmetic of its own. A row is one model call and one fused op, which writes the new state and, in
the same pass, the model's next input; buffers are reused, no value is read back from a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from diffkern import ops, streams
from diffkern.plan import COLUMNS, Plan, Row

Model = Callable[..., Tensor]
Seeds = int | Tensor


class StepInfo(TypedDict):
    """What a callback is given after each step; the tensors are reused, so clone what you keep."""

    i: int
    """Index of the step, from ``start``."""
    t: float
    """Time the model was given in the step's first call."""
    x: Tensor
    """The state after the step."""
    x0: Tensor | None
    """The x0 estimate of the step's last model call."""


class Sampled(NamedTuple):
    """Result of ``sample(..., trajectory=True)``."""

    x: Tensor
    """The final state, [B, ...]."""
    trajectory: Tensor
    """The state before the first step and after each step, [steps + 1, B, ...]."""


def initial(
    plan: Plan,
    shape: Sequence[int],
    seeds: Seeds,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    start: int = 0,
    x0: Tensor | None = None,
) -> Tensor:
    """The state that `sample` starts from: init_scale z with z on ``streams.INITIAL``, [B, ...].

    With ``start`` and ``x0`` (clean images of that shape): x0 noised to the level before step ``start``, for image to
    image. ``seeds`` is an integer or int64 [B]. Raises ValueError for ``start`` > 0 without ``x0``.
    """
    if start > 0 and x0 is None:
        raise ValueError(f"x0 must be given to start in the middle of a plan, got start={start} without x0")
    if x0 is not None and tuple(x0.shape) != tuple(shape):
        raise ValueError(f"x0 must have the shape {list(shape)}, got {list(x0.shape)}")
    signal, noise = plan.level(start)
    z = ops.randn(tuple(shape), _seeds(seeds, shape[0], torch.device(device)), streams.INITIAL, dtype=dtype)
    if x0 is None or signal == 0.0:
        return z.mul_(noise)
    return (signal * x0.to(device, torch.promote_types(dtype, torch.float32)) + noise * z).to(dtype)


@overload
def sample(
    model: Model,
    x: Tensor,
    plan: Plan,
    *,
    seeds: Seeds | None = ...,
    cond: Any = ...,
    uncond: Any = ...,
    guidance: float | Sequence[float] | None = ...,
    noise: Iterable[Tensor] | None = ...,
    mask: Tensor | None = ...,
    known: Tensor | None = ...,
    start: int = ...,
    callback: Callable[[StepInfo], object] | None = ...,
    trajectory: Literal[False] = ...,
    progress: bool | str = ...,
    out_dtype: torch.dtype | None = ...,
    model_dtype: torch.dtype | None = ...,
) -> Tensor: ...


@overload
def sample(
    model: Model,
    x: Tensor,
    plan: Plan,
    *,
    seeds: Seeds | None = ...,
    cond: Any = ...,
    uncond: Any = ...,
    guidance: float | Sequence[float] | None = ...,
    noise: Iterable[Tensor] | None = ...,
    mask: Tensor | None = ...,
    known: Tensor | None = ...,
    start: int = ...,
    callback: Callable[[StepInfo], object] | None = ...,
    trajectory: Literal[True],
    progress: bool | str = ...,
    out_dtype: torch.dtype | None = ...,
    model_dtype: torch.dtype | None = ...,
) -> Sampled: ...


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
    noise: Iterable[Tensor] | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    start: int = 0,
    callback: Callable[[StepInfo], object] | None = None,
    trajectory: bool = False,
    progress: bool | str = False,
    out_dtype: torch.dtype | None = None,
    model_dtype: torch.dtype | None = None,
) -> Tensor | Sampled:
    """Sample: run ``plan`` from the state ``x`` and return the final state, [B, ...] (with ``trajectory`` a `Sampled`).

    ``model(x_in, t)``, or ``model(x_in, t, cond)`` when ``cond`` is given, returns the plan's prediction in the shape
    of ``x``; t is [B] in the plan's ``time_dtype``. ``x`` is not written to; `initial` makes it.

    - ``seeds``: an integer (`ops.seeds` makes one seed a sample of it) or int64 [B]; sample b then depends on seeds[b]
      alone. None draws them from torch's default generator if the plan needs noise.
    - ``guidance``: weight w of m = u + w (c - u), a number or one a step (`Plan.with_guidance`). Needs ``cond`` and
      ``uncond``, tensors of one shape [B, ...]; the model is called once on [2B] inputs with cat([uncond, cond]), on
      [B] where w is 1 (cond alone) or 0 (uncond alone).
    - ``noise``: tensors like ``x``, one for each row that draws, instead of seeds: parity with other code.
    - ``mask``, ``known``: inpainting; after each row the state is kept where the mask is 1 and is ``known`` noised to
      the row's level where it is 0 (blended between), with noise on ``streams.KNOWN`` + row.
    - ``start``: index of the first step to run; ``x`` is then the state before that step (see `initial`).
    - ``callback``: called after each step with i, t, x, x0 (`StepInfo`).
    - ``progress``: a progress bar over the steps; a string is its label.
    - ``model_dtype``: dtype of the model's input, that of ``x`` by default; the output may have any floating dtype.

    No gradients are recorded. Buffers: two states, the plan's histories, and one model input where it differs from the
    state. Raises ValueError, naming argument, rule and value, for input that does not fit.
    """
    if guidance is not None:
        plan = plan.with_guidance(guidance)
    guided = guidance is not None or any(row.w != 0 for row in plan.rows)
    run = _Run(plan, x, model_dtype or x.dtype, guided, cond, uncond, mask, known)
    if not 0 <= start < len(plan.steps):
        raise ValueError(
            f"start must lie in 0..{len(plan.steps) - 1} ({plan.name} has {len(plan.steps)} steps), got {start}"
        )
    if plan.live[plan.steps[start].start]:
        raise ValueError(
            f"start must be a step that reads no history of the steps before it, got {start} of {plan.name}"
        )
    steps = plan.steps[start:]
    rows = [plan.rows[i] for step in steps for i in step]
    noises: Iterator[Tensor] | None = None
    if noise is not None:
        if seeds is not None:
            raise ValueError("give seeds or noise, not both, got both")
        if mask is not None and any(row.known_n for row in rows):
            raise ValueError("noise replaces a plan's own draws only: give seeds with mask and known, got noise")
        noises = iter(noise)
    elif any(row.draws or (mask is not None and row.known_n) for row in rows):
        run.seeds = _seeds(seeds, x.shape[0], x.device)
    elif seeds is not None:
        _seeds(seeds, x.shape[0], x.device)  # not needed, but a wrong one is still an error
    states = torch.empty((len(steps) + 1, *x.shape), dtype=x.dtype, device=x.device) if trajectory else None
    if states is not None:
        states[0] = x
    run.prepare(start)
    bar = _progress_bar(progress, plan, len(steps))
    try:
        for i, step in enumerate(steps):
            run.x0 = None
            for row in step:
                z = _next_noise(noises, row, x) if plan.rows[row].draws and noises is not None else None
                run.row(model, row, z, want_x0=callback is not None)
            if states is not None:
                states[i + 1] = run.state
            if callback is not None:
                callback({"i": start + i, "t": plan.rows[step.start].time, "x": run.state, "x0": run.x0})
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()
    out = run.state if out_dtype is None else run.state.to(out_dtype)
    return out if states is None else Sampled(out, states)


class _Run:
    """The buffers of one run, and one row at a time."""

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        model_dtype: torch.dtype,
        guided: bool,
        cond: Any,
        uncond: Any,
        mask: Tensor | None,
        known: Tensor | None,
    ) -> None:
        if not x.is_floating_point() or x.ndim < 1:
            raise ValueError(f"x must be a floating point tensor [B, ...], got {x.dtype} of shape {list(x.shape)}")
        if (mask is None) != (known is None):
            raise ValueError(f"mask and known must be given together, got only {'known' if mask is None else 'mask'}")
        self.plan, self.state, self.model_dtype = plan, x, model_dtype
        self.seeds: Tensor | None = None
        self.mask, self.known = mask, known
        self.x0: Tensor | None = None
        self.cond, self.uncond = cond, uncond
        self.pair: Tensor | None = None
        self.table = plan.table
        self._slots: list[Tensor | None] = [None] * 4
        self._owned: list[Tensor] = []
        self._inputs: list[Tensor] = []
        self.guided = guided
        if guided:
            self._prepare_guidance(x.shape[0])
        elif uncond is not None:
            raise ValueError("uncond is used with guidance only, got uncond without guidance")
        self._times = torch.tensor([row.time for row in plan.rows], dtype=getattr(torch, plan.time_dtype))

    def _prepare_guidance(self, batch: int) -> None:
        for argument, value in (("cond", self.cond), ("uncond", self.uncond)):
            if not isinstance(value, Tensor):
                raise ValueError(f"guidance needs cond and uncond as tensors, got {argument} = {type(value).__name__}")
            if value.ndim == 0 or value.shape[0] != batch:
                raise ValueError(f"{argument} must have one entry a sample ({batch}), got shape {list(value.shape)}")
        if self.cond.shape != self.uncond.shape or self.cond.dtype != self.uncond.dtype:
            raise ValueError(
                f"cond and uncond must have one shape and dtype, got {list(self.cond.shape)} {self.cond.dtype} "
                f"and {list(self.uncond.shape)} {self.uncond.dtype}"
            )
        self.pair = torch.cat([self.uncond, self.cond])
        # A row of weight 1 calls the conditional model alone, so its table entry takes m as it is.
        column = COLUMNS.index("w")
        self.table = self.table.clone()
        self.table[self.table[:, column] == 1.0, column] = 0.0

    def copies(self, row: Row) -> int:
        """How many times the state stands in the row's model input."""
        return 2 if self.guided and row.w not in (0.0, 1.0) else 1

    def prepare(self, start: int) -> None:
        """Times on the device, and the model input of the first row."""
        first = self.plan.steps[start].start
        batch, x = self.state.shape[0], self.state
        most = max(self.copies(row) for row in self.plan.rows)
        self._times = self._times.to(x.device)[:, None].repeat(1, most * batch)
        k = self.plan.first_k if first == 0 else self.plan.rows[first - 1].k
        copies = self.copies(self.plan.rows[first])
        self.input = x
        if self._needs_input(k, copies):
            work = torch.promote_types(x.dtype, torch.float32)
            self.input = self._input_buffer(copies, avoid=None)
            scaled = (x.to(work) * k).to(self.model_dtype)
            for copy in self.input.split(batch) if batch else ():
                copy.copy_(scaled)

    def row(self, model: Model, i: int, noise: Tensor | None, want_x0: bool) -> None:
        """Call the model if row i does, then make the row's outputs."""
        row, x = self.plan.rows[i], self.state
        m = self._call(model, i) if row.calls_model else None
        m2 = m if m is not None and x.shape[0] == 0 and self.copies(row) == 2 else None  # two halves of an empty batch
        taken: list[Tensor] = []
        sources = {source for _, source in row.saves}
        out = self._take(taken)
        x0 = self._take(taken) if "x0" in sources or (want_x0 and row.makes_x0) else None
        s = self._take(taken) if "s" in sources else None
        following = self.plan.rows[i + 1] if i + 1 < len(self.plan.rows) else None
        into: Tensor | None = None
        if following is not None and following.calls_model and self._needs_input(row.k, self.copies(following)):
            into = self._input_buffer(self.copies(following), avoid=m)
        masked = self.mask is not None
        ops.step_out(
            x,
            m,
            m2,
            *self._slots_for(row),
            table=self.table,
            row=i,
            seeds=self.seeds if row.draws or (masked and row.known_n) else None,
            noise=noise,
            mask=self.mask,
            known=self.known,
            out=out,
            x0=x0,
            s=s,
            next=into,
        )
        found = {"x": x, "x0": x0, "s": s}
        for slot, source in row.saves:
            self._slots[slot] = found[source]
        live = self.plan.live[i + 1]
        self._slots = [t if slot in live else None for slot, t in enumerate(self._slots)]
        self.state, self.x0 = out, x0 if row.makes_x0 else self.x0
        self.input = out if into is None else into

    def _call(self, model: Model, i: int) -> Tensor:
        row, batch = self.plan.rows[i], self.state.shape[0]
        copies = self.copies(row)
        t = self._times[i, : copies * batch]
        if not self.guided:
            m = model(self.input, t) if self.cond is None else model(self.input, t, self.cond)
        else:
            m = model(self.input, t, self.pair if copies == 2 else self.cond if row.w == 1.0 else self.uncond)
        want = [copies * batch, *self.state.shape[1:]]
        if not isinstance(m, Tensor) or list(m.shape) != want:
            got = f"shape {list(m.shape)}" if isinstance(m, Tensor) else type(m).__name__
            raise ValueError(f"model must return a tensor of shape {want}, got {got} at row {i}")
        return m

    def _slots_for(self, row: Row) -> list[Tensor | None]:
        reads = row.reads
        return [t if slot in reads else None for slot, t in enumerate(self._slots)]

    def _needs_input(self, k: float, copies: int) -> bool:
        return k != 1.0 or copies != 1 or self.model_dtype != self.state.dtype

    def _take(self, taken: list[Tensor]) -> Tensor:
        """A buffer like the state that is neither the state, the step's x0 or a history, nor taken for this row."""
        busy = [id(t) for t in (self.state, self.x0, *self._slots, *taken) if t is not None]
        for buffer in self._owned:
            if id(buffer) not in busy:
                break
        else:
            buffer = torch.empty_like(self.state)
            self._owned.append(buffer)
        taken.append(buffer)
        return buffer

    def _input_buffer(self, copies: int, avoid: Tensor | None) -> Tensor:
        """A model input; never one that ``avoid`` lives in, the output of a model that returns its own input."""
        shape = self.state.shape
        for buffer in self._inputs:
            if avoid is None or buffer.untyped_storage().data_ptr() != avoid.untyped_storage().data_ptr():
                break
        else:
            most = max(self.copies(row) for row in self.plan.rows)
            like = torch.empty_like(self.state, dtype=self.model_dtype)
            buffer = torch.empty_like(like) if most == 1 else torch.empty_like(torch.cat([like, like]))
            self._inputs.append(buffer)
        return buffer[: copies * shape[0]]


def _seeds(seeds: Seeds | None, batch: int, device: torch.device) -> Tensor:
    """int64 [B] on ``device`` from an integer, a tensor, or (None) torch's default generator."""
    if seeds is None:
        return torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64).to(device)
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.ndim != 1 or seeds.shape[0] != batch:
            raise ValueError(
                f"seeds must be an integer or int64 [{batch}], got {seeds.dtype} of shape {list(seeds.shape)}"
            )
        return seeds.to(device)
    if isinstance(seeds, bool) or not isinstance(seeds, int):
        raise ValueError(f"seeds must be an integer or int64 [{batch}], got {type(seeds).__name__}")
    return ops.seeds(seeds, batch, device=device)


def _next_noise(noises: Iterator[Tensor], row: int, x: Tensor) -> Tensor:
    z = next(noises, None)
    if z is None:
        raise ValueError(f"noise must hold one tensor for each row that draws, got no more at row {row}")
    if not isinstance(z, Tensor) or z.shape != x.shape or z.dtype != x.dtype:
        got = f"{z.dtype} of shape {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"noise must be tensors like x, {x.dtype} of shape {list(x.shape)}, got {got} for row {row}")
    return z


def _progress_bar(progress: bool | str, plan: Plan, steps: int) -> Any:
    if progress is False:
        return None
    from tqdm.auto import tqdm

    return tqdm(total=steps, desc=progress if isinstance(progress, str) else plan.name, unit="step")

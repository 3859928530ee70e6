"""One run of a plan: its buffers, worked out before the loop, and its rows one at a time.

A row is a model call and one fused op. Which buffer a row reads and writes depends on the plan alone, so `allocate`
says it once, and the loop only looks it up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diffkern import brownian, ops
from diffkern.checks import returned
from diffkern.plan import COLUMNS, SLOTS, Plan, Row

if TYPE_CHECKING:
    from diffkern.sampling.options import Model, Shift

_W = COLUMNS.index("w")


class Call(NamedTuple):
    """The buffers of a row: 0 is the caller's x, -1 none."""

    x: int
    out: int
    x0: int
    s: int
    h: tuple[int, int, int, int]
    next: int
    """How many times the new state stands in the next model input; 0: the input is the state itself, or not needed."""
    seeded: bool
    """Whether it draws by address."""


def allocate(
    plan: Plan, first: int, copies: Sequence[int], *, want_x0: bool, masked: bool, converts: bool
) -> list[Call]:
    """The buffers of the rows from ``first`` on: two states, the histories that are still read, and x0 where wanted.

    ``copies`` is how many times the state stands in each row's model input, ``converts`` whether that has a dtype of
    its own.
    """
    calls = [Call(-1, -1, -1, -1, (-1, -1, -1, -1), 0, False)] * first
    state = 0
    held = -1  # the step's x0, which a callback may look at
    slots = [-1] * SLOTS
    starts = {step.start for step in plan.steps}
    for i in range(first, len(plan.rows)):
        row = plan.rows[i]
        if i in starts:
            held = -1
        sources = {source for _, source in row.saves}
        wanted = [True, "x0" in sources or (want_x0 and row.makes_x0), "s" in sources]
        busy = {state, held, *slots}
        taken = []
        for want in wanted:
            free = next(b for b in itertools.count(1) if b not in busy) if want else -1
            busy.add(free)
            taken.append(free)
        out, x0, s = taken
        h = [slots[k] if k in row.reads else -1 for k in range(SLOTS)]
        following = 0
        if i + 1 < len(plan.rows) and plan.rows[i + 1].calls_model and (row.k != 1.0 or converts or copies[i + 1] != 1):
            following = copies[i + 1]
        seeded = (row.draws and row.path is None) or (masked and row.known_n != 0)
        calls.append(Call(state, out, x0, s, (h[0], h[1], h[2], h[3]), following, seeded))
        found = {"x": state, "x0": x0, "s": s}
        for slot, source in row.saves:
            slots[slot] = found[source]
        slots = [b if slot in plan.live[i + 1] else -1 for slot, b in enumerate(slots)]
        state = out
        if row.makes_x0:
            held = x0
    return calls


class _Operands(NamedTuple):
    """What a row was made of, as `ops.step_logprob` takes it."""

    x: Tensor
    m: Tensor | None
    m2: Tensor | None
    histories: tuple[Tensor | None, ...]
    row: int
    rows: Tensor | None
    """The index, where samples wait."""


class Run:
    """The buffers of one run, and one row at a time."""

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        *,
        first: int,
        model_dtype: torch.dtype,
        guided: bool,
        cond: Any,
        uncond: Any,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        seeds: Tensor | None = None,
        starts: Tensor | None = None,
        mean_shift: Shift | None = None,
        want_x0: bool = False,
        want_logprob: bool = False,
    ) -> None:
        if plan.learned_variance and x.ndim < 2:
            raise ValueError(f"learned variance needs x of shape [B, C, ...], got {list(x.shape)}")
        if not guided and uncond is not None:
            raise ValueError("uncond is used with guidance only, got uncond without guidance")
        self.plan, self.model_dtype, self.seeds = plan, model_dtype, seeds
        self.mask, self.known, self.shift, self.want_logprob = mask, known, mean_shift, want_logprob
        self.state, self.batch = x, x.shape[0]
        self.x0: Tensor | None = None
        self._before: _Operands | None = None  # of the last row, where logprob will be asked for
        self.guided, self.cond, self.uncond = guided, cond, uncond
        self._pair = _pair(cond, uncond, self.batch) if guided else None
        self._copies = [2 if guided and row.w not in (0.0, 1.0) else 1 for row in plan.rows]
        key = (first, want_x0, mask is not None, model_dtype != x.dtype, guided)
        if key not in plan.cache:
            plan.cache[key] = allocate(
                plan, first, self._copies, want_x0=want_x0, masked=mask is not None, converts=model_dtype != x.dtype
            )
        self._calls: list[Call] = plan.cache[key]
        most = max(buffer for call in self._calls[first:] for buffer in call[:4])
        # The list ends in None, so that number -1 is "none".
        self._buffers: list[Tensor | None] = [x, *(torch.empty_like(x) for _ in range(most)), None]
        self._inputs: list[Tensor] = []
        self._spare: dict[str, Tensor] = {}
        channels = 2 * x.shape[1] if plan.learned_variance else x.shape[1] if x.ndim > 1 else None
        tail = [] if channels is None else [channels, *x.shape[2:]]
        self._want = [torch.Size([copies * x.shape[0], *tail]) for copies in (1, 2)]
        self.table = _table(plan, shifts=mean_shift is not None, waits=starts is not None, guided=guided)
        self._estimates = _estimates(plan, guided) if plan.threshold is not None else None
        self._index: Sequence[Tensor] | None = None
        self._waits: Tensor | None = None
        self._all_run = 0  # the first row that no sample waits for
        if starts is not None:
            self.table = self.table.to(x.device)
            begin = torch.tensor([step.start for step in plan.steps], device="cpu")[starts]
            number = torch.arange(len(plan.rows), device="cpu")[:, None]
            waits = (number < begin).to(x.device)
            number = number.to(x.device)
            self._index = torch.where(waits, number + len(plan.rows), number).unbind(0)
            self._waits = waits.reshape(*waits.shape, *(1,) * (x.ndim - 1))
            self._all_run = int(begin.max())
        self._step = ops.bound_step_out(self.table)
        self._times = _times(plan, self._copies, self.batch, x.device)
        self._input = self._first_input(first)

    def _first_input(self, first: int) -> Tensor:
        """The model input of the first row."""
        x, plan = self.state, self.plan
        k = plan.first_k if first == 0 else plan.rows[first - 1].k
        if k == 1.0 and self._copies[first] == 1 and self.model_dtype == x.dtype:
            return x
        work = torch.promote_types(x.dtype, torch.float32)
        made = self._input_buffer(self._copies[first], avoid=None)
        scaled = (x.to(work) * k).to(self.model_dtype)
        for copy in made.split(self.batch) if self.batch else ():
            copy.copy_(scaled)
        return made

    def row(self, model: Model, i: int, noise: Tensor | None) -> None:
        """Call the model if row i does, then make the row's outputs."""
        row, call, buffers = self.plan.rows[i], self._calls[i], self._buffers
        m = self.call(model, i) if row.calls_model else None
        into = self._input_buffer(call.next, avoid=m) if call.next else None
        m2 = m if self.batch == 0 and self._copies[i] == 2 else None  # two halves of an empty batch
        if self.plan.threshold is not None and m is not None:
            m, m2 = self._thresholded(i, m, m2), None
        if row.path is not None and noise is None and row.draws:
            noise = self._increment(row.path)
        index = None if self._index is None else self._index[i]
        seeds = self.seeds if call.seeded and (noise is None or self.mask is not None) else None
        mask = self.mask
        if (
            mask is not None and self._waits is not None and i < self._all_run
        ):  # what a waiting sample starts from is its own
            mask = torch.where(self._waits[i], torch.ones((), dtype=mask.dtype, device=mask.device), mask)
        out, x0 = buffers[call.out], buffers[call.x0]
        assert out is not None
        a, b, c, d = call.h
        h0, h1, h2, h3 = buffers[a], buffers[b], buffers[c], buffers[d]
        if self.plan.learned_variance:
            assert m is not None
            if self.shift is not None and row.draws:
                noise = self._learned_shift(i, m, noise)
                seeds = seeds if self.mask is not None else None
            ops.learned_step_out(
                self.state, m, table=self.table, row=i, index=index, seeds=seeds, noise=noise, mask=mask,
                known=self.known, out=out, x0=x0, next=into,
            )  # fmt: skip
        else:
            if self.shift is not None and row.draws:
                h3 = self._gradient(i)
            self._step(
                self.state,
                m,
                i,
                out=out,
                x0=x0,
                s=buffers[call.s],
                next=into,
                m2=m2,
                h0=h0,
                h1=h1,
                h2=h2,
                h3=h3,
                index=index,
                noise=noise,
                seeds=seeds,
                mask=mask,
                known=self.known,
            )
        if self.want_logprob:
            self._before = _Operands(self.state, m, m2, (h0, h1, h2, h3), i, index)
        self.state = out
        if row.makes_x0:
            self.x0 = x0
        self._input = out if into is None else into

    def logprob(self) -> Tensor:
        """ln p(new state given the one before) of the row that has just run, [B]."""
        assert self._before is not None
        x, m, m2, histories, row, index = self._before
        return ops.step_logprob(self.state, x, m, m2, *histories, table=self.table, row=row, index=index)

    def call(self, model: Model, i: int) -> Tensor:
        """The model's output at row i, checked."""
        copies = self._copies[i]
        cond = self.cond
        if self.guided:
            cond = self._pair if copies == 2 else cond if self.plan.rows[i].w == 1.0 else self.uncond
        m = model(self._input, self._times[i]) if cond is None else model(self._input, self._times[i], cond)
        return returned(m, self._want[copies - 1], row=i)

    def _thresholded(self, i: int, m: Tensor, m2: Tensor | None) -> Tensor:
        """The thresholded x0; before the variance in a model of learned variance."""
        assert self.plan.threshold is not None
        assert self._estimates is not None
        quantile, maximum = self.plan.threshold
        room = self._room("m", m) if self.plan.learned_variance else self._room("threshold", self.state)
        x0, values = room, m
        if self.plan.learned_variance:
            channels = self.state.shape[1]
            room[:, channels:] = m[:, channels:]
            x0, values = room[:, :channels], m[:, :channels]
        ops.step_out(self.state, values, m2, table=self._estimates, row=i, out=x0)
        if x0.numel():
            ops.dynamic_threshold_out(x0, quantile, float("inf") if maximum is None else maximum, out=x0)
        return room

    def _increment(self, path: tuple[float, float]) -> Tensor:
        assert self.seeds is not None
        streams, weights = brownian.increment(*path, normalised=True)
        return ops.noise_sum_out(self.seeds, streams, weights, out=self._room("path", self.state))

    def _gradient(self, i: int) -> Tensor:
        """The mean shift's function at the state of row i."""
        assert self.shift is not None
        state = self.state
        given = self.shift(state, self._times[i][: self.batch])
        return returned(given, state.shape, "mean_shift", i).to(state.dtype)

    def _learned_shift(self, i: int, m: Tensor, noise: Tensor | None) -> Tensor:
        """z + std gradient, which the learned std turns into std z + variance gradient."""
        plain = self._plain_noise(i) if noise is None else noise
        row = Row(g=1.0, r0=self.plan.rows[i].r0, r1=self.plan.rows[i].r1)
        table = replace(self.plan, rows=(row,), threshold=None).learned_table
        scaled = self._room("shift", self.state)
        ops.learned_step_out(self.state, m, table=table, noise=self._gradient(i), out=scaled)
        return scaled.add_(plain)

    def _plain_noise(self, i: int) -> Tensor:
        assert self.seeds is not None
        return ops.randn(tuple(self.state.shape), self.seeds, self.plan.rows[i].stream, dtype=self.state.dtype)

    def _room(self, name: str, like: Tensor) -> Tensor:
        """A buffer in the dtype of the state, kept for the whole run."""
        if name not in self._spare:
            self._spare[name] = torch.empty_like(like, dtype=self.state.dtype)
        return self._spare[name]

    def _input_buffer(self, copies: int, avoid: Tensor | None) -> Tensor:
        """A model input; never one that ``avoid`` lives in, the output of a model that returns its own input."""
        place = -1 if avoid is None else avoid.data_ptr()
        for buffer in self._inputs:
            first = buffer.data_ptr()
            if not first <= place < first + buffer.nbytes:
                break
        else:
            like = torch.empty_like(self.state, dtype=self.model_dtype)
            buffer = like if max(self._copies) == 1 else torch.empty_like(torch.cat([like, like]))
            self._inputs.append(buffer)
        return buffer if buffer.shape[0] == copies * self.batch else buffer[: copies * self.batch]


def _pair(cond: Any, uncond: Any, batch: int) -> Tensor:
    """cat([uncond, cond]), checked."""
    for argument, value in (("cond", cond), ("uncond", uncond)):
        if not isinstance(value, Tensor):
            raise ValueError(f"guidance needs cond and uncond as tensors, got {argument} = {type(value).__name__}")
        if value.ndim == 0 or value.shape[0] != batch:
            raise ValueError(f"{argument} must have one entry a sample ({batch}), got shape {list(value.shape)}")
    if cond.shape != uncond.shape or cond.dtype != uncond.dtype:
        raise ValueError(
            f"cond and uncond must have one shape and dtype, got {list(cond.shape)} {cond.dtype} "
            f"and {list(uncond.shape)} {uncond.dtype}"
        )
    return torch.cat([uncond, cond])


def _table(plan: Plan, *, shifts: bool, waits: bool, guided: bool) -> Tensor:
    """The table of the rows; after them the rows that leave a waiting sample as it is, where samples wait."""
    if not (shifts or waits or guided) and plan.threshold is None:
        return plan.learned_table if plan.learned_variance else plan.table
    rows = list(plan.rows)
    if plan.threshold is not None:
        # The op is given the thresholded x0 in the place of m.
        rows = [replace(row, w=0.0, p=0.0, q=1.0) if row.calls_model else row for row in rows]
    if shifts and not plan.learned_variance:
        rows = [replace(row, e3=row.g * row.g) if row.draws else row for row in rows]
    if waits:
        rows += [Row(a=1.0, k=row.k) for row in plan.rows]
    if plan.learned_variance:
        return replace(plan, rows=tuple(rows), threshold=None).learned_table
    return _of_rows(rows, guided)


def _estimates(plan: Plan, guided: bool) -> Tensor:
    """The rows that make the x0 alone, which is thresholded before the step takes it."""
    return _of_rows([Row(w=row.w, p=row.p, q=row.q, b=1.0) for row in plan.rows], guided)


def _of_rows(rows: Sequence[Row], guided: bool) -> Tensor:
    table = torch.tensor([row.coefficients() for row in rows], dtype=torch.float64, device="cpu")
    if guided:  # a row of weight 1 calls the conditional model alone, so its op takes m as it is
        table[table[:, _W] == 1.0, _W] = 0.0
    return table


def _times(plan: Plan, copies: Sequence[int], batch: int, device: torch.device) -> list[Tensor]:
    """What the model is given at each row, on the device."""
    times = torch.tensor([row.time for row in plan.rows], dtype=getattr(torch, plan.time_dtype), device="cpu")
    found = list(times.to(device)[:, None].repeat(1, max(copies) * batch).unbind(0))
    if max(copies) == min(copies):
        return found
    return [t[: count * batch] for t, count in zip(found, copies, strict=True)]

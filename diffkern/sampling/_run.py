"""One run of a plan: its buffers, worked out before the loop, and its rows one at a time.

A row is a model call and one fused op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diffkern import brownian, ops
from diffkern.checks import returned
from diffkern.modes import untraced
from diffkern.plan import Plan, Row
from diffkern.plan.prepared import Prepared
from diffkern.sampling import _states
from diffkern.sampling._buffers import Call, allocate
from diffkern.sampling._tables import Guidance, check_dtype, estimates_of, plan_to_run, row_times, table_of

if TYPE_CHECKING:
    from diffkern.sampling.options import Model, Shift, StepInfo


def _copies(plan: Plan, guided: bool) -> list[int]:
    """How many times the state stands in each row's model input."""
    return [2 if guided and row.w not in (0.0, 1.0) else 1 for row in plan.rows]


@untraced
def _calls(
    plan: Plan, guidance: Guidance | None, first: int, want_x0: bool, masked: bool, converts: bool, guided: bool
) -> list[Call]:
    """`allocate`, once a plan."""
    plan = plan_to_run(plan, guidance)
    key = (first, want_x0, masked, converts, guided)
    found: list[Call] | None = plan.cache.get(key)
    if found is None:
        copies = _copies(plan, guided)
        found = allocate(plan, first, copies, want_x0=want_x0, masked=masked, converts=converts)
        plan.cache[key] = found
    return found


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
    """The buffers of one run, and one row at a time.

    States and histories are float32 for an x of 16 bits: an update of less than half a unit would be lost.

    What the model writes into its input changes no state. The input is written by the step before, beside the state, or
    where it holds the same it is the state itself; then the op that made a state that was written to makes it again,
    and the rows after it write an input of their own. The first row's is a copy.
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        guidance: Guidance | None = None,
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
        own_inputs: bool = False,
        prepare: bool = True,
    ) -> None:
        check_dtype(plan, x.dtype)
        source, plan = plan, plan_to_run(plan, guidance)  # what is not traced is given what the caller has
        if plan.learned_variance and x.ndim < 2:
            raise ValueError(f"learned variance needs x of shape [B, C, ...], got {list(x.shape)}")
        if not guided and uncond is not None:
            raise ValueError("uncond is used with guidance only, got uncond without guidance")
        self.plan, self.model_dtype, self.seeds = plan, model_dtype, seeds
        self.dtype, wide = x.dtype, _states.wide(x.dtype)
        self.mask = mask if mask is None or not mask.is_floating_point() else mask.to(wide)
        self.known = None if known is None else known.to(wide)
        self.shift, self.want_logprob = mean_shift, want_logprob
        self.state, self.batch = x.to(wide), x.shape[0]
        self._x0 = -1  # the buffer of the step's x0, and whether later rows read it as a history
        self._x0_kept = False
        self._before: _Operands | None = None  # of the last row, where logprob will be asked for
        self.guided, self.cond, self.uncond = guided, cond, uncond
        self._pair = _pair(cond, uncond, self.batch) if guided else None
        self._copies = _copies(plan, guided)
        self._calls = _calls(source, guidance, first, want_x0, mask is not None, model_dtype is not wide, guided)
        most = max(buffer for call in self._calls[first:] for buffer in call[:4])
        # The list ends in None, so that number -1 is "none".
        self._buffers: list[Tensor | None] = [self.state, *(_states.buffer(self.state) for _ in range(most)), None]
        self._inputs: list[Tensor] = []
        # Whether the model is known to write into its input; a trace, and noise that is not ours, are not run again.
        self._writes = own_inputs or torch.compiler.is_compiling()
        self._made: tuple[Callable[..., object], Tensor | None, dict[str, Any]] | None = None
        self._spare: dict[str, Tensor] = {}
        channels = 2 * x.shape[1] if plan.learned_variance else x.shape[1] if x.ndim > 1 else None
        tail = [] if channels is None else [channels, *x.shape[2:]]
        self._want = [torch.Size([copies * x.shape[0], *tail]) for copies in (1, 2)]
        self.table = table_of(source, guidance, shifts=mean_shift is not None, waits=starts is not None, guided=guided)
        self._estimates = estimates_of(source, guidance, guided) if plan.threshold is not None else None
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
        times = row_times(source).to(x.device)
        self._times = _times(times, self._copies, self.batch)
        self._prepared = Prepared(times, prepare, first)
        # A model may change the time it was given in place.
        self._shift_times = [t.clone() for t in self._times] if mean_shift is not None else []
        self._input = self._made_input(first)

    def _made_input(self, i: int) -> Tensor:
        """The input of row i's model call, of the state as it is now."""
        plan = self.plan
        k = plan.first_k if i == 0 else plan.rows[i - 1].k
        made = self._input_buffer(self._copies[i], avoid=None)
        scaled = self.state if k == 1.0 else self.state * k
        for copy in made.split(self.batch) if self.batch else ():
            copy.copy_(scaled)
        return made

    def row(self, model: Model, i: int, noise: Tensor | None) -> None:
        """Call the model if row i does, then make the row's outputs."""
        row, call, buffers = self.plan.rows[i], self._calls[i], self._buffers
        m = self.call(model, i) if row.calls_model else None
        own = call.next and (self._writes or not call.shared)
        into = self._input_buffer(call.next, avoid=m) if own else None
        m2 = m if self.batch == 0 and self._copies[i] == 2 else None  # two halves of an empty batch
        if self.plan.threshold is not None and m is not None:
            m, m2 = self._thresholded(i, m, m2), None
        if noise is not None:
            noise = noise.to(self.state.dtype)
        elif row.path is not None and row.draws:
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
            operands = {
                "x": self.state, "m": m, "table": self.table, "row": i, "index": index, "seeds": seeds, "noise": noise,
                "mask": mask, "known": self.known, "out": out, "x0": x0, "next": into,
            }  # fmt: skip
            step: Callable[..., object] = ops.learned_step_out
        else:
            if self.shift is not None and row.draws:
                h3 = self._gradient(i)
            operands = {
                "x": self.state, "m": m, "row": i, "out": out, "x0": x0, "s": buffers[call.s], "next": into, "m2": m2,
                "h0": h0, "h1": h1, "h2": h2, "h3": h3, "index": index, "noise": noise, "seeds": seeds, "mask": mask,
                "known": self.known,
            }  # fmt: skip
            step = self._step
        step(**operands)
        self._made = step, m, operands
        if self.want_logprob:
            self._before = _Operands(self.state, m, m2, (h0, h1, h2, h3), i, index)
        self.state = out
        if row.makes_x0:
            self._x0, self._x0_kept = call.x0, any(source == "x0" for _, source in row.saves)
        self._input = out if into is None else into

    def call_back(self, callback: Callable[[StepInfo], object], step: int, time: float, last: int) -> None:
        """Show a callback the state after a step that ends with row ``last``; what it writes into x is the state."""
        x0 = self._buffers[self._x0]
        if x0 is not None and (self._x0_kept or x0.dtype is not self.dtype):
            x0 = x0.to(self.dtype, copy=True)
        edited = _states.shown(self.state, self.dtype, callback, i=step, t=time, x0=x0)
        if edited and last + 1 < len(self.plan.rows) and self.plan.rows[last + 1].calls_model:
            self._input = self._made_input(last + 1)
        self._x0 = -1

    def logprob(self) -> Tensor:
        """ln p(new state given the one before) of the row that has just run, [B]; of states of 16 bits as they are in
        the trajectory, where `transition_logprob` finds them."""
        assert self._before is not None
        x, m, m2, histories, row, index = self._before
        after, x = self.state.to(self.dtype), x.to(self.dtype)
        older = (None if h is None else h.to(self.dtype) for h in histories)
        return ops.step_logprob(after, x, m, m2, *older, table=self.table, row=row, index=index)

    def call(self, model: Model, i: int) -> Tensor:
        """The model's output at row i, checked."""
        copies = self._copies[i]
        cond = self.cond
        if self.guided:
            cond = self._pair if copies == 2 else cond if self.plan.rows[i].w == 1.0 else self.uncond
        given, t = self._input, self._times[i]
        if self._writes:
            m = self._prepared.call(model, i, given, t, cond)
        else:
            writes = given._version
            m = self._prepared.call(model, i, given, t, cond)
            if given._version != writes:
                self._writes = True
                if given is self.state:
                    m = self._made_again(m)
        return returned(m, self._want[copies - 1], row=i)

    def _made_again(self, output: Any) -> Any:
        """The state that the model has written into, by the op that made it, whose operands are as they were; the
        model's output, which may be that state."""
        assert self._made is not None
        step, m, operands = self._made
        if isinstance(output, Tensor):
            if m is not None and _overlap(m, output):
                raise ValueError(
                    "model must write into its input from its first call on or never, or return a new tensor each "
                    "time, got one that does neither: give it a copy, lambda x, t: model(x.clone(), t)"
                )
            if _overlap(output, self.state):
                output = output.clone()
        step(**operands)
        return output

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
        """The mean shift's function at the state of row i, of which it has a copy."""
        assert self.shift is not None
        state = self.state.to(self.dtype, copy=True)
        given = self.shift(state, self._shift_times[i][: self.batch])
        return returned(given, state.shape, "mean_shift", i).to(self.state.dtype)

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
            self._spare[name] = _states.buffer(like, self.state.dtype)
        return self._spare[name]

    def _input_buffer(self, copies: int, avoid: Tensor | None) -> Tensor:
        """A model input; never one that ``avoid`` lives in, the output of a model that returns its own input."""
        if torch.compiler.is_compiling():  # no addresses: a new one, and the compiler says where it lies
            like = torch.empty_like(self.state, dtype=self.model_dtype)
            return torch.empty_like(torch.cat([like] * copies))
        place = -1 if avoid is None else avoid.data_ptr()
        for buffer in self._inputs:
            first = buffer.data_ptr()
            if not first <= place < first + buffer.nbytes:
                break
        else:
            like = _states.buffer(self.state, self.model_dtype)
            buffer = like if max(self._copies) == 1 else _states.buffer(torch.cat([like, like]))
            self._inputs.append(buffer)
        return buffer if buffer.shape[0] == copies * self.batch else buffer[: copies * self.batch]


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether both lie in one storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


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


def _times(times: Tensor, copies: Sequence[int], batch: int) -> list[Tensor]:
    """What the model is given at each row."""
    found = list(times[:, None].repeat(1, max(copies) * batch).unbind(0))
    if max(copies) == min(copies):
        return found
    return [t[: count * batch] for t, count in zip(found, copies, strict=True)]

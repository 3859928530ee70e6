"""Drop-ins whose rows belong to steps: row i takes the state from sigmas[i] to sigmas[i + 1].

Two states occur. Karras et al. (arXiv 2206.00364): x = x0 + sigma z, and the model is given x / sqrt(sigma^2 + 1).
Flows (arXiv 2209.03003): x = (1 - sigma) x0 + sigma z, and the model is given x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffkern import ops
from diffkern.compat.diffusers._carried import Carried
from diffkern.compat.diffusers._engine import DropIn, Engine, Hot, Results, Rows, free, unscaled
from diffkern.compat.diffusers._host import HostCopy, Levels, check_numbers
from diffkern.compat.kit.rows import SIXTEEN, as_dtype, promote, table_of
from diffkern.compat.kit.tables import version
from diffkern.plan import SLOTS

FLOAT = torch.float32


class LevelsEngine(Engine):
    """Finds the step that a loop is at without a device read, keeps what depends on the levels, runs the steps."""

    def __init__(self) -> None:
        super().__init__()
        self._sigmas: HostCopy | None = None
        self._levels = Levels([])

    # ---------------------------------------------------------------------------------------------- which row
    def start(self, scheduler: DropIn, timestep: Any) -> None:
        """The first step's index."""
        begin, self.carried = scheduler.begin_index, None
        scheduler._step_index = self.index(scheduler, timestep) if begin is None else begin

    def index(self, scheduler: DropIn, timestep: Any) -> int:
        """The step of a timestep: the second of those that share it, as the original says, for image to image."""
        clock = self.clock(scheduler.timesteps)
        found = clock.places(clock.value(timestep))
        if not found:  # rounded otherwise than the timesteps, or the original's exception
            return scheduler.index_for_timestep(timestep)
        return found[1] if len(found) > 1 else found[0]

    def indices(self, scheduler: DropIn, timesteps: Tensor, device: torch.device) -> Tensor:
        """The steps of a tensor of timesteps, int64 on ``device``; a device's own are searched there, without a read,
        and one that is no timestep gives -1 (NaN in the op)."""
        if timesteps.device.type == "cpu":
            found = [self.index(scheduler, t) for t in timesteps.tolist()]
            return torch.tensor(found, dtype=torch.int64, device=device)
        return self.search(scheduler, timesteps, device)

    def search(self, scheduler: DropIn, timesteps: Tensor, device: torch.device) -> Tensor:
        """`indices` on the device."""
        known = scheduler.timesteps
        chosen = self.tables.get(
            ("chosen", str(device)),
            lambda: torch.tensor([self.index(scheduler, t) for t in self.clock(known).times]).long().to(device),
            known,
        )
        same = timesteps.to(device)[:, None] == known.to(device)[None]
        return torch.where(same.any(1), chosen[same.int().argmax(1)], -1)

    def row(self, scheduler: DropIn, timestep: Any, device: torch.device) -> tuple[int, Tensor | None]:
        """(row, None) in the loop under way; (0, index) for one timestep a sample, while no loop is."""
        if scheduler.step_index is None:
            own = isinstance(timestep, Tensor) and timestep.dim() == 1 and timestep.numel() > 1
            if own and scheduler.begin_index is None and self.clock(scheduler.timesteps).position(timestep) is None:
                return 0, self.indices(scheduler, timestep, device)
            scheduler._init_step_index(timestep)
        assert scheduler.step_index is not None
        return scheduler.step_index, None

    def one_row(self, scheduler: DropIn, timestep: Any, sample: Tensor) -> int:
        """The row, for schedulers that remember the steps before: one timestep for all samples."""
        row, index = self.row(scheduler, timestep, sample.device)
        if index is not None:
            raise ValueError(
                f"timestep must be one for all samples, as {type(scheduler).__name__} remembers earlier steps, "
                f"got shape {list(timestep.shape)}"
            )
        return row

    # ---------------------------------------------------------------------------------------------- the rows
    def sources(self, scheduler: DropIn) -> tuple[Levels, Any]:
        """What tables are made of: the sigmas on the host, read once a `set_timesteps` and the same object for the same
        numbers, and the config."""
        sigmas, copy = scheduler.sigmas, self._sigmas
        if copy is None or not copy.is_of(sigmas):
            copy = HostCopy(sigmas)
            if copy.content() != self._levels.content():
                check_numbers(scheduler, copy.numbers)
                self._levels = Levels(copy.numbers)
            self._sigmas = copy
        return self._levels, scheduler._internal_dict

    def levels(self, scheduler: DropIn) -> Tensor:
        """The original's float32 sigmas as float64 on the CPU."""
        return self.sources(scheduler)[0].values

    def check_room(self, scheduler: DropIn, x: Tensor, row: int, index: Any = None, dtype: Any = None) -> None:
        """Refuses float16 (x, or ``dtype``) where the level is beyond it; not again for what a step has returned."""
        dtype, carried = dtype or x.dtype, self.carried
        if dtype is torch.float16 and (carried is None or carried.out is not x):
            self.sources(scheduler)[0].check_room(scheduler, dtype, row, index)

    def keep(self, scheduler: DropIn, key: Any, rows: Rows) -> None:
        """Keeps the rows of a step for `repeat`."""
        sigmas = scheduler.sigmas
        if not sigmas.is_inference():
            self.hot = Hot(key, rows, scheduler._internal_dict, (sigmas,))

    # ---------------------------------------------------------------------------------------------- the op
    looks_ahead = False
    """Whether a model's input is made of what a step returned."""
    scales_next = False
    """Whether a step's op also makes the next model's input: `KarrasEngine.scale_input`."""

    def look_ahead(self, scheduler: DropIn, found: Results, row: int, rows: int) -> None:
        """Notes what `step` returned, where a model's input is made of it."""

    def repeat(
        self,
        scheduler: DropIn,
        m: Tensor,
        timestep: Any,
        x: Tensor,
        key: Any,
        h0: Tensor | None = None,
        h1: Tensor | None = None,
    ) -> Results | None:
        """(x', x0, ...) of a step without noise whose rows are at hand (`keep`), for operands of float32, or of 16 bits
        whose state is at hand (`carry`), with histories of float32; None where anything is new: then the long way runs.
        """
        hot, row = self.hot, scheduler._step_index
        if hot is None or row is None or hot.key != key or hot.config is not scheduler._internal_dict:
            return None
        rows, sigmas, dtype = hot.rows, hot.sources[0], x.dtype
        if (
            sigmas is not scheduler.sigmas
            or sigmas._version != hot.version
            or row >= rows.count
            or type(timestep) is not Tensor
            or not timestep.is_floating_point()
            or dtype is not m.dtype
            or x.numel() != m.numel()  # of other shapes the op refuses all but two batches
            or (torch.is_grad_enabled() and not free(x, m, h0, h1))
            or forward_ad._current_level >= 0
        ):
            return None
        try:
            if dtype is not FLOAT:
                return self.repeat_narrow(scheduler, rows, m, x, row, h0, h1)
            run = rows.onward if self.scales_next and row + 1 < rows.count else rows.plain
            found: Results = run(x, m, row) if h0 is None else run(x, m, row, h0=h0, h1=h1)
        except RuntimeError:  # the long way has the right one, or none
            return None
        if self.looks_ahead:
            self.look_ahead(scheduler, found, row, rows.count)
        scheduler._step_index = row + 1
        return found

    def repeat_narrow(
        self, scheduler: DropIn, rows: Rows, m: Tensor, x: Tensor, row: int, h0: Tensor | None, h1: Tensor | None
    ) -> Results | None:
        """`repeat` of 16 bits."""
        carried, sigmas = self.carried, scheduler.sigmas
        if carried is None or carried.out is not x or carried.run is not sigmas or carried.at != row:
            return None
        if x.is_inference() or x._version != carried.writes:
            return None
        state, x0, s, out = rows.narrow(x.dtype)(carried.state, m, row, h0=h0, h1=h1)
        assert out is not None
        self.carried = Carried(state, out, version(out), sigmas, row + 1)
        scheduler._step_index = row + 1
        return out, x0, s, None

    def run_upcast(
        self,
        scheduler: DropIn,
        rows: Rows,
        x: Tensor,
        m: Tensor,
        *histories: Tensor | None,
        row: int,
        dtype: torch.dtype | None = None,
        **operands: Any,
    ) -> tuple[Any, Any, Any]:
        """(x' in the model's dtype, x0, s in float32) of originals that upcast the sample; float64 for a float64 model.
        A narrower x' is the op's second output, so that it is rounded once."""
        if x.dtype is m.dtype is torch.float32 and x.shape == m.shape and dtype in (None, m.dtype):
            out, x0, s, _ = self.run_plain(scheduler, rows, x, m, *histories, row=row, **operands)
            return out, x0, s
        table = rows.table
        check_row(scheduler, row, table)
        dtype, index = m.dtype if dtype is None else dtype, operands.get("index")
        self.check_room(scheduler, x, row, index)
        if x.dtype is not dtype:
            self.check_room(scheduler, x, row + 1, None if index is None else index + 1, dtype)
        state = torch.float64 if torch.float64 in (m.dtype, dtype) else torch.float32
        place = scheduler.sigmas, row if index is None else None
        x, wants = self.start_from(x, dtype, *place)
        if dtype != state:
            table = self.tables.get(("narrow", id(table)), lambda: unscaled(rows.table), table)
            operands.update(next_copies=1, next_dtype=dtype)
        operands |= {**rows.wants, "state": state, "table": table, "row": row}
        found = self.run(as_dtype(x, torch.float32), m, *histories, **operands)
        out, x0, s, narrowed = self.end_with(found, wants, *place)
        return out if narrowed is None else narrowed, x0, s

    def run_promoted(
        self,
        scheduler: DropIn,
        rows: Rows,
        x: Tensor,
        m: Tensor,
        *histories: Tensor | None,
        row: int,
        start: Tensor | None = None,
    ) -> Results:
        """The step in the dtype that the operands promote to, for originals that upcast nothing; of 16 bits, x0 and s
        are float32, and ``start`` is what `start_from` gave, where it has been asked."""
        if x.dtype is m.dtype and x.shape == m.shape and x.dtype not in SIXTEEN:
            for h in histories:
                if h is not None and h.dtype is not x.dtype:  # an earlier step was of another
                    break
            else:
                return self.run_plain(scheduler, rows, x, m, *histories, row=row)
        check_row(scheduler, row, rows.table)
        self.check_room(scheduler, x, row)
        dtype = promote(x.dtype, m.dtype)
        if dtype in SIXTEEN:
            place = scheduler.sigmas, row
            if start is None:
                start, _ = self.start_from(x, dtype, *place)
            wants: dict[str, Any] = {"state": torch.float32, "next_copies": 1, "next_dtype": dtype}
            wide = all(h is None or h.dtype is torch.float32 for h in histories)
            if wide and x.shape == m.shape and free(x, m, *histories):
                h0, h1, h2, h3 = [*histories, None, None, None, None][:SLOTS]
                found: Results = rows.narrow(dtype)(start, m, row, h0=h0, h1=h1, h2=h2, h3=h3)
            else:
                table = self.tables.get(("narrow", id(rows.table)), lambda: unscaled(rows.table), rows.table)
                found = self.run(start, m, *histories, table=table, row=row, **rows.wants, **wants)
            return self.end_with(found, wants, *place)
        state = promote(dtype, *(h.dtype for h in histories if h is not None))
        return self.run(x, m, *histories, table=rows.table, row=row, state=state, **rows.wants)

    def run_plain(
        self,
        scheduler: DropIn,
        rows: Rows,
        x: Tensor,
        m: Tensor | None,
        h0: Tensor | None = None,
        h1: Tensor | None = None,
        h2: Tensor | None = None,
        h3: Tensor | None = None,
        *,
        row: int,
        index: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
        onward: bool = False,
    ) -> Results:
        """The step on operands of one shape and dtype; ``onward``: with the next model's input."""
        try:
            if index is None and free(x, m, h0, h1, h2, h3, noise):
                bound = rows.onward if onward else rows.plain
                return bound(x, m, row, h0=h0, h1=h1, h2=h2, h3=h3, noise=noise, seeds=seeds)
            table = rows.table if index is None else self.tables.on(rows.table, x.device)
            draw: dict[str, Any] = {"index": index, "noise": noise, "seeds": seeds}
            wants: dict[str, Any] = {**rows.wants, "next_copies": int(onward)}
            return ops.step(x, m, None, h0, h1, h2, h3, table=table, row=row, **draw, **wants)
        except RuntimeError:
            check_row(scheduler, row, rows.table)
            raise

    def mixed(
        self,
        scheduler: DropIn,
        x: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        key: str,
        scales: Callable[[], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """s x + n noise with (s, n) = scales()[step of the timestep], [B]; at the loop's step where it has begun."""
        shape = torch.broadcast_shapes(x.shape, noise.shape, (timesteps.shape[0],) + (1,) * (x.dim() - 1))
        x, noise = x.expand(shape), noise.expand(shape)
        if scheduler.begin_index is not None:
            row = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
            return self.mixed_at(scheduler, x, noise, row, key, scales)
        index = self.indices(scheduler, timesteps, x.device)
        self.check_room(scheduler, x, 0, index, promote(x.dtype, noise.dtype))
        return self.noised(x, noise, index, lambda: torch.stack(scales(), 1), (key,), scheduler.sigmas)

    def mixed_at(
        self,
        scheduler: DropIn,
        x: Tensor,
        noise: Tensor,
        row: int,
        key: str,
        scales: Callable[[], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """`mixed` at a step known on the host."""

        def build() -> Tensor:
            s, n = scales()
            return table_of(len(s), a=s, g=n)

        table = self.tables.get(("mixed", key), build, *self.sources(scheduler))
        state = promote(x.dtype, noise.dtype)
        self.check_room(scheduler, x, row, None, state)
        return ops.step(as_dtype(x, state), None, table=table, row=row, noise=as_dtype(noise, state))[0]


def check_row(scheduler: DropIn, row: int, table: Tensor) -> None:
    """The original's IndexError after the last step."""
    if row >= len(table):
        scheduler.sigmas[row + 1]

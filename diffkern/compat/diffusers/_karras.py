"""Drop-ins on the state of Karras et al. (arXiv 2206.00364): x = x0 + sigma z, of which the model is given
x / sqrt(sigma^2 + 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.compat.diffusers._engine import DropIn, Hot, Results, Rows
from diffkern.compat.diffusers._levels import LevelsEngine
from diffkern.compat.diffusers._plans import plan_of
from diffkern.compat.kit.rows import SIXTEEN, column, table_of
from diffkern.compat.kit.tables import version
from diffkern.plan import Plan


class KarrasEngine(LevelsEngine):
    """x = x0 + sigma z: the model's input, made by the step before where a loop asks for it in that way."""

    looks_ahead = True

    own: tuple[str, ...] = ("hot", "carried", "ahead", "scales")
    ahead: tuple[Tensor, int, int, Tensor | None, Tensor, Any] | None = None
    """(x', the row that starts from it, writes to x' and the sigmas, the model's input made of it or None, the sigmas,
    the config)."""
    scales: Hot | None = None
    """`input_scale` as tensors of one number, for 16 bits."""

    def input_scale(self, scheduler: DropIn) -> Tensor:
        """What the model's input is multiplied by at each level, [S + 1]."""
        return (self.levels(scheduler) ** 2 + 1) ** -0.5

    def scale_input(self, scheduler: DropIn, sample: Tensor, timestep: Any) -> Tensor:
        """x times `input_scale`: made by the step that returned ``sample`` where the last one was asked for in this
        way (its op then writes it beside x'), else in one op."""
        ahead = self.ahead
        if ahead is not None:
            self.ahead = None
            after, at, writes, scaled, sigmas, config = ahead
            # A gradient that x' is asked for since goes through an op of its own.
            self.scales_next = sample is after and at == scheduler._step_index and not sample.requires_grad
            same = sigmas is scheduler.sigmas and config is scheduler._internal_dict
            if self.scales_next and scaled is not None and same and writes == version(sample) + version(sigmas):
                return scaled
        else:
            scales, at, dtype = self.scales, scheduler._step_index, sample.dtype
            if (
                scales is not None
                and at is not None
                and scales.config is scheduler._internal_dict
                and scales.sources[0] is scheduler.sigmas
                and scales.version == scheduler.sigmas._version
                and dtype in SIXTEEN
                and (dtype is not torch.float16 or (self.carried is not None and self.carried.out is sample))
            ):
                return sample * scales.rows[at]
        row, index = self.row(scheduler, timestep, sample.device)
        sources = self.sources(scheduler)
        self.check_room(scheduler, sample, row, index)
        if sample.dtype in SIXTEEN and index is None:  # the same product, at a third of the time
            numbers = self.tables.get(("input scales",), lambda: self.input_scale(scheduler).float().unbind(), *sources)
            out, sigmas = sample * numbers[row], scheduler.sigmas
            self.scales = None if sigmas.is_inference() else Hot(None, numbers, sources[1], (sigmas,))
        else:
            every = len(sources[0].numbers)
            rows = self.tables.get(("input",), lambda: Rows(table_of(every, a=self.input_scale(scheduler))), *sources)
            out, *_ = super().run_plain(scheduler, rows, sample, None, row=row, index=index)
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.is_scale_input_called = True
        return out

    def look_ahead(self, scheduler: DropIn, found: Results, row: int, rows: int) -> None:
        (after, _, _, scaled), sigmas = found, scheduler.sigmas
        if row + 1 >= rows or after.is_inference() or sigmas.is_inference():  # whose writes are not counted
            self.ahead = None
        elif after.requires_grad:  # x' may be cut from its graph in place
            self.ahead, self.scales_next = None, False
        else:
            writes = after._version + sigmas._version
            self.ahead = (after, row + 1, writes, scaled, sigmas, scheduler._internal_dict)

    def run_plain(
        self,
        scheduler: DropIn,
        rows: Rows,
        x: Tensor,
        m: Tensor | None,
        *histories: Tensor | None,
        row: int,
        index: Tensor | None = None,
        **operands: Any,
    ) -> Results:
        """A step's op also makes the next model's input, where the loop asks for it."""
        if m is None or index is not None or not x.dtype is m.dtype is torch.float32:
            return super().run_plain(scheduler, rows, x, m, *histories, row=row, index=index, **operands)
        onward = self.scales_next and row + 1 < rows.count
        found = super().run_plain(scheduler, rows, x, m, *histories, row=row, onward=onward, **operands)
        self.look_ahead(scheduler, found, row, rows.count)
        return found

    def rows(self, scheduler: DropIn, table: Tensor, *, want_x0: bool, want_s: bool = False) -> Rows:
        """The table, its rows also making the next model's input: k = the scale of the level that a row ends at."""
        scale = self.input_scale(scheduler)
        column(table, "k")[:] = torch.cat([scale[1:], torch.ones(1, dtype=torch.float64)])[: len(table)]
        return Rows(table, want_x0=want_x0, want_s=want_s)

    def add_noise(self, scheduler: DropIn, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x0 + sigma z in one op."""

        def scales() -> tuple[Tensor, Tensor]:
            levels = self.levels(scheduler)
            return torch.ones_like(levels), levels

        return self.mixed(scheduler, x, noise, timesteps, "add", scales)

    def plan(self, scheduler: DropIn, name: str, table: Tensor, prediction: str | None = None, **options: Any) -> Plan:
        """The rows as a plan: every row also makes the next model input."""
        table = table.clone()
        column(table, "k")[-1] = 1.0  # no model call follows
        return plan_of(
            name,
            table,
            self.clock(scheduler.timesteps).times,
            prediction or scheduler.config.prediction_type,
            init_scale=float(scheduler.init_noise_sigma),
            first_k=float(self.input_scale(scheduler)[0]),
            time_dtype="float32",
            **options,
        )

"""Drop-ins whose rows belong to training timesteps: x = sqrt(abar) x0 + sqrt(1 - abar) eps, one row a timestep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffkern import streams
from diffkern.compat.diffusers._carried import Carried
from diffkern.compat.diffusers._engine import DropIn, Engine, Hot, Results, Rows
from diffkern.compat.diffusers._host import Clock, host
from diffkern.compat.kit.rows import SIXTEEN, as_dtype, column

FLOAT = torch.float32
EPS_AT_PURE_NOISE = 2.0**-24
"""abar in place of 0 where the model predicts eps: the value that diffusers' other schedulers write there."""


class TimesEngine(Engine):
    """Finds the row of a timestep, and runs the next step of a loop without looking anything up."""

    def repeat(self, scheduler: DropIn, m: Tensor, timestep: Any, x: Tensor, key: Any, end: Tensor) -> Results | None:
        """(x', x0, ...) of a step without noise whose rows are at hand (`keep`), for operands with nothing to convert;
        None where anything is new: then the long way runs. ``end``: the level beyond the table, one of its sources."""
        hot, dtype = self.hot, x.dtype
        if hot is None or hot.key != key or hot.config is not scheduler._internal_dict:
            return None
        times, abar, last = hot.sources
        if (
            times is not scheduler.timesteps
            or abar is not scheduler.alphas_cumprod
            or last is not end
            or times._version + abar._version + last._version != hot.version
            or type(timestep) is not Tensor
            or timestep.dtype is not times.dtype
            or timestep.dim()
            or dtype is not m.dtype
            or x.numel() != m.numel()  # of other shapes the op refuses all but two batches
            or (torch.is_grad_enabled() and (x.requires_grad or m.requires_grad))
            or forward_ad._current_level >= 0
        ):
            return None
        clock = hot.clock
        assert clock is not None
        at, off = divmod(timestep.data_ptr() - clock.start, clock.stride)
        if off or not 0 <= at < len(clock.times):
            return None
        try:
            if dtype is FLOAT or dtype not in SIXTEEN:
                return hot.rows.plain(x, m, clock.times[at])
            carried = self.carried
            if carried is None or carried.out is not x or carried.run is not clock or carried.at != at:
                return None
            if x.is_inference() or x._version != carried.writes:
                return None
            state, x0, s, out = hot.rows.narrow(dtype)(carried.state, m, clock.times[at])
        except RuntimeError:  # the long way has the right one, or none
            return None
        assert out is not None
        assert x0 is not None
        self.carried = Carried(state, out, 0 if out.is_inference() else out._version, clock, at + 1)
        return out, as_dtype(x0, dtype), s, None

    def keep(self, scheduler: DropIn, key: Any, rows: Rows, end: Tensor) -> None:
        """Keeps the rows of a step for `repeat`."""
        clock, sources = self.clock(scheduler.timesteps), (scheduler.timesteps, scheduler.alphas_cumprod, end)
        times = clock.times or [-1]
        fits = not clock.dtype.is_floating_point and min(times) >= 0 and max(times) < rows.count
        if fits and not any(source.is_inference() for source in sources):
            self.hot = Hot(key, rows, scheduler._internal_dict, sources, clock)

    def place(self, scheduler: DropIn, timestep: Any, row: int, index: Tensor | None) -> tuple[Clock, int | None]:
        """(the run, the number of its step) for a step that `row` found; None off the run, or for a step a sample."""
        clock = self.clock(scheduler.timesteps)
        if index is not None:
            return clock, None
        at = clock.position(timestep)
        return clock, clock.positions.get(row, [None])[0] if at is None else at

    def row(self, scheduler: DropIn, timestep: Any, device: torch.device) -> tuple[int, Tensor | None]:
        """(row, None), or (0, index) where every sample has a timestep of its own."""
        clock = self.clock(scheduler.timesteps)
        at = clock.position(timestep)
        if at is None and isinstance(timestep, Tensor) and timestep.numel() > 1:
            return 0, timestep.to(device)
        t = clock.times[at] if at is not None else clock.value(timestep)
        count = scheduler.alphas_cumprod.size(0)
        if not (isinstance(t, int) and 0 <= t < count):
            scheduler.alphas_cumprod[timestep]  # the original's exception, where it has one
            raise IndexError(f"timestep must be an integer in 0..{count - 1}, got {timestep!r}")
        return t, None

    def number_streams(self, scheduler: DropIn, table: Tensor) -> Tensor:
        """The table, its noise by address on the stream of the step's number, so that `plan` draws the same; off the
        grid of timesteps, on streams beyond."""
        rows = len(table)
        stream = column(table, "stream")
        stream[:] = streams.STEP + rows + torch.arange(rows, dtype=torch.float64)
        for t, positions in self.clock(scheduler.timesteps).positions.items():
            if 0 <= t < rows:
                stream[int(t)] = streams.STEP + positions[0]
        return table

    def add_noise(self, scheduler: DropIn, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) x + sqrt(1 - abar) noise in one op."""

        def scales() -> Tensor:
            return torch.stack(signal_and_noise(scheduler.alphas_cumprod), 1)

        return self.noised(x, noise, timesteps, scales, ("add",), scheduler.alphas_cumprod)

    def velocity(self, scheduler: DropIn, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) noise - sqrt(1 - abar) x in one op."""

        def scales() -> Tensor:
            signal, sigma = signal_and_noise(scheduler.alphas_cumprod)
            return torch.stack([-sigma, signal], 1)

        return self.noised(x, noise, timesteps, scales, ("velocity",), scheduler.alphas_cumprod)


def signal_and_noise(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(abar), sqrt(1 - abar)), [T] each, float64 on the CPU."""
    abar = host(alphas_cumprod, exact=True)
    return abar.sqrt(), (1 - abar).sqrt()


def to_x0(prediction: str, abar: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) of x0 = p x + q m, float64, from the original's float32 roots. ``abar`` float32 or float64, [n]."""
    alpha, sigma = (abar**0.5).double(), ((1 - abar) ** 0.5).double()
    if prediction == "epsilon":
        alpha = torch.where(abar == 0, torch.tensor(EPS_AT_PURE_NOISE**0.5, dtype=torch.float64), alpha)
        return 1 / alpha, -sigma / alpha
    if prediction == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    return alpha, -sigma

"""Host copies of the original's tensors, made once for each `set_timesteps` by the one device read that this takes, and
what is said of odd timesteps and levels."""

from __future__ import annotations

from array import array
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.compat.kit.rows import check_room
from diffkern.compat.kit.tables import Described, written
from diffkern.modes import neutral, readable

Number = int | float


def host(table: Any, exact: bool = False) -> Tensor:
    """A table of the original on the CPU, for coefficients: in its own float32, or widened where ``exact``."""
    found = torch.as_tensor(table).detach().cpu()
    return found.double() if exact else found


def check_numbers(scheduler: Any, sigmas: list[float]) -> None:
    """Raise ValueError where a level is NaN: every sample would be."""
    total = sum(sigmas)
    if total == total or not any(sigma != sigma for sigma in sigmas):  # their sum may also be that of two infinities
        return
    why = ""
    if scheduler.config.get("shift_terminal") and len(sigmas) == 2:
        why = f" (shift_terminal={scheduler.config.shift_terminal} moves the last of several: take 2 steps or more)"
    raise ValueError(f"sigmas must be numbers, got {sigmas}{why}")


UNSCALED = (
    "The `scale_model_input` function should be called before `step` to ensure correct denoising. "
    "See `StableDiffusionPipeline` for a usage example."
)


def refuse_integers(timestep: Any, method: str) -> None:
    """The original's error for an integer, which would be a step's number and not its time."""
    if isinstance(timestep, Tensor) and timestep.is_floating_point():
        return
    if isinstance(timestep, int | torch.IntTensor | torch.LongTensor):
        raise ValueError(
            "Passing integer indices (e.g. from `enumerate(timesteps)`) as timesteps to"
            f" `{method}` is not supported. Make sure to pass"
            " one of the `scheduler.timesteps` as a timestep."
        )


class Numbers(Described):
    """Numbers on the host, which tables are made of."""

    def __init__(self, numbers: list[Any]) -> None:
        self.numbers = numbers

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.numbers,)  # without what is made of them

    def content(self) -> bytes:
        """The numbers, for `kit.tables`."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        return array("d", self.numbers).tobytes()  # bytes remember their hash


class HostCopy(Numbers):
    """The numbers of one tensor as it was."""

    def __init__(self, source: Tensor) -> None:
        super().__init__(source.tolist())
        self.source = source
        self.counts = not source.is_inference()
        self.version = written(source)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source,)  # a copy has addresses of its own

    def is_of(self, tensor: Tensor) -> bool:
        """Whether this is the copy of a tensor as it is now."""
        if self.source is not tensor:
            return False
        now = tensor._version if self.counts else written(tensor)
        return bool(self.version == now)


class Levels(Numbers):
    """The sigmas, [S + 1], whichever tensor they are in."""

    @cached_property
    def values(self) -> Tensor:
        """The original's float32 numbers as float64, on the CPU."""
        with neutral():
            return torch.tensor(self.numbers, dtype=torch.float64)

    def check_room(self, scheduler: Any, dtype: torch.dtype, row: int, index: Tensor | None = None) -> None:
        """`kit.rows.check_room` at the level of a row; of the rows of the samples where these may be looked at."""
        if index is None or readable(index):
            check_room(dtype, scheduler, self.numbers[row] if index is None else self.values[index])


class Clock(HostCopy):
    """The timesteps, and which of them a tensor is."""

    def __init__(self, timesteps: Tensor) -> None:
        super().__init__(timesteps)
        self.times: list[Number] = self.numbers
        self.dtype, self.start = timesteps.dtype, timesteps.data_ptr()
        self.stride = (timesteps.stride(0) or 1) * timesteps.element_size()
        self.bytes = self.stride * len(self.times)

    @cached_property
    def positions(self) -> dict[Number, list[int]]:
        """Where each time stands."""
        found: dict[Number, list[int]] = {}
        for i, t in enumerate(self.times):
            found.setdefault(t, []).append(i)
        return found

    def places(self, time: Any) -> list[int]:
        """Where one of them stands, without looking at where the others do; NaN where it is the same object."""
        return [i for i, t in enumerate(self.times) if t is time or t == time]

    def position(self, timestep: Any) -> int | None:
        """Where a tensor lies in the timesteps if it is a view of one element of them: an address, no device read."""
        if not isinstance(timestep, Tensor):
            return None
        ahead = timestep.data_ptr() - self.start
        if not 0 <= ahead < self.bytes or timestep.dtype is not self.dtype or not timestep.numel():
            return None
        if timestep.dim() and timestep.numel() != 1 and any(timestep.stride()):
            return None
        at, off = divmod(ahead, self.stride)
        return at if off == 0 else None

    def value(self, timestep: Any) -> Number:
        """A timestep as a Python number. Tensors on a device that are no view of the timesteps are read (a sync)."""
        at = self.position(timestep)
        if at is not None:
            return self.times[at]
        return timestep.item() if isinstance(timestep, Tensor | np.generic) else timestep

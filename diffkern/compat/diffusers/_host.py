"""Host copies of the original's tensors, made once for each `set_timesteps` by the one device read that this takes."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.compat.kit.rows import check_room
from diffkern.compat.kit.tables import written
from diffkern.modes import neutral, readable

Number = int | float


def host(table: Any, exact: bool = False) -> Tensor:
    """A table of the original on the CPU, for coefficients: in its own float32, or widened where ``exact``."""
    found = torch.as_tensor(table).detach().cpu()
    return found.double() if exact else found


def check_numbers(scheduler: Any, sigmas: Tensor) -> None:
    """Raise ValueError where a level on the CPU is NaN: every sample would be."""
    if not bool(sigmas.isnan().any()):
        return
    why = ""
    if scheduler.config.get("shift_terminal") and len(sigmas) == 2:
        why = f" (shift_terminal={scheduler.config.shift_terminal} moves the last of several: take 2 steps or more)"
    raise ValueError(f"sigmas must be numbers, got {sigmas.tolist()}{why}")


class HostCopy:
    """What both copies are: numbers that belong to one tensor as it was."""

    numbers: list[Any]

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.counts = not source.is_inference()
        self.version = written(source)

    def __reduce__(self) -> tuple[type[HostCopy], tuple[Tensor]]:
        return type(self), (self.source,)  # a copy has addresses of its own

    def is_of(self, tensor: Tensor) -> bool:
        """Whether this is the copy of a tensor as it is now."""
        if self.source is not tensor:
            return False
        now = tensor._version if self.counts else written(tensor)
        return bool(self.version == now)

    def content(self) -> Hashable:
        """The numbers, for `kit.tables`."""
        return array("d", self.numbers).tobytes()  # bytes remember their hash


class Levels(HostCopy):
    """The sigmas, [S + 1]."""

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__(sigmas)
        with neutral():
            self.values = host(sigmas, exact=True)
            """The original's float32 numbers as float64, on the CPU."""
        self.numbers = self.values.tolist()

    def check_room(self, scheduler: Any, dtype: torch.dtype, row: int, index: Tensor | None = None) -> None:
        """`kit.rows.check_room` at the level of a row; of the rows of the samples where these may be looked at."""
        if index is None or readable(index):
            check_room(dtype, scheduler, self.numbers[row] if index is None else self.values[index])


class Clock(HostCopy):
    """The timesteps, and which of them a tensor is."""

    def __init__(self, timesteps: Tensor) -> None:
        super().__init__(timesteps)
        self.times: list[Number] = timesteps.tolist()
        self.numbers = self.times
        self.positions: dict[Number, list[int]] = {}
        for i, t in enumerate(self.times):
            self.positions.setdefault(t, []).append(i)
        self.dtype, self.start = timesteps.dtype, timesteps.data_ptr()
        self.stride = (timesteps.stride(0) or 1) * timesteps.element_size()
        self.bytes = self.stride * len(self.times)

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

"""Exception types raised by the emulator.

Every error that is tied to an executing instruction carries structured fields
(kernel, line, text, loc, threads, address) next to the human readable message.
"""

from __future__ import annotations

from typing import Any


class PtxSimError(Exception):
    """Base class of everything raised by ptxsim."""

    def __init__(self, msg: str, **info: Any) -> None:
        super().__init__(msg)
        self.info = info

    def __getattr__(self, name: str) -> Any:
        info = self.__dict__.get("info")
        if info is not None and name in info:
            return info[name]
        raise AttributeError(name)


class PtxParseError(PtxSimError):
    """The module text could not be parsed."""


class UnsupportedError(PtxSimError):
    """An opcode / modifier / directive the emulator does not implement."""


class LaunchError(PtxSimError):
    """Bad launch configuration or bad arguments."""


class ExecError(PtxSimError):
    """Base of errors raised while instructions execute."""


class MemoryError_(ExecError):
    """Base of invalid-access errors."""


class OutOfBoundsError(MemoryError_):
    """Access outside every registered/declared object."""


class MisalignedError(MemoryError_):
    """Address is not a multiple of the access size."""


class ReadOnlyError(MemoryError_):
    """Store to const memory or to a buffer registered read-only."""


class UninitSharedError(ExecError):
    """Shared memory byte read before any thread of the CTA wrote it."""


class UninitGlobalError(ExecError):
    """Global byte read before it was written (buffers registered init=False)."""


class AsyncHazardError(ExecError):
    """Shared bytes touched while a cp.async to them is still in flight."""


class SharedRaceError(ExecError):
    """Unordered conflicting accesses to shared memory inside a CTA."""


class GlobalRaceError(ExecError):
    """Unordered conflicting accesses to global memory from different CTAs."""


class BarrierDivergenceError(ExecError):
    """Threads of one warp meet different aligned barrier instructions."""


class DeadlockError(ExecError):
    """No thread can make progress."""


class WarpSyncError(ExecError):
    """Misuse of a warp-synchronous instruction (bad mask, missing lanes)."""


class TrapError(ExecError):
    """trap / __assertfail executed."""


class StepLimitError(ExecError):
    """max_steps exceeded (probable endless loop)."""

"""ptxsim: an independent PTX emulator (numpy) for checking CUDA kernels without a GPU."""

from . import host
from .errors import (
    AsyncHazardError,
    BarrierDivergenceError,
    DeadlockError,
    ExecError,
    GlobalRaceError,
    LaunchError,
    MemoryError_,
    MisalignedError,
    OutOfBoundsError,
    PtxParseError,
    PtxSimError,
    ReadOnlyError,
    SharedRaceError,
    StepLimitError,
    TrapError,
    UninitGlobalError,
    UninitSharedError,
    UnsupportedError,
    WarpSyncError,
)
from .kernel import Kernel, Result
from .machine import Options
from .memory import Memory
from .module import Module, load
from .nvcc import compile
from .stats import table
from .unrounded import unrounded

__all__ = [
    "AsyncHazardError",
    "BarrierDivergenceError",
    "DeadlockError",
    "ExecError",
    "GlobalRaceError",
    "Kernel",
    "LaunchError",
    "Memory",
    "MemoryError_",
    "MisalignedError",
    "Module",
    "Options",
    "OutOfBoundsError",
    "PtxParseError",
    "PtxSimError",
    "ReadOnlyError",
    "Result",
    "SharedRaceError",
    "StepLimitError",
    "TrapError",
    "UninitGlobalError",
    "UninitSharedError",
    "UnsupportedError",
    "WarpSyncError",
    "compile",
    "host",
    "load",
    "table",
    "unrounded",
]

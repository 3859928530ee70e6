"""The emulated address map: windows of the state spaces and the first global address."""

from __future__ import annotations

from typing import Any

import numpy as np

GLOBAL_BASE = 0x0000_0100_0000_0000  # first virtual device address
SHARED_WIN = 1 << 45
LOCAL_WIN = 1 << 46
PARAM_WIN = 1 << 44
WIN_SIZE = 1 << 32
SHARED_START = 1024  # first user byte inside the shared window
FUNC_BASE = 0x0000_0070_0000_0000
GUARD = 1 << 24
UDT: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SH_HI, LO_HI, PA_HI = SHARED_WIN >> 32, LOCAL_WIN >> 32, PARAM_WIN >> 32
SPACE_OF = {SH_HI: ("shared", SHARED_WIN), LO_HI: ("local", LOCAL_WIN), PA_HI: ("kparam", PARAM_WIN)}

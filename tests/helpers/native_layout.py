"""What the arguments of the kernels look like, as the built module says it (`diffkern._C.layout()`)."""

from __future__ import annotations

import torch

from diffkern import _load

_LAYOUT = _load.layout()
LEVELS: tuple[str, ...] = _LAYOUT["isa"]
"""The instruction sets that DIFFKERN_ISA knows, the least first."""
SUM_BLOCK: int = _LAYOUT["ordered_sum"]["block"]
MAX_DIMS: int = _LAYOUT["max_dims"]
CODES: dict[torch.dtype, int] = {getattr(torch, name): number for name, number in _LAYOUT["dtypes"].items()}
"""The numbers of the dtypes; masks come after those that are stored."""
CODES |= dict.fromkeys((torch.uint8, torch.bool), len(CODES))

"""Where attention has kernels: what the drop-ins for attention layers ask before a call."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not_channels(dim: int) -> str | None:
    """Why there is no kernel for heads of this many channels, one sentence; None where there is one."""
    if dim == 512 or (dim % 8 == 0 and 8 <= dim <= 256):
        return None
    return f"the channels of a head must be a multiple of 8 up to 256, or 512, got {dim}"


def why_not_on(x: Tensor) -> str | None:
    """Why no kernel runs on tensors of this device and dtype here, one sentence; None where one does."""
    if x.device.type not in ("cpu", "cuda", "meta"):
        return f"no kernels for the device {x.device.type}"
    if x.device.type == "cuda":
        if x.dtype == torch.float64:
            return "no float64 kernels on CUDA"
        if not torch.compiler.is_compiling():  # the status cannot be traced
            from diffkern import cuda_status  # of the top level, which is above this module

            status = cuda_status()
            return None if status.ready else status.text
    return None

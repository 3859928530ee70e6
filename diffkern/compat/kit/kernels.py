"""Where attention has kernels, and where torch's own are the faster ones: what the drop-ins for attention layers ask
before a call.
"""

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
    if x.device.type not in ("cpu", "cuda"):
        return f"no kernels for the device {x.device.type}"
    if x.device.type == "cuda":
        if x.dtype == torch.float64:
            return "no float64 kernels on CUDA"
        if not torch.compiler.is_compiling():  # the status cannot be traced
            from diffkern import cuda_status  # of the top level, which is above this module

            status = cuda_status()
            return None if status.ready else status.text
    return None


def _torch_has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported() and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


TORCH_HAS_AMX = _torch_has_amx()
"""Whether torch multiplies bfloat16 by the matrix unit of this processor (Xeon since Sapphire Rapids)."""


def torch_is_faster(dtype: torch.dtype, dim: int, queries: int, keys: int, layout: str = "heads") -> bool:
    """Whether F.scaled_dot_product_attention is the faster one here on the CPU, up to some 10 % at the border.

    The numbers are measured (docs/cpu-ratios.md): with AMX torch multiplies bfloat16 in tiles of 32 channels or keys,
    which pays where there are many of both, and packs an odd number of keys once more. Without AMX it is never faster
    where that matters, whatever DIFFKERN_ISA says. ``layout``: "heads" and "channels_last", channels contiguous, or
    "nchw", tokens contiguous, which torch's kernel has to be given as copies.
    """
    if not TORCH_HAS_AMX or dtype != torch.bfloat16 or dim < 16:
        return False
    work = dim * keys
    if layout == "nchw":
        return keys >= 256 and work >= 12000
    if queries <= 12:  # read by rows, csrc/cpu/attention_rows.cpp
        return work >= (3000 if queries == 1 else 6000) and (queries == 1 or keys % 2 == 0)
    return work >= (5000 if keys % 2 else 2000 if layout == "heads" else 3000)


def why_torch(x: Tensor, dim: int, queries: int, keys: int, layout: str = "heads") -> str | None:
    """Why a call on x is left to torch's own attention, one sentence; None where it is not.

    With a gradient to come it never is: torch's backward pass loses what its forward pass won.
    """
    if not TORCH_HAS_AMX or x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
        return None
    dtype = x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if not torch_is_faster(dtype, dim, queries, keys, layout):
        return None
    return (
        "torch's attention is the faster one here (bfloat16 with AMX) "
        f"for {queries} queries, {keys} keys and {dim} channels a head"
    )

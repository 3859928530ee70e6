"""The ops that the native modules register: the list from which the tests of every op are made."""

from __future__ import annotations

import torch

import diffkern.ops  # noqa: F401  (registers the ops)

CPU_ALONE = {"conv3x3": "a GPU's convolutions are cuDNN's, which torch.nn.functional.conv2d calls"}
"""Public ops without a CUDA kernel, and why."""


def registered() -> list[str]:
    """Every op in the namespace, sorted."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({n.removeprefix("diffkern::").partition(".")[0] for n in names if n.startswith("diffkern::")})


def base_of(name: str) -> str:
    """The op as `diffkern.ops` and `diffkern.reference` have it: without marks of variants, gradients, packing."""
    return name.removesuffix("_out").removesuffix("_ad").removesuffix("_grad").removeprefix("pack_")


def public() -> list[str]:
    """The ops a user calls; their variants and gradients come with them."""
    return sorted({base_of(name) for name in registered()})


def schema(name: str) -> torch.FunctionSchema:
    """The schema that was registered."""
    return getattr(torch.ops.diffkern, name).default._schema

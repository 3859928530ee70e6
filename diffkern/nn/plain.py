"""When a module may be computed by other means than calling it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: Any, kind: type) -> bool:
    """Whether a call of the module is the `forward` of this very class and nothing else sees it.

    A subclass (LoRA's layers, quantised ones), a `forward` of the instance's own (offloading), hooks, on it or on all
    modules, and compilation say no: then the module has to be called.
    """
    if type(module) is not kind:
        return False
    there = vars(module)
    if "forward" in there or there.get("_compiled_call_impl") is not None:
        return False
    everywhere = nn.modules.module
    return not any(there[hooks] or getattr(everywhere, f"_global{hooks}", None) for hooks in _HOOKS)


def version(t: Tensor) -> int:
    """How often a tensor has been written to, as torch counts it; inference tensors are not counted."""
    return -1 if t.is_inference() else t._version

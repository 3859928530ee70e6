"""When a module may be computed by other means than calling it."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

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
    """How often a tensor has been written to, as torch counts it; inference tensors are not counted.

    Torch does not count the steps of optimisers with ``fused=True``: every one counts as a write to every tensor, from
    the first `count_fused_steps` on.
    """
    return -1 if t.is_inference() else t._version + _fused_steps[0]


_fused_steps = [0]


@functools.cache
def count_fused_steps() -> None:
    """Before versions are kept for later: `version` then sees optimisers that torch does not."""

    def counted(optimizer: Any, *_: Any) -> None:
        if any(group.get("fused") for group in optimizer.param_groups):
            _fused_steps[0] += 1

    register_optimizer_step_post_hook(counted)

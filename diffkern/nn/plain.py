"""When a module may be computed by other means than calling it."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Linear,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.SiLU,
    nn.Dropout,
    nn.Embedding,
    nn.Sequential,
)
_AS_IMPORTED = {kind: (kind.forward, getattr(kind, "_conv_forward", None)) for kind in _LAYERS}
"""What torch's layers do, before somebody patches a class (circular padding of all convolutions, say)."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: Any, kind: type) -> bool:
    """Whether a call of the module is the `forward` of this very class and nothing else sees it.

    A subclass (LoRA's layers, quantised ones), a `forward` of the instance's own (offloading), a class whose `forward`
    has been replaced, hooks, on it or on all modules, and compilation say no: then the module has to be called.
    """
    if type(module) is not kind:
        return False
    there = vars(module)
    if kind in _AS_IMPORTED and _AS_IMPORTED[kind] != (kind.forward, getattr(kind, "_conv_forward", None)):
        return False
    if "forward" in there or "_conv_forward" in there or there.get("_compiled_call_impl") is not None:
        return False
    everywhere = nn.modules.module
    return not any(there[hooks] or getattr(everywhere, f"_global{hooks}", None) for hooks in _HOOKS)


def version(t: Tensor) -> int:
    """How often a tensor has been written to, as torch counts it; inference tensors are not counted.

    Torch does not count the steps of optimisers with ``fused=True``: every one counts as a write to every tensor, from
    the first `Snapshot` on.
    """
    return -1 if t.is_inference() else t._version + _fused_steps[0]


class Snapshot:
    """What a tensor was; neither it nor its memory is kept."""

    __slots__ = ("_state", "_storage", "_tensor")
    _counts: ClassVar[bool] = False

    def __init__(self, t: Tensor) -> None:
        if not Snapshot._counts:
            Snapshot._counts = True
            register_optimizer_step_post_hook(_count_if_fused)
        self._tensor, self._storage = weakref.ref(t), StorageWeakRef(t.untyped_storage())
        self._state = _state(t)

    def is_of(self, t: Tensor) -> bool:
        """Whether it is the same tensor over the same memory, and nobody has written to it since, by `version`."""
        same = self._tensor() is t and self._storage.cdata == t.untyped_storage()._cdata
        return same and self._state == _state(t)


def _state(t: Tensor) -> tuple[Any, ...]:
    return version(t), t.data_ptr(), t.stride()


_fused_steps = [0]


def _count_if_fused(optimizer: Any, *_: Any) -> None:
    if any(group.get("fused") for group in optimizer.param_groups):
        _fused_steps[0] += 1

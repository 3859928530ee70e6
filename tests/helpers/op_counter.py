"""Counts what a call dispatches: our ops by name, and torch's ops whose result is as large as the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CountOps(TorchDispatchMode):
    """`fused`: calls of diffkern's ops. `large`: torch's ops that make a new tensor of the given shape."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.fused: Counter[str] = Counter()
        self.large: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "diffkern":
            self.fused[func._opname] += 1
        elif isinstance(result, Tensor) and tuple(result.shape) == self.shape:
            known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            if result.untyped_storage().data_ptr() not in known:
                self.large[func._opname] += 1
        return result


class EveryOp(TorchDispatchMode):
    """`counts`: every op that a call dispatches, by namespace and name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[f"{func.namespace}.{func._opname}"] += 1
        return func(*args, **(kwargs or {}))

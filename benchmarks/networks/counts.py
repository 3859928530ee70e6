"""What an evaluation asks of a GPU, counted without one: ops that write, bytes that they read and write, allocations.

The network runs on torch's fake tensors of a CUDA device, without data, below autograd, op by op:

- An op that writes at least one tensor is one launch: a lower bound, for a GroupNorm of torch is three kernels and a
  convolution with a bias two. Views and what only reads shapes are none. `F.scaled_dot_product_attention` is one.
- It reads each of its tensors once (the elements that a view shows; one that is expanded, those that are stored) and
  writes each result once; in place, the tensor is read and written, but only written by a fill.
- An allocation is a result in a storage that was not there.
- Its operations are those of the convolutions and matrix products, by torch's formulas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import diffkern
from benchmarks.alone import reason
from benchmarks.networks.contenders import FROZEN, GUIDED, NAMES, contenders
from benchmarks.networks.peers import NETWORKS, Network

__all__ = ["GPUS", "LAUNCH", "Counts", "Gpu", "GpuRow", "Op", "count", "on_gpu"]

FILLS = ("zero_", "fill_", "copy_", "normal_", "uniform_")
"""In place, and what was there does not matter."""


@dataclass(frozen=True)
class Gpu:
    """What its data sheet says: bytes a second, and dense bfloat16 operations a second with float32 sums."""

    name: str
    bandwidth: float
    flops: float


GPUS = (
    Gpu("H100 SXM", 3.35e12, 989e12),
    Gpu("A100 SXM 80 GB", 2.039e12, 312e12),
    Gpu("RTX 4090", 1.008e12, 165e12),
)
COUNTED = tuple(name for name in NAMES if name != GUIDED and name not in FROZEN)
"""Whose ops are counted: what is compiled cannot be, and our transcription's are not the original's."""
DEVICE = "cuda:0"
LAUNCH = 5e-6
"""Seconds that the host needs for an op of eager torch: an assumption, typical of today's processors."""


@dataclass(frozen=True)
class Op:
    """One launch."""

    name: str
    read: int
    written: int
    flops: int = 0

    @property
    def moved(self) -> int:
        return self.read + self.written

    def seconds(self, gpu: Gpu) -> float:
        """The least: its bytes, or its operations, whichever takes longer."""
        return max(self.moved / gpu.bandwidth, self.flops / gpu.flops)


@dataclass
class Counts:
    """Of one evaluation."""

    ops: list[Op] = field(default_factory=list)
    allocations: int = 0

    @property
    def launches(self) -> int:
        return len(self.ops)

    @property
    def moved(self) -> int:
        return sum(op.moved for op in self.ops)

    @property
    def around(self) -> int:
        """Bytes of the ops without operations of convolutions or products."""
        return sum(op.moved for op in self.ops if not op.flops)

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    def roofline(self, gpu: Gpu) -> float:
        """Seconds on the device if every op ran at the limit of its memory or of its products."""
        return sum(op.seconds(gpu) for op in self.ops)

    @property
    def host(self) -> float:
        """Seconds that the host needs to launch them, at `LAUNCH` each."""
        return LAUNCH * self.launches

    def largest(self) -> dict[str, tuple[int, int]]:
        """By op: (launches, bytes), most bytes first."""
        found: dict[str, tuple[int, int]] = {}
        for op in self.ops:
            launches, moved = found.get(op.name, (0, 0))
            found[op.name] = (launches + 1, moved + op.moved)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def size(tensor: Tensor) -> int:
    """Bytes of the elements that it shows, each stored one once."""
    stored = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return (stored if tensor.numel() else 0) * tensor.element_size()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Count(TorchDispatchMode):
    def __init__(self, found: Counts) -> None:
        super().__init__()
        self.found = found
        self.quiet = False
        self.held: list[Tensor] = []
        """Every tensor that was seen: what is freed gives its storage's address to another."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.quiet:
            self.record(func, args, kwargs, result)
        return result

    def record(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        given, made = _tensors((args, kwargs)), _tensors(result)
        self.held += made
        known = {_storage(tensor) for tensor in given}
        fresh = {_storage(tensor): tensor for tensor in made if _storage(tensor) not in known}
        self.found.allocations += len(fresh)
        changed = self._changed(func, args, kwargs)
        name = func._schema.name.split("::")[1] if func.namespace == "aten" else func._schema.name
        if not (fresh or changed) or name in ("empty", "empty_strided", "empty_like", "new_empty"):
            return
        seen: dict[Any, Tensor] = {}
        for tensor in given:
            if any(tensor is other for other in changed) and name in FILLS:
                continue
            seen[_storage(tensor), tensor.storage_offset(), tuple(tensor.shape)] = tensor
        read = sum(map(size, seen.values()))
        written = sum(map(size, [*fresh.values(), *changed]))
        flops = flop_registry.get(func.overloadpacket)
        self.found.ops.append(Op(name, read, written, flops(*args, **kwargs, out_val=result) if flops else 0))

    @staticmethod
    def _changed(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The arguments that its schema says it writes to."""
        found = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                found += _tensors(value)
        return found


class _Attention(TorchFunctionMode):
    """`F.scaled_dot_product_attention` as the one kernel that it is on a GPU: without one it would be taken apart."""

    def __init__(self, counting: _Count) -> None:
        super().__init__()
        self.counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
        shape = (*q.shape[:-1], v.shape[-1])
        self.counting.quiet = True
        result = q.new_empty(shape)
        if len(shape) == 4:  # tokens before heads, as the flash kernels write it
            result = q.new_empty([shape[i] for i in (0, 2, 1, 3)]).transpose(1, 2)
        self.counting.quiet = False
        flops = 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        found = self.counting.found
        found.ops.append(Op("scaled_dot_product_attention", sum(map(size, (q, k, v))), size(result), flops))
        found.allocations += 1
        self.counting.held.append(result)
        return result


def count(call: Callable[[], object]) -> Counts:
    """Of a call on tensors without data: fake, or of the meta device."""
    found = Counts()
    counting = _Count(found)
    with torch.no_grad(), counting, _Attention(counting):
        call()
    return found


@dataclass(frozen=True)
class GpuRow:
    """Of a contender; ``counts`` None: it cannot be had, and ``why``."""

    name: str
    counts: Counts | None = None
    why: str = ""


def on_gpu(
    name: str | Network, batch: int, dtype: torch.dtype = torch.bfloat16, wanted: Sequence[str] = COUNTED
) -> list[GpuRow]:
    """The counts of every contender's evaluation on a GPU that is not there."""
    network = NETWORKS[name] if isinstance(name, str) else name
    with torch.device("meta"):
        made = contenders(network, network.build().to(dtype), [name for name in wanted if name in COUNTED])
    found = []
    ready = diffkern.cuda_status()._replace(ready=True)  # as on the GPU that is meant
    with mock.patch.object(diffkern, "cuda_status", return_value=ready), FakeTensorMode(allow_non_fake_inputs=True):
        for one in made:
            if one.model is None:
                found.append(GpuRow(one.name, why=one.why))
                continue
            to_device(one.model)
            x = network.inputs(batch, DEVICE).to(dtype, one.layout)
            try:
                found.append(GpuRow(one.name, count(functools.partial(one.run, x))))
            except Exception as failed:  # its row says why, the others are counted
                found.append(GpuRow(one.name, why=reason(failed)))
    return found


def to_device(model: nn.Module) -> None:
    """Parameters and buffers of the meta device become fake ones of the GPU, in place: `Module.to` cannot do it."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is not None:
                    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)
                    tensors[name] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made

"""What the GPU tests are made of: a device with its streams and graphs, operands moved as they lie, bits compared.

A check takes a `Target` and is the same code for a GPU and for the CPU, so tests/package/test_gpu_checks.py can run it,
and break it on purpose, on a machine without a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

LONG = 200_000_000  # clock cycles, about a tenth of a second: longer than a launch takes on a busy host


# ------------------------------------------------------------------------------------------------------------ tensors
def moved(t: Tensor, device: torch.device) -> Tensor:
    """A copy of t on the device with the same strides, gaps and alignment; `Tensor.to` would close the gaps."""
    if t.numel() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    offset = t.storage_offset()
    flat = torch.as_strided(t.detach(), (offset + last + 1,), (1,), 0)
    copy = flat.to(device, copy=True)
    return torch.as_strided(copy, t.shape, t.stride(), offset).requires_grad_(t.requires_grad)


def _as_bytes(t: Tensor) -> Tensor:
    return t.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def difference(got: Tensor, want: Tensor) -> str | None:
    """None if dtype, shape and all bits agree (any NaN is any NaN, as payloads differ on a GPU), else what does not."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"{got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
    if got.numel() == 0:
        return None
    got, want = got.detach().cpu(), want.detach().cpu()
    size = got.element_size()
    wrong = (_as_bytes(got) != _as_bytes(want)).reshape(-1, size).any(1).reshape(got.shape)
    if got.is_floating_point():
        wrong &= ~(got.isnan() & want.isnan())
    if not bool(wrong.any()):
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {got.numel()} differ, first at {at}: {got[at].item()!r} instead of {want[at].item()!r}"
    )


def assert_same(got: Tensor, want: Tensor, what: str) -> None:
    """Bit equality, with the first difference in the message."""
    problem = difference(got, want)
    assert problem is None, f"{what}: {problem}"


# ------------------------------------------------------------------------------------------------------------ targets
class Target:
    """A device under test. Its methods are all that differs between a GPU and the CPU."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.device})"

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def move(self, value: Any) -> Any:
        """Every tensor in a nest of containers, as it lies in memory."""
        return tree_map(lambda v: moved(v, self.device) if isinstance(v, Tensor) else v, value)

    def fetch(self, t: Tensor) -> Tensor:
        """A result on the CPU. Raises AssertionError if it was not on the device."""
        assert t.device.type == self.device.type, f"the result is on {t.device}, not on {self.device}"
        return t.detach().to("cpu", copy=True)

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def as_current(self) -> AbstractContextManager[object]:
        """Makes this the current device; the other devices keep their current streams."""
        return torch.cuda.device(self.device) if self.is_gpu else nullcontext()

    def record(self, function: Callable[[], object]) -> Callable[[], None]:
        """A CUDA graph of the function, as a function that replays it; on the CPU the function itself.

        The function runs once or more before and writes into static tensors: set these after the call.
        """
        if not self.is_gpu:
            function()

            def again() -> None:
                function()

            return again
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            function()  # loads the kernels, which cannot happen during capture
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()

        def replay() -> None:
            graph.replay()

        return replay

    @contextmanager
    def side_stream(self) -> Iterator[Callable[[], None]]:
        """A stream of its own; what is given makes the outer stream wait for all that was queued on it so far."""
        if not self.is_gpu:
            yield lambda: None
            return
        outer, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(outer)

        def join() -> None:
            event = torch.cuda.Event()
            event.record(side)
            outer.wait_event(event)

        with torch.cuda.stream(side):
            yield join

    def busy(self) -> None:
        """Keeps the current stream busy, so that work queued behind it starts late."""
        if self.is_gpu:
            torch.cuda._sleep(LONG)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Anything that makes the host wait for the GPU raises."""
        if not self.is_gpu:
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def counting(self) -> AbstractContextManager[Callable[[], int]]:
        """A function that tells how many allocations there have been on the device."""
        return nullcontext(self._allocated) if self.is_gpu else counting_storages()

    def _allocated(self) -> int:
        return int(torch.cuda.memory_stats(self.device)["allocation.all.allocated"])


HOST = Target("cpu")


# ---------------------------------------------------------------------------------------------------- watching torch
class _Storages(TorchDispatchMode):
    """Counts results of ops that live in memory which no argument of the op has."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.count += len({_storage(t) for t in tree_leaves(result) if isinstance(t, Tensor)} - given)
        return result


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


@contextmanager
def counting_storages() -> Iterator[Callable[[], int]]:
    """On any device, real or fake: how many tensors torch ops have made inside the block."""
    with _Storages() as mode:
        yield lambda: mode.count


class Traffic(TorchDispatchMode):
    """Lists ops that make the host wait for a device or send it something: `events` holds (what, op).

    With fake CUDA tensors this sees them on a machine without a GPU. A row of a CPU table that a diffkern op reads
    travels in the launch's arguments and is neither. Made for the loops of this package: ops that wait inside
    themselves (nonzero, masks as indices) are listed by name.
    """

    WAITS = ("nonzero", "masked_select", "_local_scalar_dense", "equal", "is_nonzero", "unique", "bincount", "item")

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(t.is_cuda for t in tensors)
        if on_device and name.split(".")[0] in self.WAITS:
            self.events.append(("wait", name))
        result = func(*args, **(kwargs or {}))
        if name.startswith(("_to_copy", "copy_", "clone", "_pin_memory")):
            source = args[1] if name.startswith("copy_") else args[0]
            if result.is_cuda and not source.is_cuda:
                self.events.append(("upload", name))
            if source.is_cuda and not result.is_cuda:
                self.events.append(("download", name))
        if name.startswith("index.") and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:]) and on_device:
            self.events.append(("wait", name))
        return result


def cycle(*values: Any) -> Iterator[Any]:
    """The values again and again: spreads options over cases without their product."""
    return itertools.cycle(values)

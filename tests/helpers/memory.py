"""How many bytes a call takes from torch's allocator."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def allocated(call: Callable[[], object]) -> tuple[int, object]:
    """Bytes that torch's CPU allocator handed out during the call, freed again or not."""
    call()  # warm: thread pools, dispatcher caches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = call()
    events = prof.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return sum(size for size in sizes if size > 0), result


def size(result: object) -> int:
    tensors = [result] if isinstance(result, Tensor) else [t for t in result if t is not None]  # type: ignore[attr-defined]
    # The allocator rounds nothing up, but small tensors are padded to its alignment.
    return sum(t.numel() * t.element_size() for t in tensors)


SLACK = 4096  # alignment, and the few bytes of a scalar

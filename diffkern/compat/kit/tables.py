"""The drop-ins' one cache: tables kept by what they were made of, by identity and version first, then by content."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from diffkern.modes import fakes, neutral

Value = TypeVar("Value")

MOST = 64
"""Values that a cache keeps for sources that come back."""


class Described:
    """A source that says itself what is in it."""

    def content(self) -> Hashable:
        """What is in it."""
        raise NotImplementedError


class Entry(Generic[Value]):
    """A value and what it was made of."""

    __slots__ = ("contents", "counted", "sources", "uncounted", "value", "version")

    def __init__(self, value: Value, sources: tuple[Any, ...], contents: tuple[Any, ...]) -> None:
        self.value, self.sources, self.contents = value, sources, contents
        tensors = [source for source in sources if isinstance(source, Tensor)]
        self.counted = [t for t in tensors if not t.is_inference()]
        self.uncounted = [(t, written(t)) for t in tensors if t.is_inference()]
        self.version = sum(t._version for t in self.counted)
        """Of the tensors that count their writes: as counts only grow, the sum tells whether one was written to."""

    def unchanged(self) -> bool:
        """Whether no source was written to."""
        total = 0
        for tensor in self.counted:
            total += tensor._version
        return total == self.version and (
            not self.uncounted or all(written(tensor) == was for tensor, was in self.uncounted)
        )

    def describe(self, i: int, source: Any) -> Any:
        """`content_of` source i, remembered where it is this one, unchanged."""
        same = self.sources[i] is source and (not isinstance(source, Tensor) or self.unchanged())
        return self.contents[i] if same else content_of(source)


class Tables:
    """Values under keys, each good for as long as what it was made of stays as it is.

    `get` finds a value whose sources (tensors, configs, `Described` objects, anything compared by identity) are the
    very ones given and were not written to. Else it looks for one whose sources held the same, and builds only where
    there is none, so that setting the same schedule again builds nothing. A key names a value and all options
    that it depends on beside the sources; it always comes with as many of them.

    Shallow copies of what owns the tables share them, other threads too: values are never written to. Pickles and deep
    copies start without.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._now: dict[Any, Entry[Any]] = {}
        self._known: dict[tuple[Any, tuple[Any, ...]], Any] = {}

    def __reduce__(self) -> tuple[type[Tables], tuple[int]]:
        return Tables, (self.most,)

    def __len__(self) -> int:
        """The number of values that are known."""
        return len(self._known)

    def get(self, key: Hashable, build: Callable[[], Value], *sources: Any) -> Value:
        """``build()``, kept under ``key`` for these sources; it runs outside a user's modes, on the CPU."""
        found: Entry[Value] | None = self._now.get(key)
        if found is not None:
            for kept, given in zip(found.sources, sources, strict=False):  # as many; every microsecond counts
                if kept is not given:
                    break
            else:
                if found.unchanged():
                    return found.value
        contents = tuple(
            content_of(source) if found is None else found.describe(i, source) for i, source in enumerate(sources)
        )
        value = self._known.get((key, contents), _NOTHING)
        if value is _NOTHING:
            with neutral():
                value = build()
            while len(self._known) >= self.most:
                for oldest in list(self._known)[:1]:  # a list, and no error: other threads are at it too
                    self._known.pop(oldest, None)
            self._known[key, contents] = value
        self._keep(key, Entry(value, sources, contents))
        return value

    def on(self, table: Tensor, device: torch.device) -> Tensor:
        """A table on a device, copied once, for rows that the device picks (a timestep a sample). Not looked into."""
        if table.device == device:
            return table
        key = ("on", id(table), str(device))
        found: Entry[Tensor] | None = self._now.get(key)
        if found is not None and found.sources[0] is table and found.unchanged():
            return found.value
        if fakes(device) is not None:  # of the caller alone
            return table.to(device)
        with neutral():
            copy = table.to(device)
        self._keep(key, Entry(copy, (table,), (Same(table),)))
        return copy

    def _keep(self, key: Hashable, entry: Entry[Any]) -> None:
        if len(self._now) > 4 * self.most:
            self._now.clear()
        self._now[key] = entry

    def clear(self) -> None:
        """Forgets all values."""
        self._now.clear()
        self._known.clear()


_NOTHING: Any = object()


class Same:
    """Equal to what stands for the same object, which it keeps alive."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __hash__(self) -> int:
        return id(self.source)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.source is self.source


def content_of(source: Any) -> Any:
    """What is in a source, hashable; tensors on a device (never read) and tables stand for themselves."""
    if isinstance(source, Tensor):
        if source.device.type == "cpu" and source.dim() <= 1:
            values = source.tolist()
            return source.dtype, source.dim(), array("d", values if source.dim() else [values]).tobytes()
    elif isinstance(source, Mapping):
        return repr(sorted(source.items()))
    elif isinstance(source, Described):
        return source.content()
    return Same(source)


def version(source: Any) -> int:
    """How often a tensor has been written to in place (0 where torch does not count)."""
    return source._version if isinstance(source, Tensor) and not source.is_inference() else 0


def written(table: Tensor) -> Any:
    """What changes when a table is written to in place: its count of writes, where torch does not count them (tensors
    made in `torch.inference_mode`) its numbers, and nothing for such a table on a device, which is never read."""
    if not table.is_inference():
        return table._version
    return table.tolist() if table.device.type == "cpu" else 0

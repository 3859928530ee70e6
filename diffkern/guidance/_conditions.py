"""Conditions: a tensor, or tensors in nested dicts, lists and tuples, put together for one batched model call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every leaf: a tensor, or anything that is no dict, list or tuple."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}[{i}]")
    else:
        yield path, value


def check_batch(name: str, value: Any, batch: int) -> None:
    """Raise ValueError unless every tensor of the condition has one entry a sample, or a single one for all."""
    for path, leaf in leaves(value, name):
        if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] not in (1, batch)):
            raise ValueError(f"{path} must have one entry a sample ({batch}) or one for all, got {list(leaf.shape)}")


def batch_times(t: Any, batch: int) -> Any:
    """t, a single time in [1] made one a sample. Raises ValueError for another number of times."""
    if not isinstance(t, Tensor) or t.ndim == 0 or t.shape[0] == batch:
        return t
    if t.shape[0] != 1:
        raise ValueError(f"t must be a number or one time a sample [{batch}], got shape {list(t.shape)}")
    return t.expand(batch, *t.shape[1:])


def learned(value: Any) -> bool:
    """Whether a tensor of the condition requires a gradient."""
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for _, leaf in leaves(value, ""))


def check_alike(name: str, value: Any, first_name: str, first: Any) -> None:
    """Raise ValueError unless two conditions fit into one batched call: same containers, shapes, dtypes, devices."""
    here, there = dict(leaves(value, "")), dict(leaves(first, ""))
    if here.keys() != there.keys() or _containers(value) != _containers(first):
        odd = sorted(here.keys() ^ there.keys()) or [""]
        raise ValueError(
            f"{name} must be built like {first_name} (or give batched=False), got a difference at {name}{odd[0]}: "
            f"{_show(value)} and {_show(first)}"
        )
    for path, leaf in here.items():
        other = there[path]
        if isinstance(leaf, Tensor) and isinstance(other, Tensor):
            same = leaf.shape[1:] == other.shape[1:] and leaf.dtype == other.dtype and leaf.device == other.device
        else:
            same = type(leaf) is type(other) and leaf == other
        if not same:
            raise ValueError(
                f"{name}{path} must have the shape after the batch, dtype and device of {first_name}{path} "
                f"(or give batched=False), got {_show(leaf)} and {_show(other)}"
            )


def stacked(values: Sequence[Any], batch: int) -> Any:
    """One condition for the batched call: each tensor [n batch, ...], in the order of ``values``; the rest as it is."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat([v.expand(batch, *v.shape[1:]) for v in values])
    if isinstance(first, Mapping):
        return {key: stacked([value[key] for value in values], batch) for key in first}
    if isinstance(first, list | tuple):
        return _rebuilt(first, [stacked(list(items), batch) for items in zip(*values, strict=True)])
    return first


def expanded(value: Any, batch: int) -> Any:
    """The condition of one call: tensors with a single entry stand for all samples."""
    return stacked([value], batch) if any(_single(leaf, batch) for _, leaf in leaves(value, "")) else value


def repeated(value: Any, batch: int, copies: int) -> Any:
    """Further arguments of a batched call: tensors of one entry a sample repeated ``copies`` times, the rest as is."""
    if isinstance(value, Tensor):
        return torch.cat([value] * copies) if value.ndim > 0 and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {key: repeated(item, batch, copies) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return _rebuilt(value, [repeated(item, batch, copies) for item in value])
    return value


def _single(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape[0] == 1 != batch


def _rebuilt(like: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def _containers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _containers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [_containers(item) for item in value]
    return None


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} on {value.device}"
    if isinstance(value, Mapping):
        return f"a dict with keys {list(value)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)

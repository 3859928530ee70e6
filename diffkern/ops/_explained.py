"""What torch says of operands that no kernel is ever given, in the ops' own sentences.

None for a tensor, lists and arrays, sparse and quantised tensors are refused before csrc/bind sees them, in words about
schemas and dispatch. The ops look again only where something was raised.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from diffkern.ops._common import native

P = ParamSpec("P")
R = TypeVar("R")
_SEEDS = "an integer or an int64 tensor"
_KINDS = {"Tensor": "a tensor", "Tensor | None": "a tensor or None", "Seeds": _SEEDS, "Seeds | None": ""}
"""The annotations of operands, and what they say; of seeds that are neither `as_seeds` says it."""


def explained(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates the typed function of the op ``name``: it raises RuntimeError that says which operand is none."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                try:
                    given = inspect.signature(function).bind(*args, **kwargs).arguments
                except TypeError:  # an argument too many, or one left out: said by Python
                    raise error from None
                explain(name, function, given, error)
                raise

        return call

    return decorate


def explain(name: str, function: Callable[..., Any], given: Mapping[str, Any], error: Exception) -> None:
    """What `explained` does with an error, for ops that cannot wait for a decorator: ``given`` are their arguments."""
    if str(error).startswith("diffkern."):
        return
    for argument, parameter in inspect.signature(function).parameters.items():
        kind = _KINDS.get(str(parameter.annotation))
        if kind is None or argument not in given:
            continue
        rule = _broken(kind, given[argument], argument in _written(name), error)
        if rule is not None:
            raise RuntimeError(f"diffkern.{name.removesuffix('_out')}: {argument} must {rule}") from error


def _broken(kind: str, value: object, written: bool, error: Exception) -> str | None:
    """The rule that an operand breaks and what it is; None for one that csrc/bind has looked at."""
    said = not kind or (kind == _SEEDS and value is not None) or (value is None and kind.endswith("None"))
    if said and not isinstance(value, Tensor):
        return None
    if not isinstance(value, Tensor):
        return f"be {kind}, got {type(value).__name__ if value is not None else None}"
    if value.layout != torch.strided:
        return f"be a dense (strided) tensor, got layout {value.layout}"
    if value.is_quantized:
        return f"be float64, float32, float16 or bfloat16, got {str(value.dtype).removeprefix('torch.')}"
    if written and (value.is_neg() or value.is_conj()):
        return "be written as it lies in memory, got a view that torch negates lazily: call resolve_neg() first"
    if isinstance(error, IndexError) and value.dim() == 0:
        return "have a batch dimension, got a tensor without dimensions"
    return None


@functools.lru_cache(maxsize=64)
def _written(name: str) -> frozenset[str]:
    """The operands that the op or its variant into given tensors writes."""
    op = getattr(native, name if name.endswith("_out") or not hasattr(native, f"{name}_out") else f"{name}_out")
    arguments = op.default._schema.arguments
    return frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)

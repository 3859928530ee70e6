"""Plain values as JSON by the name of their kind: how schedules, weightings and networks' configurations are stored.

A record is the object {"kind": NAME, field: value, ...} of a dataclass. What a file says is looked up in a table of
known kinds and checked field by field; nothing is imported, and nothing else is built.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

__all__ = ["from_record", "parsed", "record_of"]

LARGEST = 2**31
"""Integers of a record lie within this."""


def record_of(value: Any, kinds: Mapping[str, type], what: str, remedy: str) -> dict[str, Any]:
    """The record of a dataclass of one of the ``kinds``; ValueError, which ends in the ``remedy``, for any other."""
    name = type(value).__name__
    if kinds.get(name) is not type(value):
        raise ValueError(f"{what} must be one of {', '.join(kinds)} to be stored as JSON, got {name}: {remedy}")
    names = [field.name for field in dataclasses.fields(kinds[name]) if field.init]
    return {"kind": name, **{field: getattr(value, field) for field in names}}


def from_record(data: object, kinds: Mapping[str, type], what: str) -> Any:
    """The dataclass that `record_of` wrote; ValueError naming the field for anything else."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} must be a JSON object, got {type(data).__name__}")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{what}.kind must be one of {', '.join(kinds)}, got {kind!r:.80}")
    cls = kinds[kind]
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    values = {key: value for key, value in data.items() if key != "kind"}
    for name in values:
        if name not in names:
            raise ValueError(f"{what} of kind {kind} has the fields {', '.join(names) or 'none'}, got {name!r:.80}")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in values:
            raise ValueError(f"{what} of kind {kind} must have the field {field.name}, got none")
    return cls(**{name: _typed(value, hints[name], f"{what}.{name}") for name, value in values.items()})


def parsed(text: str, what: str) -> Any:
    """The JSON of a text; ValueError in one sentence where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{what} must be JSON, got {text[:40]!r} ({reason})") from error


def _typed(value: object, hint: Any, what: str) -> Any:
    """A value of JSON as the field's type."""
    if hint is bool:
        ok, rule = isinstance(value, bool), "true or false"
    elif hint is int:
        ok = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
        rule = f"an integer within {LARGEST}"
    elif hint is float:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        rule = "a finite number"
    elif hint is str:
        ok, rule = isinstance(value, str), "text"
    elif get_origin(hint) is Literal:
        ok, rule = value in get_args(hint), "one of " + ", ".join(map(repr, get_args(hint)))
    elif get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{what} must be a list, got {value!r:.80}")
        return tuple(_typed(entry, get_args(hint)[0], f"{what}[{i}]") for i, entry in enumerate(value))
    else:
        raise TypeError(f"{what} has a type that records do not hold: {hint}")
    if not ok:
        raise ValueError(f"{what} must be {rule}, got {value!r:.80}")
    return float(value) if hint is float else value  # type: ignore[arg-type]
